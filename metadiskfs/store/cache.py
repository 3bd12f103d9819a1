"""The chunk files and work files of a volume on this machine's disk, and how much they may take.

::

    <data>/volumes/NAME/work/INODE-SLOT-N      mutable, private to one slot of one inode
    <data>/volumes/NAME/sealed/ab/SHA256       immutable, not on the node yet: must not be lost
    <cache>/volumes/NAME/ab/SHA256             immutable, on the node: may vanish at any time
    <cache>/volumes/NAME/part/N                being fetched

A chunk file is complete from the moment it has its name. A stored chunk moves from ``sealed`` to the cache after its
row says so, hence a reader looks among the sealed, in the cache, and once more among the sealed.
Everything is safe to call from any thread; the locks here are leaves.
"""

import contextlib
import errno
import itertools
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from metadiskfs.crash import crash_point
from metadiskfs.errors import CacheFull, ChunkDamaged
from metadiskfs.store.descriptors import Descriptors, OpenFile
from metadiskfs.store.files import copy_over, digest_of, fsync_folder

log = logging.getLogger(__name__)

_EVICT_SAMPLE = 64
_DISK_RESERVE = 4 << 20
"""Bytes of the disk that content leaves free."""
_PLACES_KEPT = 1024
_FANOUT = [f"{n:02x}" for n in range(256)]
_CHUNK_NAME = re.compile("[0-9a-f]{64}")


class Cache:
    """Chunk files and work files. Sizes are in bytes; ``limit`` bounds all three kinds together."""

    def __init__(self, data_dir: Path, cache_dir: Path, *, limit: int) -> None:
        self.limit = limit
        self.work_dir = str(data_dir / "work")
        self.sealed_dir = str(data_dir / "sealed")
        self.cache_dir = str(cache_dir)
        self.part_dir = str(cache_dir / "part")
        self.descriptors = Descriptors()
        self._serial = itertools.count()
        self._count_lock = threading.Lock()
        self.pending_bytes = 0
        """Held by work files and sealed chunks: cannot be freed before an upload."""
        self.cached_bytes = 0
        """Held by stored chunks: can be fetched again."""
        self._disk_budget = 0
        """Bytes that may be added before the disk is looked at again."""
        self._evict_lock = threading.Lock()
        self.before_eviction: Callable[[], None] = lambda: None
        """Makes the index durable: what goes must not be 'pending' again after a power cut."""
        self.on_dropped: Callable[[], None] = lambda: None
        """Told that remove_dropped() has something to do."""
        self._moving: dict[bytes, int] = {}
        """Stored chunks whose files are still among the sealed ones, with their sizes."""
        self._dropped: dict[bytes, int] = {}
        """Chunks nothing refers to any more whose files are still there, with their sizes."""
        self._places: dict[bytes, str] = {}
        """Where a chunk's file was last opened: spares a read of an open one the making of paths."""
        self._place_lock = threading.Lock()
        """Whoever gives a sealed chunk its place or takes it away holds it; taken before the other two locks."""
        self._volatile: set[bytes] = set()
        self._doubted_before_ns = 0
        self._newest_ns = 0
        self._proven: set[bytes] = set()
        for folder in (self.work_dir, self.sealed_dir, self.cache_dir, self.part_dir):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        for folder in (self.sealed_dir, self.cache_dir):
            existing = set(os.listdir(folder))
            for name in _FANOUT:
                if name not in existing:
                    os.mkdir(f"{folder}/{name}", 0o700)

    # -- paths ----------------------------------------------------------------------------------------------------

    def sealed_path(self, sha256: bytes) -> str:
        name = sha256.hex()
        return f"{self.sealed_dir}/{name[:2]}/{name}"

    def cached_path(self, sha256: bytes) -> str:
        name = sha256.hex()
        return f"{self.cache_dir}/{name[:2]}/{name}"

    def new_work_path(self, inode: int, slot: int) -> str:
        """A new file's path; inode 0 for what is nobody's content and goes with the next start."""
        return f"{self.work_dir}/{inode}-{slot}-{next(self._serial)}"

    def new_part_path(self) -> str:
        os.makedirs(self.part_dir, mode=0o700, exist_ok=True)  # somebody emptied the cache folder
        return f"{self.part_dir}/{os.getpid()}-{next(self._serial)}"

    # -- accounting -----------------------------------------------------------------------------------------------

    def count(self, *, pending: int = 0, cached: int = 0) -> None:
        """Record a change of what the files hold."""
        with self._count_lock:
            self.pending_bytes += pending
            self.cached_bytes += cached

    def make_room(self, size: int) -> None:
        """See to it that ``size`` more bytes stay within the limit, evicting stored chunks. Raises CacheFull."""
        if self.pending_bytes + self.cached_bytes + size > self.limit:
            self.settle()
            if self.pending_bytes + size > self.limit:
                raise CacheFull(f"the cache limit of {self.limit} bytes is reached by data that waits for upload")
            self.evict(self.pending_bytes + self.cached_bytes + size - self.limit + self.limit // 32)
        self._disk_budget -= size
        if self._disk_budget < 0:
            self._look_at_disk(size)

    def _look_at_disk(self, size: int) -> None:
        """Leave the index some room: without any, nothing could be deleted or noted as stored. Raises CacheFull."""
        free = self._free_on_disk()
        if free < size + _DISK_RESERVE and self.evict(size + _DISK_RESERVE - free):
            free = self._free_on_disk()
        if free < size + _DISK_RESERVE:
            raise CacheFull("the disk under the volume is full")
        self._disk_budget = (free - size - _DISK_RESERVE) // 2

    def _free_on_disk(self) -> int:
        found = os.statvfs(self.work_dir)
        return found.f_bavail * found.f_frsize

    # -- chunk files ----------------------------------------------------------------------------------------------

    def open_chunk(self, sha256: bytes) -> OpenFile | None:
        """Borrow the chunk's file, or None where it is not here. Raises ChunkDamaged when it fails its proof."""
        place = self._places.get(sha256)
        if place is not None and (known := self.descriptors.borrow_open(place)) is not None:
            return known
        sealed = self.sealed_path(sha256)
        for path in (sealed, self.cached_path(sha256), sealed):
            try:
                opened = self.descriptors.borrow(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            if self._doubted_before_ns and not self._prove(sha256, opened):
                continue
            if len(self._places) >= _PLACES_KEPT:
                self._places.clear()
            self._places[sha256] = path
            return opened
        return None

    def has_chunk(self, sha256: bytes) -> bool:
        return os.path.exists(self.sealed_path(sha256)) or os.path.exists(self.cached_path(sha256))

    def doubt_older_than(self, time_ns: int) -> int:
        """After a power cut: chunk files from before it prove themselves at their first use.

        Returns the moment to be remembered for later sessions: not before any file here, however the clock was set.
        """
        self._doubted_before_ns = max(time_ns, self._newest_ns + 1)
        return self._doubted_before_ns

    def _prove(self, sha256: bytes, opened: OpenFile) -> bool:
        if sha256 in self._proven or os.fstat(opened.fd).st_ctime_ns >= self._doubted_before_ns:
            return True
        if digest_of(opened.fd).sha256 == sha256:
            self._proven.add(sha256)
            os.utime(opened.fd)  # changed since the power cut now: later sessions need no proof
            return True
        self.descriptors.give_back(opened)
        if opened.path.startswith(self.sealed_dir):
            raise ChunkDamaged(f"the only copy of chunk {sha256.hex()} is damaged, as a power cut may leave it")
        log.warning("the cached copy of chunk %s is damaged, fetching it again", sha256.hex())
        self.drop_cached(sha256)
        return False

    def seal(self, work_path: str, sha256: bytes, *, durable: bool) -> None:
        """Give a work file its place among the sealed chunks, as a second name: the first goes after the commit.

        Should the commit that follows be lost, the work file is still where a row of fsync, or the next start, looks
        for it. ``durable``: fsync vouched for the work file, so the chunk is synced too.
        """
        target = self.sealed_path(sha256)
        if durable:
            with self.descriptors.borrow(work_path) as fd:
                os.fdatasync(fd)
        self.descriptors.forget(work_path)
        with self._place_lock:
            self._remove_if_dropped(sha256)
            self._moving.pop(sha256, None)
            try:
                os.link(work_path, target)
            except FileExistsError:  # of a chunk counted as lost, or that no row knows: ours is whole
                self.descriptors.forget(target)
                os.unlink(target)
                os.link(work_path, target)
        if durable:
            fsync_folder(os.path.dirname(target))
        else:
            self.mark_volatile(sha256)

    def mark_volatile(self, sha256: bytes) -> None:
        """Note that a sealed chunk was never synced: sync_chunks() will do it where somebody asks for it."""
        with self._count_lock:
            self._volatile.add(sha256)

    def unseal(self, sha256: bytes) -> None:
        """Take seal() back after a failed commit; the work file still has its own name."""
        sealed = self.sealed_path(sha256)
        self.descriptors.forget(sealed)
        os.unlink(sealed)

    def spare(self, work_path: str, sha256: bytes, size: int) -> None:
        """Free a work file whose content a pending chunk has already; after a power cut it may be the better copy."""
        sealed = self.sealed_path(sha256)
        if self._doubted_before_ns and sha256 not in self._proven:
            self.descriptors.forget(work_path)
            self.descriptors.forget(sealed)
            os.rename(work_path, sealed)
            self.mark_volatile(sha256)
            self.count(pending=-size)
        else:
            self.discard_work(work_path, size)

    def discard_work(self, path: str, size: int) -> None:
        self.descriptors.forget(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.count(pending=-size)

    def work_to_cache(self, work_path: str, sha256: bytes, size: int) -> None:
        """Keep written content that turned out to be on the node already as the chunk's cached copy."""
        self.descriptors.forget(work_path)
        self._dropped.pop(sha256, None)  # it is wanted again
        self._into_cache(work_path, sha256, size)
        self.count(pending=-size)

    def stored(self, sha256: bytes, size: int) -> None:
        """Take note that a chunk's row says 'stored': its file is to move to the cache, by settle()."""
        with self._count_lock:
            self._volatile.discard(sha256)
            self.pending_bytes -= size
            self.cached_bytes += size
            self._moving[sha256] = size

    def settle(self) -> None:
        """Remove the files of dropped chunks, and move those of stored ones from the sealed ones to the cache.

        Not in the uploader's way: done about once a second, before anything is evicted or refused for want of room,
        and after a crash by the next start.
        """
        self.remove_dropped()
        for sha256 in list(self._moving):
            sealed = self.sealed_path(sha256)
            with self._place_lock:
                size = self._moving.pop(sha256, None)
                if size is not None:  # else dropped, or sealed anew, since
                    self.descriptors.forget(sealed)
                    self._into_cache(sealed, sha256, size)
                    self.count(cached=-size)  # counted by stored() already

    def drop_chunk(self, sha256: bytes, size: int) -> None:
        """Free a chunk's files, wherever they lie: no file refers to it any more. Nobody's unlink waits for that."""
        self._dropped[sha256] = size
        self.on_dropped()

    def remove_dropped(self) -> None:
        for sha256 in list(self._dropped):
            with self._place_lock:
                self._remove_if_dropped(sha256)

    def _remove_if_dropped(self, sha256: bytes) -> None:
        """Under the place lock."""
        size = self._dropped.pop(sha256, None)
        if size is None:
            return
        sealed = self.sealed_path(sha256)
        self.descriptors.forget(sealed)
        with self._count_lock:
            self._volatile.discard(sha256)
            stored = self._moving.pop(sha256, None) is not None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(sealed)
            self.count(**{"cached" if stored else "pending": -size})
            return
        self.drop_cached(sha256)

    def keep_fetched(self, part_path: str, sha256: bytes, size: int) -> None:
        """Take a proven download into the cache, within its limit."""
        try:
            self.make_room(size)
        except CacheFull:
            self.evict(size)  # all room waits for upload: one comes, one goes
        self._into_cache(part_path, sha256, size)

    def _into_cache(self, source: str, sha256: bytes, size: int) -> None:
        target = self.cached_path(sha256)
        fresh = not os.path.exists(target)
        try:
            os.rename(source, target)
        except FileNotFoundError:
            if not os.path.exists(source):
                return  # dropped meanwhile
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)  # somebody emptied the cache folder
            os.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy_over(source, self.new_part_path(), target)
        if fresh:
            self.count(cached=size)

    def take_back(self, sha256: bytes, size: int) -> bool:
        """Move a proven cached copy to the sealed chunks: it is to be uploaded again. False where there is none."""
        self.settle()
        if os.path.exists(self.sealed_path(sha256)):
            return True
        cached = self.cached_path(sha256)
        try:
            with self.descriptors.borrow(cached, os.O_RDONLY) as fd:
                whole = digest_of(fd).sha256 == sha256
        except FileNotFoundError:
            return False
        self.descriptors.forget(cached)
        if not whole:
            self.drop_cached(sha256)
            return False
        crash_point("taken-back-before-rename")
        try:
            os.rename(cached, self.sealed_path(sha256))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy_over(cached, self.new_work_path(0, 0), self.sealed_path(sha256))
        self.mark_volatile(sha256)
        self.count(pending=size, cached=-size)
        return True

    def drop_cached(self, sha256: bytes) -> None:
        path = self.cached_path(sha256)
        self.descriptors.forget(path)
        with contextlib.suppress(FileNotFoundError):
            size = os.stat(path).st_size
            os.unlink(path)
            self.count(cached=-size)

    def sync_chunks(self, shas: Collection[bytes]) -> None:
        """Make chunk files durable, and their names: those of this session that were not yet."""
        folders = set()
        for sha256 in shas:
            if sha256 not in self._volatile:
                continue
            with contextlib.suppress(FileNotFoundError):  # stored and evicted meanwhile: the node has it
                with self.descriptors.borrow(self.sealed_path(sha256), os.O_RDONLY) as fd:
                    os.fsync(fd)
                folders.add(os.path.dirname(self.sealed_path(sha256)))
        for folder in folders:
            fsync_folder(folder)
        with self._count_lock:
            self._volatile.difference_update(shas)

    # -- eviction -------------------------------------------------------------------------------------------------

    def evict(self, size: int) -> int:
        """Free at least ``size`` bytes of stored chunks, the least recently used of random samples first.

        Returns the bytes freed. Keeps no list: a fan-out folder drawn at random holds a fair sample of all chunks,
        and a file's access time says when it was last opened here (touched by mark_used).
        """
        freed = 0
        self.settle()
        with self._evict_lock:
            self.before_eviction()
            while freed < size:
                sample = self._sample()
                if not sample:
                    break
                sample.sort()
                for _, path in sample[: max(1, len(sample) // 4)]:
                    freed += self._evict_one(path)
        return freed

    def clear(self) -> int:
        """Drop every stored chunk. Returns the bytes freed."""
        freed = 0
        self.settle()
        with self._evict_lock:
            self.before_eviction()
            for name in _FANOUT:
                freed += sum(self._evict_one(entry.path) for entry in self._chunks_in(name))
        return freed

    def mark_used(self, opened: OpenFile) -> None:
        """Note a use for the eviction's order."""
        with contextlib.suppress(OSError):
            os.utime(opened.fd)

    def _sample(self) -> list[tuple[int, str]]:
        sample: list[tuple[int, str]] = []
        for name in random.sample(_FANOUT, len(_FANOUT)):
            for entry in self._chunks_in(name):
                with contextlib.suppress(FileNotFoundError):
                    sample.append((entry.stat().st_mtime_ns, entry.path))
            if len(sample) >= _EVICT_SAMPLE:
                break
        return sample

    def _chunks_in(self, fanout: str) -> list["os.DirEntry[str]"]:
        try:
            with os.scandir(f"{self.cache_dir}/{fanout}") as entries:
                return list(entries)
        except FileNotFoundError:
            return []

    def _evict_one(self, path: str) -> int:
        self.descriptors.forget(path)
        crash_point("evict-before-unlink")
        try:
            size = os.stat(path).st_size
            os.unlink(path)
        except FileNotFoundError:
            return 0
        self.count(cached=-size)
        return size

    # -- start ----------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Count what lies in the cache from earlier, and remove unfinished downloads. Before anything is added."""
        for entry in os.scandir(self.part_dir):
            os.unlink(entry.path)
        for name in _FANOUT:
            for entry in self._chunks_in(name):
                found = entry.stat()
                self.cached_bytes += found.st_size
                self._newest_ns = max(self._newest_ns, found.st_ctime_ns)

    def sealed_chunks(self) -> Iterator[tuple[bytes, int]]:
        """(SHA-256, size) of every file among the sealed chunks."""
        for name in _FANOUT:
            with os.scandir(f"{self.sealed_dir}/{name}") as entries:
                for entry in list(entries):
                    if not _CHUNK_NAME.fullmatch(entry.name):
                        log.warning("%s is none of ours: left alone", entry.path)
                        continue
                    found = entry.stat()
                    self._newest_ns = max(self._newest_ns, found.st_ctime_ns)
                    yield bytes.fromhex(entry.name), found.st_size

    def work_files(self) -> list[str]:
        return os.listdir(self.work_dir)
