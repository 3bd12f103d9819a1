"""The kernel's structures of attributes.

A whole ``struct stat`` is written at once: setting its fields one by one costs more than the rest of a getattr.
"""

import ctypes
import struct
import time
from typing import Any

BLOCK_SIZE = 4096
"""Bytes: the st_blksize shown, by which programs choose their buffers."""

_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2  # linux/stat.h

_FIELDS = (
    "st_dev", "st_ino", "st_nlink", "st_mode", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize", "st_blocks",
    "st_atimespec", "st_mtimespec", "st_ctimespec",
)  # fmt: skip


class StatLayout:
    """The layout of this platform, after the FUSE binding's own ctypes structure. Safe to use from any thread."""

    def __init__(self, c_stat: Any) -> None:
        """``c_stat``: a ctypes.Structure class with the usual fields and its times as timespecs."""
        fields = sorted((getattr(c_stat, name) for name in _FIELDS), key=lambda field: int(field.offset))
        layout, position = "=", 0
        for field in fields:
            layout += f"{field.offset - position}x" + {4: "I", 8: "q", 16: "qq"}[field.size]
            position = field.offset + field.size
        self._struct = struct.Struct(f"{layout}{ctypes.sizeof(c_stat) - position}x")
        self._mode_first = c_stat.st_mode.offset < c_stat.st_nlink.offset  # the one difference between platforms
        self.Buffer: Any = ctypes.c_char * ctypes.sizeof(c_stat)
        """Type of what pack() writes into."""

    def pack(
        self, target: Any, number: int, mode: int, uid: int, gid: int, nlink: int, size: int, held: int, rdev: int,
        atime_ns: int, mtime_ns: int, ctime_ns: int,
    ) -> None:  # fmt: skip
        """Fill ``target`` with an inode's attributes; ``held`` (bytes) becomes st_blocks."""
        one, two = (mode, nlink) if self._mode_first else (nlink, mode)
        self._struct.pack_into(
            target, 0, 0, number, one, two, uid, gid, rdev, size, BLOCK_SIZE, -(-held // 512),
            *divmod(atime_ns, 10**9), *divmod(mtime_ns, 10**9), *divmod(ctime_ns, 10**9),
        )  # fmt: skip


def time_ns(value: Any) -> int | None:
    """A timespec of utimensat(2); None for UTIME_OMIT."""
    if value.tv_nsec == _UTIME_OMIT:
        return None
    if value.tv_nsec == _UTIME_NOW:
        return time.time_ns()
    return int(value.tv_sec) * 10**9 + int(value.tv_nsec)
