"""Temporary files of uploads under way: private to their process, gone with it.

Several node processes may share one folder. Each has a folder of its own inside, with a lock held as long as it
lives; whoever starts sweeps the folders whose lock is free. An flock dies with its process however that ends, so no
age and no pid has to be guessed.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

_LOCK_NAME = "lock"


@contextlib.contextmanager
def flocked(path: str | Path, mode: int) -> Iterator[None]:
    """Hold an flock on ``path`` (created 0600), opened anew: threads sharing a descriptor share its lock."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, mode)
        yield
    finally:
        os.close(fd)


class Spool:
    """One temporary file: plaintext while it comes in, ciphertext after it was sealed in place. One thread's own."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def append(self, data: bytes | memoryview) -> None:
        """Write at the end, all of it. Raises OSError (ENOSPC)."""
        self.write_at(self.size, data)
        self.size += len(data)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self.fd, view, offset)
            view, offset = view[written:], offset + written

    def read_at(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, offset)

    def read_all(self) -> bytes:
        return b"".join(self.read_at(at, 1 << 20) for at in range(0, self.size, 1 << 20))

    def close(self) -> None:
        """Forget the file; what an engine linked elsewhere stays. May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            with contextlib.suppress(FileNotFoundError):  # an engine that renames it into place leaves no name
                os.unlink(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class SpoolFolder:
    """This process's folder of temporary files under ``root``. Not to be carried through a fork."""

    def __init__(self, root: Path) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One at a time: between making a folder and locking it, a sweep would take it for a dead one's.
        with flocked(root / _LOCK_NAME, fcntl.LOCK_EX):
            _sweep(root)
            self.path = Path(tempfile.mkdtemp(prefix="p", dir=root))
            self._lock_fd = os.open(self.path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        self._prefix = f"{self.path}/"
        self._names = iter(range(1 << 62))

    def create(self) -> Spool:
        """A new empty file. Any thread. Raises OSError."""
        return Spool(f"{self._prefix}{next(self._names)}")

    def close(self) -> None:
        """Remove the folder with all that is left in it. May be called twice."""
        if self._lock_fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = -1


def _sweep(root: Path) -> None:
    """Remove what dead processes left. Called with the root's lock held."""
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        fd = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its process lives
        else:
            left = len(os.listdir(folder)) - 1
            shutil.rmtree(folder)
            log.info("swept %d temporary files of a process that ended without cleaning up", left)
        finally:
            os.close(fd)
