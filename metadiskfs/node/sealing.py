"""Upload bodies on their way in: plaintext arrives, ciphertext and its link leave.

The key depends on the whole content, so the plaintext must lie somewhere until its last byte has come: in memory
while it is small and there is room, else in a spool file, which is then encrypted in place: the same file becomes
the object, the plaintext is gone, and the disk holds one copy at any moment.
"""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from metadiskfs.errors import ObjectTooLarge
from metadiskfs.metadisk import wire
from metadiskfs.node.spool import Spool, SpoolFolder

IN_MEMORY = 8 << 20
"""Bytes up to which an object is handled whole: uploads without a spool file, downloads proven before the answer."""
_PIECE = 1 << 20
_READ = 256 << 10


class MemoryBudget:
    """How many bytes of bodies may lie in memory at once, over all threads. What does not fit goes to disk."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes; False, and nothing reserved, when there is no room."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


@dataclass(frozen=True, slots=True)
class Sealed:
    """Ciphertext ready to be put, and the link that opens it."""

    link: wire.Link
    content: memoryview | Spool
    size: int


class Body:
    """A content that lies in memory once: it is read into a buffer and encrypted in it. One thread's own."""

    def __init__(self, room: int) -> None:
        """``room``: bytes it may have at most."""
        self._buffer = memoryview(bytearray(room + wire.CIPHER_SLACK))
        self._room = room
        self._size = 0

    def receive(self, read: Callable[[int], bytes], limit: int) -> None:
        """Read to the end of the stream. Raises ObjectTooLarge beyond ``limit`` bytes."""
        while piece := read(_READ):
            stop = self._size + len(piece)
            if stop > min(limit, self._room):
                raise ObjectTooLarge("body too large")
            self._buffer[self._size : stop] = piece
            self._size = stop

    def seal(self) -> Sealed:
        """To be called once."""
        content = self._buffer[: self._size]
        key = wire.convergent_key(hashlib.sha256(content).digest())
        wire.cipher_stream(key).update_into(content, self._buffer)
        return Sealed(wire.Link(hashlib.sha256(content).hexdigest(), key.hex()), content, self._size)


@contextlib.contextmanager
def spooled(read: Callable[[int], bytes], spools: SpoolFolder, limit: int) -> Iterator[tuple[Spool, bytes]]:
    """Read to the end of the stream into a spool file; yields it with the key. The file is gone afterwards.

    Raises ObjectTooLarge beyond ``limit`` bytes, OSError when the disk is full.
    """
    digest = hashlib.sha256()
    with spools.create() as spool:
        while piece := read(_READ):
            if spool.size + len(piece) > limit:
                raise ObjectTooLarge("body too large")
            digest.update(piece)
            spool.append(piece)
        yield spool, wire.convergent_key(digest.digest())


def seal_spool(spool: Spool, key: bytes) -> Sealed:
    """Encrypt a spool file in place."""
    stream, digest = wire.cipher_stream(key), hashlib.sha256()
    for at in range(0, spool.size, _PIECE):
        piece = stream.update(spool.read_at(at, _PIECE))
        digest.update(piece)
        spool.write_at(at, piece)
    return Sealed(wire.Link(digest.hexdigest(), key.hex()), spool, spool.size)
