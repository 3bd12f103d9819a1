"""Work files, where a slot's bytes are while they may still change, and hashing them ahead of their sealing."""

import contextlib
import queue
import threading

from metadiskfs.store.cache import Cache
from metadiskfs.store.files import Digest, digest_of


class WorkFile:
    """The mutable file of one slot, guarded by the content's lock.

    ``version`` grows before and after each change, so that a hash taken across one never passes for the present.
    """

    __slots__ = ("digest", "durable", "frozen", "length", "path", "version")

    def __init__(self, path: str) -> None:
        self.path = path
        self.length = 0
        self.version = 0
        self.frozen = False
        self.durable = False
        self.digest: tuple[int, Digest] | None = None


class Hasher:
    """Hashes work files that were written to their end, so that closing a large file has little left to do."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._queue: queue.SimpleQueue[WorkFile | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hasher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def submit(self, work: WorkFile) -> None:
        self._queue.put(work)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            with contextlib.suppress(FileNotFoundError):  # sealed or dropped meanwhile
                self.hash(work)

    def hash(self, work: WorkFile) -> Digest:
        """The digest of a work file, remembered for the version that was read."""
        known = work.digest
        if known is not None and known[0] == work.version:
            return known[1]
        version = work.version
        with self._cache.descriptors.borrow(work.path) as fd:
            digest = digest_of(fd)
        work.digest = (version, digest)
        return digest
