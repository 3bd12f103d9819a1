"""What is done with whole files: hash, copy, move over, make durable. Nothing here knows what they hold."""

import contextlib
import errno
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Digest:
    """SHA-256 and length, in bytes, of a file as it was read."""

    sha256: bytes
    size: int


def digest_of(fd: int) -> Digest:
    """Hash a file. Releases the GIL while reading and hashing."""
    hasher = hashlib.sha256()
    expected = os.fstat(fd).st_size  # a buffer of the full size for a small file would cost more than its hash
    buffer = memoryview(bytearray(min(_BUFFER, expected + 1)))
    size = 0
    while count := os.preadv(fd, [buffer], size):
        hasher.update(buffer[:count])
        size += count
    return Digest(hasher.digest(), size)


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from ``offset`` (bytes) on; returns the count, less than its length at the file's end."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


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
            copied = os.pwrite(target, os.pread(source, min(_BUFFER, count - done), done), done)
        if copied == 0:
            return
        done += copied


def copy_over(source: str, part: str, target: str) -> None:
    """Move a file to another file system: it gets its name when it is whole."""
    try:
        shutil.copyfile(source, part)
        os.rename(part, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
    os.unlink(source)
