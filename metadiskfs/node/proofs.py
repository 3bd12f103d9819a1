"""Reading objects so that no byte leaves that was not proven: SHA-256 of the whole object = its name.

What is small is proven and answered from the same bytes in memory. What is large is read through once first, unless
that was done lately: a damaged object must be an error, and once an answer has begun there is no way to say so but to
cut it.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from metadiskfs.errors import ContentMismatch
from metadiskfs.node.engine import StoredObject, prove
from metadiskfs.node.sealing import IN_MEMORY, MemoryBudget

REMEMBERED = 600.0
"""Seconds a proof counts: one reader's many ranges cost one pass, a disk that rots is noticed soon enough."""
_MOST = 10_000
STREAM_FROM = 256 << 10
"""Bytes beyond which an answer goes out in pieces, and the size of these where they are cut from memory."""


class Pieces:
    """An iterator over bytes that holds something until it is closed. One thread at a time."""

    def __init__(self, pieces: Iterator[bytes], close: Callable[[], None]) -> None:
        self._pieces = pieces
        self._close: Callable[[], None] | None = close

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._pieces)

    def close(self) -> None:
        """May be called twice."""
        close, self._close = self._close, None
        if close:
            close()


class ProvenReader:
    """Opens parts of objects, proven. Any thread. ``memory``: bytes of small objects held at once."""

    def __init__(self, memory: int) -> None:
        self._budget = MemoryBudget(memory)
        self._proofs = Proofs()

    def open(self, stored: StoredObject, filehash: str, start: int, stop: int) -> Pieces:
        """Bytes ``start`` to ``stop`` of an open object, which the result's close() closes.

        Raises ContentMismatch before the first byte, and leaves the object open then.
        """
        size = stored.size
        if size <= IN_MEMORY and self._budget.take(size):
            try:
                data = b"".join(stored.pieces(0, size))
                if hashlib.sha256(data).hexdigest() != filehash:
                    raise ContentMismatch(f"object {filehash} is damaged")
            except BaseException:
                self._budget.give_back(size)
                raise
            stored.close()
            return Pieces(_cut(data, start, stop), lambda: self._budget.give_back(size))
        self._proofs.ensure(stored, filehash)
        return Pieces(stored.pieces(start, stop), stored.close)


def _cut(data: bytes, start: int, stop: int) -> Iterator[bytes]:
    for at in range(start, stop, STREAM_FROM):
        yield data[at : min(at + STREAM_FROM, stop)]


class Proofs:
    """Remembers proofs by the object's version, so that a replaced file is read again. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._proven: OrderedDict[tuple[str, str], float] = OrderedDict()

    def ensure(self, stored: StoredObject, filehash: str) -> None:
        """Read the whole object unless it was proven lately. Raises ContentMismatch."""
        identity = (filehash, stored.version)
        with self._lock:
            if time.monotonic() < self._proven.get(identity, 0.0):
                return
        prove(stored, filehash)
        with self._lock:
            self._proven[identity] = time.monotonic() + REMEMBERED
            self._proven.move_to_end(identity)
            while len(self._proven) > _MOST:
                self._proven.popitem(last=False)
