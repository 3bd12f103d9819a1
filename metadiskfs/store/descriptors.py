"""Open files of the store, kept open for the next access, never more than a fixed number when idle."""

import errno
import itertools
import os
import threading
from collections import OrderedDict


class OpenFile:
    """A borrowed descriptor. Valid until given back; ``with`` does that."""

    __slots__ = ("_owner", "fd", "forgotten", "path", "users")

    def __init__(self, owner: "Descriptors", path: str, fd: int) -> None:
        self._owner = owner
        self.path = path
        self.fd = fd
        self.users = 1
        self.forgotten = False

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        self._owner.give_back(self)


class Descriptors:
    """Least recently used cache of descriptors by path. Safe to use from any thread; its lock is a leaf."""

    def __init__(self, capacity: int = 256) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._open: OrderedDict[str, OpenFile] = OrderedDict()

    def borrow(self, path: str, flags: int = os.O_RDWR) -> OpenFile:
        """Open ``path`` or take its open descriptor. Raises OSError. A path is always opened with the same flags."""
        found = self.borrow_open(path)
        if found is not None:
            return found
        opened = OpenFile(self, path, self._open_now(path, flags | os.O_CLOEXEC))
        with self._lock:
            if path in self._open:  # somebody was faster: ours serves this one use
                opened.forgotten = True
                return opened
            self._open[path] = opened
            excess = self._trim(keep=self._capacity)
        for fd in excess:
            os.close(fd)
        return opened

    def borrow_open(self, path: str) -> OpenFile | None:
        """Take the open descriptor of ``path`` if there is one."""
        with self._lock:
            found = self._open.get(path)
            if found is not None:
                found.users += 1
                self._open.move_to_end(path)
            return found

    def _open_now(self, path: str, flags: int) -> int:
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        with self._lock:
            excess = self._trim(keep=0)
        for fd in excess:
            os.close(fd)
        return os.open(path, flags, 0o600)

    def give_back(self, opened: OpenFile) -> None:
        with self._lock:
            opened.users -= 1
            close = opened.forgotten and opened.users == 0
        if close:
            os.close(opened.fd)

    def forget(self, path: str) -> None:
        """Close ``path`` as soon as nobody uses it; a later borrow opens anew. Needed before a rename or unlink."""
        with self._lock:
            opened = self._open.pop(path, None)
            if opened is None:
                return
            opened.forgotten = True
            close = opened.users == 0
        if close:
            os.close(opened.fd)

    def close(self) -> None:
        with self._lock:
            paths = list(self._open)
        for path in paths:
            self.forget(path)

    def _trim(self, *, keep: int) -> list[int]:
        """Take idle files out until ``keep`` are left, the longest unused first; returns what to close."""
        surplus = len(self._open) - keep
        if surplus <= 0:
            return []
        idle = list(itertools.islice((path for path, opened in self._open.items() if not opened.users), surplus))
        taken = [self._open.pop(path) for path in idle]
        for opened in taken:
            opened.forgotten = True
        return [opened.fd for opened in taken]
