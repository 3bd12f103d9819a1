"""Where a node's objects lie: the contract every engine keeps, and the simplest engine, memory.

An object is ciphertext named by its own SHA-256, so equal names hold equal bytes: any number of nodes may share one
store without talking to each other, and a put that overwrites is never wrong, only wasteful. What an engine must
guard is that a name never shows half of its bytes.

Every implementation passes the same suite (tests/engines/test_conformance.py).
"""

import hashlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from metadiskfs.errors import ContentMismatch, ObjectMissing
from metadiskfs.node.spool import Spool, SpoolFolder

log = logging.getLogger(__name__)

PIECE = 1 << 20
"""Bytes read from an engine at a time."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What `find` and a download's file name tell of an object. Cosmetic: losing them loses no content.

    ``name`` is cleaned already ("" when unknown), ``stored_at`` is when the object first came, in unix seconds.
    """

    name: str = ""
    stored_at: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a listing. ``mtime_ns`` is when it was last put (a repeated put counts)."""

    filehash: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes. ``capacity`` is what the store can hold in all, 0 where it has no end; ``free`` goes with it."""

    capacity: int
    free: int


class StoredObject(ABC):
    """An open object. What it reads stays readable until closed, even if the object is deleted meanwhile.

    ``version`` changes whenever the bytes under the name may have changed: it keys what was proven about them.
    """

    size: int
    version: str

    @abstractmethod
    def facts(self) -> Facts: ...

    @abstractmethod
    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes ``start`` to ``stop`` (exclusive), PIECE at most at a time.

        MUST raise ContentMismatch when fewer bytes are there than promised, never end early in silence.
        """

    @abstractmethod
    def close(self) -> None:
        """May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class Engine(Protocol):
    """A store of immutable objects. All methods may be called from any thread, and by several processes at once.

    Failures of the store itself are OSError (disk) or NodeError (network).
    """

    label: str
    """What `find` calls the place: "disk", "s3", "memory"."""
    spools: SpoolFolder

    def put(self, filehash: str, content: bytes | memoryview | Spool, facts: Facts) -> bool:
        """Keep ``content`` under its name for good; True if the name is new, False if it existed.

        The caller has computed ``filehash`` from ``content`` and trusts what follows:

        - MUST NOT return before the object survives a power cut, nor show the name before all bytes are there.
        - Where the name exists, MUST make sure that the object is whole (a damaged or cut one is replaced: this
          upload may be the only chance to heal it) and MUST set its mtime to now, so that a sweep of garbage that
          looked before this put does not take it.
        - MUST NOT leave anything behind on failure. ENOSPC comes as OSError. A Spool stays the caller's to close.
        """
        ...

    def open(self, filehash: str) -> StoredObject:
        """Open an object. Raises ObjectMissing; never returns one whose name is not a filehash."""
        ...

    def delete(self, filehash: str, *, not_newer_than_ns: int) -> bool:
        """Remove the object if it was last put at or before that time (unix ns); True if it went.

        MUST NOT take an object for which a put returns after that time, however the two interleave.
        An unknown name is False.
        """
        ...

    def list(self) -> Iterator[Entry]:
        """Yield every object once, in no order. Objects put or deleted meanwhile may or may not show."""
        ...

    def usage(self) -> Usage: ...

    def close(self) -> None: ...


def prove(stored: StoredObject, filehash: str) -> None:
    """Read the whole object and compare. Raises ContentMismatch where the bytes are not what the name says."""
    digest = hashlib.sha256()
    for piece in stored.pieces(0, stored.size):
        digest.update(piece)
    if digest.hexdigest() != filehash:
        raise ContentMismatch(f"object {filehash} is damaged")


class MemoryEngine:
    """Objects in a dict: for tests, and to show what the contract asks for."""

    label = "memory"

    def __init__(self, spools: SpoolFolder) -> None:
        self.spools = spools
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, Facts, int]] = {}

    def put(self, filehash: str, content: bytes | memoryview | Spool, facts: Facts) -> bool:
        data = content.read_all() if isinstance(content, Spool) else bytes(content)
        with self._lock:
            old = self._objects.get(filehash)
            self._objects[filehash] = (data, old[1] if old else facts, time.time_ns())
        return old is None

    def open(self, filehash: str) -> StoredObject:
        with self._lock:
            found = self._objects.get(filehash)
        if found is None:
            raise ObjectMissing(f"no object {filehash}")
        return _MemoryObject(*found)

    def delete(self, filehash: str, *, not_newer_than_ns: int) -> bool:
        with self._lock:
            found = self._objects.get(filehash)
            if found is None or found[2] > not_newer_than_ns:
                return False
            del self._objects[filehash]
            return True

    def list(self) -> Iterator[Entry]:
        with self._lock:
            entries = [Entry(name, len(data), mtime) for name, (data, _, mtime) in self._objects.items()]
        yield from entries

    def usage(self) -> Usage:
        return Usage(0, 0)

    def close(self) -> None:
        self.spools.close()


class _MemoryObject(StoredObject):
    def __init__(self, data: bytes, facts: Facts, mtime_ns: int) -> None:
        self._data, self._facts = data, facts
        self.size, self.version = len(data), str(mtime_ns)

    def facts(self) -> Facts:
        return self._facts

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        for at in range(start, stop, PIECE):
            yield self._data[at : min(at + PIECE, stop)]

    def close(self) -> None:
        """Nothing is held."""
