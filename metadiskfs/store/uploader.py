"""Pending chunks to the node. The queue is a column of the index; what is in flight is known here only, in memory.

A failed upload is tried again for ever, with growing pauses. What went wrong with one chunk delays that chunk; only
when several in a row failed for the node's sake does everything wait, with one chunk at a time to probe. Results
come in on the transfer's receiver thread and are recorded in batches by the uploader's own.
"""

import contextlib
import heapq
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from metadiskfs import errors
from metadiskfs.errors import MetadiskfsError, NodeError
from metadiskfs.metadisk.jobs import UploadJob, UploadResult
from metadiskfs.store.cache import Cache
from metadiskfs.store.chunks import Chunks, Receipt
from metadiskfs.store.ports import Transfer

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_PAUSE_SECONDS = 0.002
"""Between two rounds: each takes the interpreter lock from the threads that serve the kernel."""
_GATHER_SECONDS = 0.01
"""While plenty is in flight, results are gathered for so long before they are recorded in one transaction."""
_TOGETHER, _SMALL = 8, 64 * 1024
"""How many chunks of at most how many bytes go into one message: a small one costs as much to tell as to send."""
_BURST, _BURST_SECONDS = 8, 0.1
"""So many files closed within so many seconds: somebody is copying, unpacking, committing, and waits for that."""
_HOLD_TICK = 0.025
_HELD_SECONDS = 5.0
"""How long such a burst is let alone before its uploads begin beside it; rclone waits as long for every file."""
_QUEUED_AHEAD = 256
"""Rows of the queue read at a time."""
_NO_BALANCE = errors.BalanceInsufficient.__name__
_DOWN_AFTER = 4
"""Failures in a row, without a success between, after which the node counts as away."""


Entry = tuple[int, bytes, int]
"""A row of the queue: chunk, SHA-256, size."""


@dataclass(slots=True)
class Failure:
    """What a chunk's last attempt came to. ``due`` is in time.monotonic() seconds."""

    attempts: int
    due: float
    error: str
    transient: bool


class Uploader:
    """Keeps up to ``in_flight_limit`` uploads under way. Safe to use from any thread; its lock is a leaf."""

    def __init__(self, chunks: Chunks, cache: Cache, *, in_flight_limit: int = 64) -> None:
        self._chunks = chunks
        chunks.on_revived = self.requeue
        self._cache = cache
        self._limit = in_flight_limit
        self._lock = threading.Condition(threading.Lock())
        self._wake = threading.Event()
        self._in_flight: dict[int, UploadJob] = {}
        self._results: deque[UploadResult] = deque()
        self._failures: dict[int, Failure] = {}
        self._retries: list[tuple[float, int]] = []
        self._cursor = 0
        self._fresh: deque[Entry] = deque()
        self._failed_in_a_row = 0
        self._paused_until = 0.0
        self._away_pause = 0.0
        self._wakes: deque[float] = deque(maxlen=_BURST)
        self._held_since: float | None = None
        self._waiting = 0
        self._stop = False
        self._stored = 0
        self.last_error = ""
        self.transfer: Transfer | None = None
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; results that arrived are recorded, the rest stays pending."""
        self._stop = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """There may be new pending chunks."""
        self._wakes.append(time.monotonic())
        if not self._wake.is_set():  # setting takes a lock, and writers come by often
            self._wake.set()

    def retry_now(self) -> None:
        """Forget all pauses: somebody is waiting."""
        with self._lock:
            self._paused_until = 0.0
            waiting = {chunk for _, chunk in self._retries} | self._failures.keys()
            self._retries = [(0.0, chunk) for chunk in sorted(waiting)]
        self._wake.set()

    def requeue(self, chunk: int) -> None:
        """Take a chunk up that became pending again behind the cursor."""
        with self._lock:
            heapq.heappush(self._retries, (0.0, chunk))
        self._wake.set()

    @property
    def is_node_away(self) -> bool:
        """Whether several uploads in a row failed for the node's sake."""
        return self._failed_in_a_row >= _DOWN_AFTER

    @property
    def progress(self) -> int:
        """Counts chunks that were stored: to be taken before one looks what is pending, for wait_progress()."""
        return self._stored

    def wait_progress(self, timeout: float, *, since: int | None = None) -> bool:
        """Wait until more is stored than ``since`` (None: now). False when ``timeout`` seconds were too short."""
        with self._awaited():
            before = self._stored if since is None else since
            return self._lock.wait_for(lambda: self._stored > before, timeout)

    def wait_stored(self, chunks: set[int], timeout: float) -> None:
        """Wait until none of the chunks is pending. Raises what their upload failed with, or NodeUnreachable."""
        until = time.monotonic() + timeout
        with self._lock:
            for chunk in chunks & self._failures.keys():
                heapq.heappush(self._retries, (0.0, chunk))
        while waiting := {chunk for chunk in chunks if self._chunks.pending_of(chunk)}:
            with self._awaited():
                for chunk in waiting & self._failures.keys():
                    failure = self._failures[chunk]
                    if not failure.transient or failure.error.startswith(_NO_BALANCE) or time.monotonic() >= until:
                        raise _error_named(failure.error)
                if time.monotonic() >= until:
                    raise errors.NodeUnreachable("the node did not acknowledge in time")
                self._lock.wait(0.5)

    @contextlib.contextmanager
    def _awaited(self) -> Iterator[None]:
        """Hold the lock for somebody who waits for uploads: they begin at once."""
        with self._lock:
            self._waiting += 1
            self._wake.set()
            try:
                yield
            finally:
                self._waiting -= 1

    def state(self) -> dict[str, object]:
        """For ``status``: uploads in flight, failures, and when the next try is due (seconds from now)."""
        with self._lock:
            now = time.monotonic()
            due = [self._paused_until] if self._paused_until > now else []
            due += [failure.due for failure in self._failures.values()]
            return {
                "in_flight": len(self._in_flight),
                "failing_chunks": len(self._failures),
                "node_away": self.is_node_away,
                "last_error": self.last_error if self._failures or self._failed_in_a_row else "",
                "next_try_seconds": max(0.0, round(min(due) - now, 1)) if due else None,
            }

    # -- from the transfer process --------------------------------------------------------------------------------

    def on_result(self, result: UploadResult) -> None:
        self._results.append(result)
        if not self._wake.is_set():
            self._wake.set()

    def on_restart(self) -> None:
        """The process that had the jobs is gone: hand them out anew."""
        with self._lock:
            for chunk in self._in_flight:
                heapq.heappush(self._retries, (0.0, chunk))
            self._in_flight.clear()
        self._wake.set()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._wake.wait(self._seconds_to_next())
            if not self._stop:
                time.sleep(_GATHER_SECONDS if len(self._in_flight) > self._limit // 2 else _PAUSE_SECONDS)
            self._wake.clear()
            try:
                self._record()
                if self._stop:
                    return
                if not self._is_held():
                    self._hand_out()
                elif not self._stop:
                    time.sleep(_HOLD_TICK)
                    self._wake.set()
            except Exception as error:  # whatever it is, this thread must go on
                foreseen = isinstance(error, (MetadiskfsError, OSError))
                log.error("the upload queue stands still for a moment: %s", error, exc_info=not foreseen)
                time.sleep(1)
                self._wake.set()

    def _is_held(self) -> bool:
        """Whether to let a burst of closing files alone: on few cores its uploads would take half of its speed."""
        now = time.monotonic()
        if self._waiting or len(self._wakes) < _BURST or now - self._wakes[0] > _BURST_SECONDS:
            self._held_since = None
            return False
        if self._held_since is None:
            self._held_since = now
        return now - self._held_since < _HELD_SECONDS

    def _seconds_to_next(self) -> float | None:
        with self._lock:
            if not self._retries or len(self._in_flight) >= self._limit:
                return None
            due = max(self._retries[0][0], self._paused_until)
            return max(0.0, due - time.monotonic())

    def _record(self) -> None:
        """Settle the results that arrived: good ones in one transaction, failures each with its next try."""
        receipts: list[Receipt] = []
        settled: list[UploadResult] = []
        while self._results:
            result = self._results.popleft()
            settled.append(result)
            if not result.error:
                receipts.append(_receipt(result))
        if not settled:
            return
        try:
            self._chunks.mark_stored(receipts)
            dropped = {result.id for result in settled if result.error and not self._chunks.pending_of(result.id)}
        except MetadiskfsError:
            self._results.extendleft(reversed(settled))  # the node has them, the index must learn it
            raise
        with self._lock:
            for result in settled:
                self._in_flight.pop(result.id, None)
                if result.id in dropped:
                    self._failures.pop(result.id, None)
                elif result.error:
                    self._failed(result)
                else:
                    self._succeeded(result.id)
            self._lock.notify_all()

    def _succeeded(self, chunk: int) -> None:
        self._stored += 1
        self._failures.pop(chunk, None)
        if self._failed_in_a_row:
            self._failed_in_a_row = 0
            if self._paused_until:  # it is back: what failed for its sake need not wait
                self._paused_until = self._away_pause = 0.0
                for number, failure in self._failures.items():
                    if failure.transient:
                        heapq.heappush(self._retries, (0.0, number))

    def _failed(self, result: UploadResult) -> None:
        kind = _error_kind(result.error)
        transient = getattr(kind, "transient", False) or kind is errors.BalanceInsufficient
        attempts = self._failures[result.id].attempts + 1 if result.id in self._failures else 1
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(attempts - 1, 10)) * random.uniform(0.75, 1.25)
        pause = max(pause, min(result.retry_after or 0.0, 10 * _LONGEST_PAUSE))
        self.last_error = f"{result.error}: {result.message}"
        due = time.monotonic() + pause
        self._failures[result.id] = Failure(attempts, due, f"{result.error}: {result.message}", transient)
        heapq.heappush(self._retries, (due, result.id))
        log.warning(
            "upload of chunk %d failed (attempt %d), next in %.0f s: %s", result.id, attempts, pause, result.message
        )
        if transient:
            self._failed_in_a_row += 1
            now = time.monotonic()
            if self.is_node_away and now >= self._paused_until:  # not one of those that failed together with the last
                self._away_pause = min(_LONGEST_PAUSE, 2 * self._away_pause or _FIRST_PAUSE)
                self._paused_until = now + max(self._away_pause, min(result.retry_after or 0.0, 10 * _LONGEST_PAUSE))

    def _hand_out(self) -> None:
        while True:
            with self._lock:
                room = (1 if self.is_node_away else self._limit) - len(self._in_flight)
                if room <= 0 or time.monotonic() < self._paused_until:
                    return
                due = self._due(room)
            try:
                entries = [entry for chunk in due if (entry := self._entry(chunk))]
                entries += self._take_fresh(room - len(due))
            except MetadiskfsError:
                self._offer_later(due)
                raise
            if not due and not entries:
                return
            batches = list(self._batches(entries))
            for position, batch in enumerate(batches):
                if not self._offer(batch):
                    self._offer_later([chunk for later in batches[position:] for chunk, _, _ in later])
                    return

    def _batches(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        """What is to be handed out together: small chunks of which none has failed before, when there are many."""
        together = min(_TOGETHER, 1 + len(entries) // _TOGETHER)
        batch: list[Entry] = []
        for entry in entries:
            chunk, _, size = entry
            if size > _SMALL or chunk in self._failures:
                yield [entry]
                continue
            batch.append(entry)
            if len(batch) >= together:
                yield batch
                batch = []
        if batch:
            yield batch

    def _take_fresh(self, count: int) -> list[Entry]:
        """Up to ``count`` entries of the queue that were never handed out."""
        if len(self._fresh) < count:
            self._fresh.extend(self._chunks.pending_after(self._cursor, _QUEUED_AHEAD))
            if self._fresh:
                self._cursor = self._fresh[-1][0]
        return [self._fresh.popleft() for _ in range(min(count, len(self._fresh)))]

    def _offer(self, batch: list[Entry]) -> bool:
        assert self.transfer is not None
        with self._lock:
            jobs = [
                UploadJob(chunk, self._cache.sealed_path(sha256), sha256.hex(), size)
                for chunk, sha256, size in batch
                if chunk not in self._in_flight
            ]
            self._in_flight.update((job.id, job) for job in jobs)
        if not jobs or self.transfer.upload(*jobs):
            return True
        with self._lock:
            for job in jobs:
                self._in_flight.pop(job.id, None)
        return False

    def _offer_later(self, chunks: list[int]) -> None:
        """The transfer process has no room, or is being started: keep the order, try again in a moment."""
        due = time.monotonic() + 0.05
        with self._lock:
            for chunk in chunks:
                heapq.heappush(self._retries, (due, chunk))

    def _due(self, room: int) -> list[int]:
        now = time.monotonic()
        batch: list[int] = []
        while self._retries and self._retries[0][0] <= now and len(batch) < room:
            chunk = heapq.heappop(self._retries)[1]
            if chunk not in self._in_flight and chunk not in batch:
                batch.append(chunk)
        return batch

    def _entry(self, chunk: int) -> Entry | None:
        """The queue's row of a chunk that is due again; forgets the chunk when it needs no upload any more."""
        entry = self._chunks.pending_of(chunk)
        if entry is None:
            with self._lock:
                self._failures.pop(chunk, None)
        return entry


def _receipt(result: UploadResult) -> Receipt:
    return Receipt(
        result.id,
        bytes.fromhex(result.filehash),
        bytes.fromhex(result.key),
        result.counter_start,
        bytes.fromhex(result.blocks),
    )


def _error_kind(name: str) -> type[MetadiskfsError]:
    kind = getattr(errors, name, NodeError)
    return kind if isinstance(kind, type) and issubclass(kind, MetadiskfsError) else NodeError


def _error_named(text: str) -> MetadiskfsError:
    name, _, message = text.partition(": ")
    return _error_kind(name)(message)
