"""Files without a name that are still open, which libfuse insists on calling something.

libfuse answers an unlink of an open file, and a rename onto one, by first renaming it to ``.fuse_hidden`` + 8 hex
digits of its own + 8 of a counter, in the same folder, and unlinks that name after the last close. Here the name is
gone at once; what libfuse calls the file is kept in this table and nowhere else.

libfuse counts a file as open a little longer than we do: our release runs before it counts down. A file hidden in
between would keep its name for ever, because nobody is left to unlink it. So a file that was closed just now is
hidden too, and whoever is hidden is held open here until libfuse unlinks it or plainly forgot to.

An unlink is committed before it returns. What is done for a rename waits for that rename's own commit: a crash
between the two would leave neither the old file nor the new one. libfuse does not say which of both it is about;
the caller's system call does, where /proc shows it, else the removal waits for a rename to come (a few ms).
"""

import os
import re
import threading
import time
from dataclasses import dataclass

from metadiskfs.fs.inode import Inode
from metadiskfs.fs.volume import Volume

_NAME = re.compile(rb"\.fuse_hidden[0-9a-f]{8}([0-9a-f]{8})")
_GRACE = 1.0
"""Seconds after which libfuse has surely counted down."""
_DISORDER = 32
"""How far libfuse's counter may be from the highest seen: callbacks come on several threads."""


_UNLINK_CALLS = {"x86_64": ("87", "263"), "aarch64": ("35",)}.get(os.uname().machine, ())
"""Numbers of unlink(2) and unlinkat(2), from the kernel's system call tables."""


@dataclass(frozen=True, slots=True)
class _Entry:
    inode: Inode
    handle: int
    since: float


class HiddenFiles:
    """Open files by the names libfuse gave them. Safe to use from any thread."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}
        self._counter = 0
        volume.on_tick.append(self._drop_forgotten)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def get(self, name: bytes) -> Inode | None:
        entry = self._entries.get(name)
        return entry.inode if entry is not None else None

    def is_hiding(self, inode: Inode, name: bytes) -> bool:
        """Whether a rename to ``name`` is libfuse's way to unlink, and not a user's wish."""
        matched = _NAME.fullmatch(name)
        if matched is None or not inode.is_regular:
            return False
        counter = int(matched[1], 16)
        if abs(counter - self._counter) > _DISORDER:
            return False  # such a file came from elsewhere
        if not inode.opens and time.monotonic() - inode.closed > _GRACE:
            return False
        self._counter = max(self._counter, counter)
        return True

    def hide(self, inode: Inode, parent: Inode, name: bytes, new_name: bytes, *, caller: int) -> None:
        """Take the name away; the file lives on under ``new_name``, for libfuse alone.

        ``caller``: the thread whose system call is being served.
        """
        handle = self._volume.open(inode, 0)
        try:
            if _is_in_unlink(caller):
                self._volume.tree.unlink(parent, name)
            else:
                self._volume.unlink_for_rename(parent, name)
        except BaseException:
            self._volume.release(handle)
            raise
        with self._lock:
            self._entries[new_name] = _Entry(inode, handle, time.monotonic())

    def drop(self, name: bytes) -> bool:
        """libfuse unlinks it: whether it was one of these."""
        with self._lock:
            entry = self._entries.pop(name, None)
        if entry is not None:
            self._volume.release(entry.handle)
        return entry is not None

    def _drop_forgotten(self) -> None:
        before = time.monotonic() - _GRACE
        for name, entry in list(self._entries.items()):
            if entry.inode.opens == 1 and max(entry.since, entry.inode.closed) < before:
                self.drop(name)


def _is_in_unlink(thread: int) -> bool:
    """Whether a thread is in unlink(2) now; False too where nothing can be seen of it (Yama, io_uring)."""
    try:
        with open(f"/proc/{thread}/syscall") as file:
            return file.read().partition(" ")[0] in _UNLINK_CALLS
    except OSError:
        return False
