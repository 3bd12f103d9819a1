"""What a mount does by itself, besides serving: saving its index, and sweeping its node when the disk gets short.

Both are asked about once a second by the volume's maintenance thread and do their work elsewhere: a save on a thread
of its own, a sweep in a process of its own, because it asks all mounted volumes, this one included.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from metadiskfs.errors import MetadiskfsError
from metadiskfs.store.backup import Backups
from metadiskfs.store.chunks import Chunks
from metadiskfs.store.uploader import Uploader

log = logging.getLogger(__name__)

_QUIET_SECONDS = 15.0
_SAVE_AT_END_SECONDS = 20.0
_LOOK_SECONDS, _SWEEP_SECONDS = 10.0, 600.0
SAVE_SECONDS = 300.0
"""How long saving an index may take."""


class BackupSchedule:
    """When the index is saved by itself: after a burst of changes, at least every so often, and at the end."""

    def __init__(self, backups: Backups, uploader: Uploader, interval: float) -> None:
        """``interval``: seconds between two backups at most, while something changes."""
        self._backups = backups
        self._uploader = uploader
        self._interval = interval
        self._seen = -1
        self._quiet_since = 0.0
        self._retry_at = 0.0
        self._thread: threading.Thread | None = None

    def tick(self) -> None:
        now = time.monotonic()
        if self._backups.changes != self._seen:
            self._seen, self._quiet_since = self._backups.changes, now
        due = now - self._quiet_since > _QUIET_SECONDS or now - self._backups.saved_at > self._interval
        idle = self._thread is None or not self._thread.is_alive()
        if due and idle and now >= self._retry_at and self._backups.is_needed and not self._uploader.is_node_away:
            self._retry_at = now + _QUIET_SECONDS
            self._thread = threading.Thread(target=self._save, args=(SAVE_SECONDS,), name="backup", daemon=True)
            self._thread.start()

    def save_at_end(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
        if self._backups.transfer is not None and self._backups.is_needed and not self._uploader.is_node_away:
            self._save(_SAVE_AT_END_SECONDS)

    def _save(self, timeout: float) -> None:
        try:
            self._backups.save(timeout=timeout)
        except (MetadiskfsError, OSError) as error:
            log.warning("the index could not be saved to the node, trying again later: %s", error)


class SpaceWatch:
    """Sweeps the embedded node when its disk gets short and something there may be garbage."""

    def __init__(self, store: Path, chunks: Chunks, below: int) -> None:
        """``store``: the node's folder. ``below``: bytes free on its disk under which it counts as short."""
        self._store = store
        self._chunks = chunks
        self._below = below
        self._look_at = 0.0
        self._sweep_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def tick(self) -> None:
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        if self._process is not None and self._process.poll() is None:
            return
        disk = os.statvfs(self._store)
        if now >= self._sweep_at and disk.f_bavail * disk.f_frsize < self._below and self._chunks.has_dropped():
            self._sweep_at = now + _SWEEP_SECONDS
            log.info("the disk gets short: sweeping the embedded node")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "metadiskfs", "gc"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
