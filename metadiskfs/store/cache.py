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
import hashlib
import itertools
import logging
import os
import random
import shutil
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from metadiskfs.errors import CacheFull, ChunkDamaged
from metadiskfs.store.descriptors import Descriptors, OpenFile

log = logging.getLogger(__name__)

HASH_BUFFER = 1 << 20
_EVICT_SAMPLE = 64
_FANOUT = [f"{n:02x}" for n in range(256)]


@dataclass(frozen=True, slots=True)
class Digest:
    """SHA-256 and length, in bytes, of a file as it was read."""

    sha256: bytes
    size: int


def digest_of(fd: int, limit: int | None = None) -> Digest:
    """Hash a file (its first ``limit`` bytes). Releases the GIL while reading and hashing."""
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(min(HASH_BUFFER, limit) if limit is not None else HASH_BUFFER))
    size = 0
    while limit is None or size < limit:
        want = len(buffer) if limit is None else min(len(buffer), limit - size)
        count = os.preadv(fd, [buffer[:want]], size)
        if count == 0:
            break
        hasher.update(buffer[:count])
        size += count
    return Digest(hasher.digest(), size)


def fsync_folder(path: str | Path) -> None:
    """Make names created or removed in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_range(source: int, target: int, count: int) -> None:
    """Copy the first ``count`` bytes from one descriptor to another, in the kernel where it can."""
    done = 0
    while done < count:
        try:
            copied = os.copy_file_range(source, target, count - done, done, done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            copied = os.pwrite(target, os.pread(source, min(HASH_BUFFER, count - done), done), done)
        if copied == 0:
            return
        done += copied


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
        self._evict_lock = threading.Lock()
        self._volatile: set[bytes] = set()
        self._doubted_before_ns = 0
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
        return f"{self.work_dir}/{inode}-{slot}-{next(self._serial)}"

    def new_part_path(self) -> str:
        return f"{self.part_dir}/{os.getpid()}-{next(self._serial)}"

    # -- accounting -----------------------------------------------------------------------------------------------

    def count(self, *, pending: int = 0, cached: int = 0) -> None:
        """Record a change of what the files hold."""
        with self._count_lock:
            self.pending_bytes += pending
            self.cached_bytes += cached

    def make_room(self, size: int) -> None:
        """See to it that ``size`` more bytes stay within the limit, evicting stored chunks. Raises CacheFull."""
        if self.pending_bytes + self.cached_bytes + size <= self.limit:
            return
        if self.pending_bytes + size > self.limit:
            raise CacheFull(f"the cache limit of {self.limit} bytes is reached by data that waits for upload")
        self.evict(self.pending_bytes + self.cached_bytes + size - self.limit + self.limit // 32)

    # -- chunk files ----------------------------------------------------------------------------------------------

    def open_chunk(self, sha256: bytes) -> OpenFile | None:
        """Borrow the chunk's file, or None where it is not here. Raises ChunkDamaged when it fails its proof."""
        sealed = self.sealed_path(sha256)
        for path in (sealed, self.cached_path(sha256), sealed):
            try:
                opened = self.descriptors.borrow(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            if self._doubted_before_ns and not self._prove(sha256, opened):
                continue
            return opened
        return None

    def has_chunk(self, sha256: bytes) -> bool:
        return os.path.exists(self.sealed_path(sha256)) or os.path.exists(self.cached_path(sha256))

    def doubt_older_than(self, time_ns: int) -> None:
        """After a power cut: chunk files from before it prove themselves at their first use."""
        self._doubted_before_ns = time_ns

    def _prove(self, sha256: bytes, opened: OpenFile) -> bool:
        if sha256 in self._proven or os.fstat(opened.fd).st_ctime_ns >= self._doubted_before_ns:
            return True
        if digest_of(opened.fd).sha256 == sha256:
            self._proven.add(sha256)
            return True
        self.descriptors.give_back(opened)
        if opened.path.startswith(self.sealed_dir):
            raise ChunkDamaged(f"the only copy of chunk {sha256.hex()} is damaged, as a power cut may leave it")
        log.warning("the cached copy of chunk %s is damaged, fetching it again", sha256.hex())
        self.drop_cached(sha256)
        return False

    def seal(self, work_path: str, sha256: bytes, *, durable: bool) -> None:
        """Give a work file its place among the sealed chunks.

        ``durable``: fsync vouched for the work file, so the chunk is synced too and placed by a second name: should
        the commit that follows be lost, the work file is still where its row says.
        """
        target = self.sealed_path(sha256)
        if durable:
            with self.descriptors.borrow(work_path) as fd:
                os.fdatasync(fd)
            with contextlib.suppress(FileExistsError):
                os.link(work_path, target)
            fsync_folder(os.path.dirname(target))
            self.descriptors.forget(work_path)
            return
        self.descriptors.forget(work_path)
        os.rename(work_path, target)
        with self._count_lock:
            self._volatile.add(sha256)

    def unseal(self, sha256: bytes, work_path: str) -> None:
        """Take seal() back after a failed commit."""
        sealed = self.sealed_path(sha256)
        self.descriptors.forget(sealed)
        os.rename(sealed, work_path)
        with contextlib.suppress(FileNotFoundError):  # rename leaves two names of one file as they are
            os.unlink(sealed)

    def discard_work(self, path: str, size: int) -> None:
        self.descriptors.forget(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.count(pending=-size)

    def work_to_cache(self, work_path: str, sha256: bytes, size: int) -> None:
        """Keep written content that turned out to be on the node already as the chunk's cached copy."""
        self.descriptors.forget(work_path)
        self.count(pending=-size)
        self._into_cache(work_path, sha256, size)

    def stored(self, sha256: bytes, size: int) -> None:
        """Move a chunk from the sealed ones to the cache, its row saying 'stored' already."""
        sealed = self.sealed_path(sha256)
        with self._count_lock:
            self._volatile.discard(sha256)
        if not os.path.exists(sealed):
            return
        self.descriptors.forget(sealed)
        self._into_cache(sealed, sha256, size)
        self.count(pending=-size)

    def keep_fetched(self, part_path: str, sha256: bytes, size: int) -> None:
        """Take a proven download into the cache."""
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
            part = self.new_part_path()
            shutil.copyfile(source, part)
            os.rename(part, target)
            os.unlink(source)
        if fresh:
            self.count(cached=size)

    def take_back(self, sha256: bytes, size: int) -> bool:
        """Move a proven cached copy to the sealed chunks: it is to be uploaded again. False where there is none."""
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
        try:
            os.rename(cached, self.sealed_path(sha256))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            part = self.new_work_path(0, 0)
            shutil.copyfile(cached, part)
            os.rename(part, self.sealed_path(sha256))
            os.unlink(cached)
        self.count(pending=size, cached=-size)
        return True

    def drop_chunk(self, sha256: bytes, size: int) -> None:
        """Free a chunk's files, wherever they lie: no file refers to it any more."""
        sealed = self.sealed_path(sha256)
        self.descriptors.forget(sealed)
        with self._count_lock:
            self._volatile.discard(sha256)
        try:
            os.unlink(sealed)
            self.count(pending=-size)
        except FileNotFoundError:
            self.drop_cached(sha256)

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
        with self._evict_lock:
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
        with self._evict_lock:
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
        self.cached_bytes = sum(entry.stat().st_size for name in _FANOUT for entry in self._chunks_in(name))

    def sealed_chunks(self) -> Iterator[tuple[bytes, int]]:
        """(SHA-256, size) of every file among the sealed chunks."""
        for name in _FANOUT:
            with os.scandir(f"{self.sealed_dir}/{name}") as entries:
                for entry in list(entries):
                    yield bytes.fromhex(entry.name), entry.stat().st_size

    def work_files(self) -> list[str]:
        return os.listdir(self.work_dir)
