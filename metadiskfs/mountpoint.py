"""The directory a volume is mounted at: its options, making it ready, detaching it."""

import errno
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

from metadiskfs.errors import MountError, UsageError

log = logging.getLogger(__name__)

_READ_AHEAD_KIB = 1024


def parse_fuse_options(texts: list[str]) -> dict[str, Any]:
    """Read ``-o a,b=c``: own ones and those of libfuse. Raises UsageError for what neither knows."""
    known = {
        "allow_other",
        "allow_root",
        "default_permissions",
        "fsname",
        "subtype",
        "dev",
        "suid",
        "nodev",
        "nosuid",
    }
    known |= {"exec", "noexec", "auto_unmount", "max_read", "context", "ro", "rw", "writeback", "noatime", "relatime"}
    options: dict[str, Any] = {}
    for part in ",".join(texts).split(","):
        name, equals, value = part.partition("=")
        if name and name not in known:
            raise UsageError(f"unknown mount option {name!r}")
        if name:
            options[name] = value if equals else True
    return options


def raise_read_ahead(device: int) -> None:
    """The kernel caps FUSE's read-ahead at 128 KiB; whoever may (root) raises it: buffered reads twice as fast."""
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        Path(path).write_text(str(_READ_AHEAD_KIB))
    except OSError as error:
        log.debug("read-ahead stays as it is: %s", error)


def prepare_mountpoint(mountpoint: Path) -> None:
    """Make a missing mountpoint; detach one that a dead mount left behind. Raises MountError."""
    try:
        if is_dead(mountpoint):
            log.warning("%s belongs to a mount that died: detaching it", mountpoint)
            detach(mountpoint, lazy=True)
        mountpoint.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise MountError(f"{mountpoint} is not a directory") from None
    except OSError as error:
        raise MountError(f"{mountpoint}: {error.strerror}") from error
    if os.path.ismount(mountpoint):
        raise MountError(f"something is mounted at {mountpoint} already")


def is_dead(mountpoint: Path) -> bool:
    """Whether a mount is there whose process has gone. stat would be answered from what the kernel remembers."""
    try:
        os.statvfs(mountpoint)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return True
    return False


def detach(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount by fusermount3, which needs no root. Raises MountError with what it says (busy, not mounted)."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        raise MountError("fusermount3 is missing: install the package fuse3") from None
    if done.returncode:
        raise MountError(done.stderr.strip() or f"fusermount3 ended with status {done.returncode}")
