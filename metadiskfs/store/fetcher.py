"""Chunks from the node into the cache: on demand, and ahead of a reader.

Readers of one missing chunk share one download. Its bytes can be read as soon as their block is proven, while the
rest still comes. The lock here is a leaf, like the cache's; nobody waits for the network while holding any other.
"""

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable

from metadiskfs import errors
from metadiskfs.crash import crash_point
from metadiskfs.errors import ContentMismatch, MetadiskfsError, NodeError, NodeUnreachable, ObjectMissing
from metadiskfs.metadisk.jobs import FetchJob, FetchResult
from metadiskfs.metadisk.wire import BLOCK_SIZE
from metadiskfs.store.cache import Cache
from metadiskfs.store.chunks import ChunkRow, Chunks
from metadiskfs.store.files import read_at
from metadiskfs.store.ports import Transfer
from metadiskfs.store.schema import LOST, STORED

log = logging.getLogger(__name__)

_AHEAD_BYTES, _DOWNLOADS = 16 << 20, 32
"""How much may be under way that nobody asked for yet."""
_MARGIN = 5.0
"""Seconds a reader waits beyond the transfer process's own deadline: for a restart of that process, say."""


class Download:
    """One chunk on its way here. ``proven`` are the blocks that may be read from ``fd``."""

    def __init__(self, chunk: ChunkRow, job: FetchJob, *, ahead: bool) -> None:
        self.chunk = chunk
        self.job = job
        self.ahead = ahead
        self.fd = -1
        self.users = 0
        self.proven: set[int] = set()
        self.done = False
        self.error: MetadiskfsError | None = None
        self.sent = False

    def has(self, start: int, stop: int) -> bool:
        """Whether bytes ``start`` to ``stop`` of the chunk are here and proven."""
        if self.done:
            return True
        return all(block in self.proven for block in range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)))


class Fetcher:
    """Brings chunks that are not on this machine. Safe to use from any thread."""

    def __init__(self, chunks: Chunks, cache: Cache, *, deadline: float) -> None:
        """``deadline``: seconds after which a read that finds no node gives up."""
        self._chunks = chunks
        self._cache = cache
        self._deadline = deadline + _MARGIN
        self._changed = threading.Condition(threading.Lock())
        self._downloads: dict[bytes, Download] = {}
        self._by_id: dict[int, Download] = {}
        self._numbers = itertools.count(1)
        self._ahead_bytes = 0
        self.transfer: Transfer | None = None

    # -- for readers ----------------------------------------------------------------------------------------------

    def read(self, number: int, view: memoryview, offset: int, *, meanwhile: Callable[[], None]) -> None:
        """Fill ``view`` with the chunk's bytes from ``offset`` on, fetching them where they are not here.

        Waits, so no lock may be held; ``meanwhile`` is called before. Raises NodeError and its kind (EIO), bounded in
        time.
        """
        stop = offset + len(view)
        chunk = self._chunks.require(number)
        opened = self._cache.open_chunk(chunk.sha256)
        if opened is not None:
            with opened as fd:
                _read_exactly(fd, view, offset)
            return
        download = self._join(chunk, first=offset // BLOCK_SIZE)
        try:
            meanwhile()
            self._wait(download, offset, stop)
            _read_exactly(download.fd, view, offset)
        finally:
            self._leave(download)

    def ensure(self, number: int) -> None:
        """Have the whole chunk on this machine. Waits; raises like read()."""
        chunk = self._chunks.require(number)
        if self._cache.has_chunk(chunk.sha256):
            return
        download = self._join(chunk, first=0)
        try:
            self._wait(download, 0, chunk.size, whole=True)
        finally:
            self._leave(download)

    def prefetch(self, numbers: list[int]) -> None:
        """Start fetching chunks that will probably be read. Never waits, never raises for the node's sake."""
        for number in numbers:
            with self._changed:
                if self._ahead_bytes >= _AHEAD_BYTES or len(self._downloads) >= _DOWNLOADS:
                    return
            chunk = self._chunks.chunk(number)
            if chunk is None or chunk.state != STORED or self._cache.has_chunk(chunk.sha256):
                continue
            with self._changed:
                if chunk.sha256 in self._downloads:
                    continue
                self._start(chunk, first=0, ahead=True)

    def is_coming(self, sha256: bytes) -> bool:
        return sha256 in self._downloads

    # -- from the transfer process --------------------------------------------------------------------------------

    def on_result(self, result: FetchResult) -> None:
        """Take one result. Called by the transfer's receiver thread."""
        with self._changed:
            download = self._by_id.get(result.id)
        if download is None:
            return
        try:
            self._take(download, result)
        except (MetadiskfsError, OSError) as error:  # too many open files, a full disk: the reader must hear of it
            log.error("chunk %s could not be taken into the cache: %s", download.chunk.sha256.hex(), error)
            with self._changed:
                download.error = download.error or NodeError(f"chunk {download.chunk.sha256.hex()}: {error}")
        with self._changed:
            if result.done or download.error is not None:
                self._finish(download)
            self._changed.notify_all()
            self._send_waiting()

    def _take(self, download: Download, result: FetchResult) -> None:
        with self._changed:
            if result.error:
                download.error = _error(result, download.chunk)
            elif download.fd < 0:
                download.fd = os.open(download.job.path, os.O_RDONLY | os.O_CLOEXEC)
            if result.done:
                download.done = True
            elif not result.error:
                download.proven.update(range(result.start, result.stop))
        if result.done and not result.error:
            crash_point("fetched-before-rename")
            self._cache.keep_fetched(download.job.path, download.chunk.sha256, download.chunk.size)
            if download.chunk.state == LOST:
                self._chunks.mark_found(download.chunk.id)
        elif isinstance(download.error, ObjectMissing):
            self._chunks.mark_lost(download.chunk.id)

    def on_restart(self) -> None:
        """Hand out every unfinished download anew: the process that had them is gone."""
        with self._changed:
            for download in self._downloads.values():
                download.sent = False
            self._send_waiting()

    # -- inside; "_" means the lock is held, but for _join, _wait and _leave --------------------------------------

    def _join(self, chunk: ChunkRow, *, first: int) -> Download:
        if not chunk.filehash:  # a lost chunk with a filehash is asked for all the same: it may be back
            raise NodeUnreachable(f"chunk {chunk.sha256.hex()} is neither on this machine nor on the node")
        with self._changed:
            download = self._downloads.get(chunk.sha256) or self._start(chunk, first=first)
            download.users += 1
        return download

    def _wait(self, download: Download, start: int, stop: int, *, whole: bool = False) -> None:
        until = time.monotonic() + self._deadline
        with self._changed:
            while not (download.done or (not whole and download.has(start, stop))):
                if download.error is not None:
                    raise download.error
                left = until - time.monotonic()
                if left <= 0:
                    raise NodeUnreachable("the node did not deliver in time")
                self._changed.wait(left)

    def _leave(self, download: Download) -> None:
        with self._changed:
            download.users -= 1
            self._close_if_over(download)

    def _start(self, chunk: ChunkRow, *, first: int, ahead: bool = False) -> Download:
        job = FetchJob(
            id=next(self._numbers),
            path=self._cache.new_part_path(),
            filehash=chunk.filehash,
            key=chunk.key,
            counter_start=chunk.counter_start,
            sha256=chunk.sha256.hex(),
            size=chunk.size,
            blocks=chunk.blocks.hex(),
            first=first if chunk.blocks else 0,
            ahead=ahead,
        )
        download = Download(chunk, job, ahead=ahead)
        self._ahead_bytes += chunk.size if ahead else 0
        self._downloads[chunk.sha256] = download
        self._by_id[job.id] = download
        self._send_waiting()
        return download

    def _send_waiting(self) -> None:
        for download in self._downloads.values():
            if not download.sent:
                if self.transfer is None or not self.transfer.fetch(download.job):
                    return
                download.sent = True

    def _finish(self, download: Download) -> None:
        self._downloads.pop(download.chunk.sha256, None)
        self._by_id.pop(download.job.id, None)
        self._ahead_bytes -= download.chunk.size if download.ahead else 0
        self._close_if_over(download)

    def _close_if_over(self, download: Download) -> None:
        if download.users == 0 and download.fd >= 0 and download.job.id not in self._by_id:
            os.close(download.fd)
            download.fd = -1


def _read_exactly(fd: int, view: memoryview, offset: int) -> None:
    if read_at(fd, view, offset) < len(view):
        raise ContentMismatch("a chunk file is shorter than its chunk")


def _error(result: FetchResult, chunk: ChunkRow) -> MetadiskfsError:
    kind = getattr(errors, result.error, NodeError)
    message = f"chunk {chunk.sha256.hex()}, object {chunk.filehash}: {result.message}"
    if isinstance(kind, type) and issubclass(kind, MetadiskfsError):
        return kind(message)
    return NodeError(message)
