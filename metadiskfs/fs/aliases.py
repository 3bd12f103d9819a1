"""Files with several names, as the kernel sees them: each name is an inode of its own there, with its own cache.

Whoever changes such a file through one name must tell the kernel to forget what it keeps under the others
(``fuse_invalidate_path``). That waits for pages which a request under way has locked: two writers through two names
would wait for each other for ever, each in the middle of its own request. So it is done on threads of its own, and a
request waits for them only for a moment: long enough that whoever looks after the request sees the change, unless a
writer or a reader is busy with the other name at that very time; then that is told as soon as it is done.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

_PATIENCE = 0.05
"""Seconds a request waits for the kernel to forget."""
_THREADS = 4


class Aliases:
    """Paths under which the kernel may know a file with several names. Safe to use from any thread."""

    def __init__(self, invalidate: Callable[[bytes], None]) -> None:
        self._invalidate = invalidate
        self._lock = threading.Lock()
        self._paths: dict[int, set[bytes]] = {}
        self._numbers: dict[bytes, int] = {}
        self._pool = ThreadPoolExecutor(_THREADS, "invalidation")

    def __bool__(self) -> bool:
        return bool(self._paths)

    def stop(self) -> None:
        """Before the kernel's connection goes."""
        self._pool.shutdown(cancel_futures=True)

    def add(self, number: int, path: bytes) -> None:
        if self._numbers.get(path) == number:
            return
        with self._lock:
            self._drop(path)
            self._numbers[path] = number
            self._paths.setdefault(number, set()).add(path)

    def discard(self, path: bytes) -> None:
        """The name is gone."""
        with self._lock:
            self._drop(path)

    def _drop(self, path: bytes) -> None:
        number = self._numbers.pop(path, None)
        if number is not None:
            self._paths[number].discard(path)
            if not self._paths[number]:
                del self._paths[number]

    def changed(self, number: int, path: bytes | None, *, is_open: bool) -> None:
        """An inode changed through ``path``: let the kernel forget what it keeps under the inode's other names.

        ``is_open``: somebody has it open, so a request under way may hold its pages. Otherwise it is told at once.
        """
        if number not in self._paths:
            return
        with self._lock:
            others = [other for other in self._paths.get(number, ()) if other != path]
        if not is_open:
            for other in others:
                self._invalidate(other)
        elif others:
            wait([self._pool.submit(self._invalidate, other) for other in others], timeout=_PATIENCE)

    def renamed(self, old: bytes, new: bytes, *, folder: bool) -> None:
        """Follow a name, or with ``folder`` all names below it."""
        if not self._numbers:
            return
        with self._lock:
            self._drop(new)
            below = old + b"/"
            moved = [path for path in self._numbers if path.startswith(below)] if folder else [old]
            for path in moved:
                number = self._numbers.get(path)
                if number is not None:
                    self._paths[number].discard(path)
                    del self._numbers[path]
                    self._numbers[new + path[len(old) :]] = number
                    self._paths[number].add(new + path[len(old) :])

    def exchanged(self, one: bytes, two: bytes) -> None:
        """Follow two names that were exchanged, and all below them."""
        parked = one + b"/\0"
        for old, new in ((two, parked), (one, two), (parked, one)):
            self.renamed(old, new, folder=True)
            self.renamed(old, new, folder=False)
