"""Is every chunk where the index says? Asks the node for each, and heals what is lost from copies on this machine."""

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from metadiskfs.errors import ContentMismatch, ObjectMissing
from metadiskfs.store.chunks import CHUNK_COLUMNS, ChunkRow, chunk_row
from metadiskfs.store.index import translated
from metadiskfs.store.schema import LOST, PENDING

log = logging.getLogger(__name__)

_BATCH = 256


@dataclass(frozen=True, slots=True)
class ChunkProblem:
    """What is the matter with a chunk.

    ``kind``: 'missing' (the node has no such object), 'wrong' (it has other bytes), 'unsent' (waits for upload and
    its file is gone), or 'found': counted as lost, and there after all.
    """

    chunk: ChunkRow
    kind: str


Prove = Callable[[ChunkRow], None]
"""Asks the node for one chunk; raises ObjectMissing or ContentMismatch where it is not there as it should be."""


class ChunkCheck:
    """Goes through all chunks in the order of their ids, several at once; can be stopped and taken up again."""

    def __init__(self, db: sqlite3.Connection, prove: Prove, has_file: Callable[[bytes], bool], memory: Path) -> None:
        """``memory``: the file that remembers how far it came; removed when it is through."""
        self._db = db
        self._prove = prove
        self._has_file = has_file
        self._memory = memory
        with translated():
            self.total: int = db.execute("SELECT count(*) FROM chunk WHERE dead IS NULL").fetchone()[0]
        self.done = 0

    def run(self, *, threads: int = 8, resume: bool = True) -> Iterator[ChunkProblem | None]:
        """Yield a problem, or None for a chunk that is well. Raises NodeError where the node cannot be asked."""
        last = self._resumed() if resume else 0
        with ThreadPoolExecutor(threads) as pool:
            while batch := self._after(last):
                for problem in pool.map(self._check, batch):
                    self.done += 1
                    yield problem
                last = batch[-1].id
                self._memory.write_text(json.dumps({"after": last, "done": self.done}))
        self._memory.unlink(missing_ok=True)

    def _resumed(self) -> int:
        try:
            known = json.loads(self._memory.read_text())
            self.done = int(known["done"])
            return int(known["after"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _after(self, last: int) -> list[ChunkRow]:
        with translated():
            rows = self._db.execute(
                f"SELECT {CHUNK_COLUMNS} FROM chunk WHERE id > ? AND dead IS NULL ORDER BY id LIMIT ?", (last, _BATCH)
            )
            return [chunk_row(row) for row in rows]

    def _check(self, chunk: ChunkRow) -> ChunkProblem | None:
        if chunk.state == PENDING:
            return None if self._has_file(chunk.sha256) else ChunkProblem(chunk, "unsent")
        if not chunk.filehash:
            return ChunkProblem(chunk, "missing")
        try:
            self._prove(chunk)
        except ObjectMissing:
            return ChunkProblem(chunk, "missing")
        except ContentMismatch:
            return ChunkProblem(chunk, "wrong")
        return ChunkProblem(chunk, "found") if chunk.state == LOST else None


def files_with(db: sqlite3.Connection, chunk: int) -> list[int]:
    """The inodes that need a chunk."""
    with translated():
        rows = db.execute(
            "SELECT inode FROM slot WHERE chunk = ?1 UNION SELECT inode FROM pin WHERE chunk = ?1", (chunk,)
        )
        return [row[0] for row in rows]
