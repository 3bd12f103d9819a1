"""Who owns a volume: one process at a time."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from metadiskfs.errors import VolumeBusy


@contextlib.contextmanager
def volume_lock(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Own the volume as long as this lasts, waiting up to ``wait`` seconds. Raises VolumeBusy.

    flock, because it stays with the open file: fcntl locks would vanish with any other descriptor that closes.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + wait
        while not _try_lock(fd):
            if time.monotonic() >= until:
                raise VolumeBusy(f"the volume {folder.name!r} is mounted already, or still being unmounted")
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
