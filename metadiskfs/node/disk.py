"""The engine for one machine's disk: a folder of files, each named by the SHA-256 of its bytes.

::

    STORE/objects/ab/abcd...      one object, 0600; its mtime is its last put; nothing but ciphertext inside
    STORE/tmp/                    uploads under way (spool.py)
    STORE/lock                    shared by every put while it decides, exclusive for every delete

The bytes of a file are exactly the object: `sha256sum` checks it, `rsync` copies it to another store. The facts for
`find` lie in an extended attribute, because it costs no second inode and no further fsync; a copy made without
attributes, or a file system that has none, loses the display name and nothing else.

A new object costs two fsyncs: the file before it gets its name, the folder before the put returns.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from metadiskfs.errors import ContentMismatch, ObjectMissing
from metadiskfs.metadisk import wire
from metadiskfs.node.engine import PIECE, Entry, Facts, StoredObject, Usage
from metadiskfs.node.spool import Spool, SpoolFolder, flocked

log = logging.getLogger(__name__)

_FACTS = "user.metadisk"  # "<unix seconds> <name>": short enough to lie in the inode on ext4
_FIRST_PIECE = 128 << 10
"""Bytes of an answer read before the first go out: somebody waits for these."""
_KEPT_IN_MEMORY = 256 << 10
"""Bytes of a new object that the page cache may keep. Who sent a large one has it; the next takes its pages, which
are warm, where fresh ones of a virtual machine cost ten times the copy (docs/PERFORMANCE.md)."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # FAT, some network file systems
_NO_ATTRIBUTES = (errno.ENOTSUP, errno.ENOSPC, errno.E2BIG)


class DiskEngine:
    """See Engine for the obligations. Several processes may work on one store. Raises OSError."""

    label = "disk"

    def __init__(self, root: Path) -> None:
        _make_folders(root / "objects")
        # Plain strings from here on: joining Paths took a tenth of a small upload.
        self._objects = str(root / "objects")
        self._lock_path = str(root / "lock")
        self.spools = SpoolFolder(root / "tmp")

    def put(self, filehash: str, content: bytes | memoryview | Spool, facts: Facts) -> bool:
        path = self._path(filehash)
        if self._touch(path) and self._is_whole(path, filehash):
            _fsync_folder(path)  # another process may have linked it a moment ago and not have come so far
            return False
        if isinstance(content, Spool):
            return self._place(content, path, facts)
        with self.spools.create() as spool:
            spool.append(content)
            return self._place(spool, path, facts)

    def open(self, filehash: str) -> StoredObject:
        try:
            return _DiskObject(self._path(filehash))
        except FileNotFoundError as error:
            raise ObjectMissing(f"no object {filehash}") from error

    def delete(self, filehash: str, *, not_newer_than_ns: int) -> bool:
        path = self._path(filehash)
        with flocked(self._lock_path, fcntl.LOCK_EX):
            try:
                if os.stat(path).st_mtime_ns > not_newer_than_ns:
                    return False
                os.unlink(path)
            except FileNotFoundError:
                return False
        return True

    def list(self) -> Iterator[Entry]:
        for folder in sorted(os.listdir(self._objects)):
            with os.scandir(f"{self._objects}/{folder}") as items:
                for item in items:
                    if wire.is_filehash(item.name):
                        with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                            status = item.stat(follow_symlinks=False)
                            yield Entry(item.name, status.st_size, status.st_mtime_ns)

    def usage(self) -> Usage:
        """Of the whole file system, as a user without privileges may fill it."""
        status = os.statvfs(self._objects)
        free = status.f_bavail * status.f_frsize
        return Usage((status.f_blocks - status.f_bfree) * status.f_frsize + free, free)

    def close(self) -> None:
        self.spools.close()

    def _path(self, filehash: str) -> str:
        if not wire.is_filehash(filehash):  # the last wall before the file system: no other name becomes a path
            raise ObjectMissing("not a filehash")
        return f"{self._objects}/{filehash[:2]}/{filehash}"

    def _touch(self, path: str) -> bool:
        """Renew the mtime of an existing object, so that a sweep that looked before leaves it alone."""
        if not os.path.exists(path):
            return False
        with flocked(self._lock_path, fcntl.LOCK_SH):
            return _renew(path)

    def _is_whole(self, path: str, filehash: str) -> bool:
        """Read it through: an upload of content that was lost to a bad disk is the cheapest moment to heal it.

        That costs less than the two hashes the upload has cost already, at any size.
        """
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == filehash:
                return True
        log.warning("object %s is damaged; this upload replaces it", filehash)
        return False

    def _place(self, spool: Spool, path: str, facts: Facts) -> bool:
        """Give the finished file its name. Whatever stands there already is not whole, or came this moment."""
        _write_facts(spool.fd, facts)
        os.fsync(spool.fd)
        if spool.size > _KEPT_IN_MEMORY:
            os.posix_fadvise(spool.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with flocked(self._lock_path, fcntl.LOCK_SH):
            _renew(spool.fd)  # writing and syncing took time; a sweep compares with the moment of the name
            try:
                os.link(spool.path, path)
                new = True
            except FileExistsError:
                os.rename(spool.path, path)
                new = False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                os.rename(spool.path, path)  # atomic as well, it only cannot tell whether someone was first
                new = True
        _fsync_folder(path)
        return new


class _DiskObject(StoredObject):
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        status = os.fstat(self._fd)
        self.size = status.st_size
        self.version = f"{status.st_ino}.{status.st_mtime_ns}.{status.st_ctime_ns}"
        self._mtime_ns = status.st_mtime_ns

    def facts(self) -> Facts:
        try:
            seconds, _, name = os.getxattr(self._fd, _FACTS).decode("ascii").partition(" ")
            return Facts(name, int(seconds))
        except (OSError, ValueError):
            return Facts("", self._mtime_ns // 10**9)

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        size = _FIRST_PIECE
        while start < stop:
            piece = os.pread(self._fd, min(size, stop - start), start)
            if not piece:
                raise ContentMismatch(f"an object ends {stop - start} bytes early")
            yield piece
            start += len(piece)
            size = PIECE

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _make_folders(objects: Path) -> None:
    """Make the fan-out at start, not at a put: a folder made by one put and not yet synced would carry another's."""
    for folder in (objects, *(objects / f"{number:02x}" for number in range(256))):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _fsync_folder(str(objects / "-"))


def _renew(path: str | int) -> bool:
    now = time.time_ns()  # not utime's own "now": the kernel's coarse clock lags by a few milliseconds
    try:
        os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


def _write_facts(fd: int, facts: Facts) -> None:
    try:
        os.setxattr(fd, _FACTS, f"{facts.stored_at} {facts.name}".encode("ascii"))
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        log.debug("this file system keeps no facts: %s", error)


def _fsync_folder(path: str) -> None:
    """Make the name at ``path`` durable."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
