"""How much went through the node: running totals that survive it and are shared by its processes.

Each process counts in memory and adds its increments to the accounts file every few seconds and when it ends; a
kill -9 loses those seconds. Names in the file: ``in``, ``out`` (bytes of content), ``in:2026-11`` for a month,
``request:upload:201`` by route and status, ``stored``, ``existed``, ``damaged`` for objects, ``stored-bytes``
for those that were new.
"""

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass

from metadiskfs.node.accounts import Accounts

log = logging.getLogger(__name__)

FLUSH_INTERVAL = 5.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Bytes:
    incoming: int
    outgoing: int


class Traffic:
    """Counters; every method may be called from any thread."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        # Order: _flushing, then _lock. Requests take _lock alone, which is never held while anything is written.
        self._flushing = threading.Lock()
        self._lock = threading.Lock()
        self._fresh: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._thread.start()

    def received(self, size: int) -> None:
        with self._lock:
            self._fresh["in"] += size

    def sent(self, size: int) -> None:
        with self._lock:
            self._fresh["out"] += size

    def put(self, new_size: int | None) -> None:
        """An object was put: ``new_size`` bytes, or None for one that existed."""
        if new_size is None:
            self.event("existed")
            return
        with self._lock:
            self._fresh["stored"] += 1
            self._fresh["stored-bytes"] += new_size

    def answered(self, route: str, status: int) -> None:
        self.event(f"request:{route}:{status}")

    def event(self, name: str) -> None:
        with self._lock:
            self._fresh[name] += 1

    def totals(self) -> dict[str, int]:
        """Everything counted so far, by all processes of the node; others' last seconds may be missing.

        Writes nothing, so that it can be asked on a full disk as well.
        """
        with self._flushing:  # or what is being written would be missing for a moment, and counters only grow
            totals = Counter(self._accounts.counters())
            with self._lock:
                totals.update(_with_month(self._fresh))
        return totals

    def moved(self) -> tuple[Bytes, Bytes]:
        """Bytes of content in and out: in total, and in this month (UTC)."""
        totals, month = self.totals(), _month()
        return (
            Bytes(totals.get("in", 0), totals.get("out", 0)),
            Bytes(totals.get(f"in:{month}", 0), totals.get(f"out:{month}", 0)),
        )

    def flush(self) -> None:
        """Write down what was counted since the last time. Raises OSError, and then has lost nothing."""
        with self._flushing:
            with self._lock:
                fresh, self._fresh = self._fresh, Counter()
            try:
                if fresh:
                    self._accounts.count(_with_month(fresh))
            except BaseException:
                with self._lock:
                    self._fresh.update(fresh)
                raise

    def close(self) -> None:
        self._stop.set()
        self._thread.join(FLUSH_INTERVAL)
        try:
            self.flush()
        except OSError as error:
            log.error("the last traffic counters could not be written: %s", error)

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_INTERVAL):
            try:
                self.flush()
            except OSError as error:  # a full disk must not end the counting for good
                log.error("the traffic counters could not be written: %s", error)


def _with_month(fresh: Counter[str]) -> Counter[str]:
    """Bytes count for a month as well: the one in which they are written down."""
    return fresh + Counter({f"{direction}:{_month()}": fresh[direction] for direction in ("in", "out")})


def _month() -> str:
    return time.strftime("%Y-%m", time.gmtime())
