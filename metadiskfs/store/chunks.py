"""Every SQL statement about chunks, the slots that refer to them, and the upload queue.

Rows and files stay in step because whatever changes both does so under ``Index.lock``: a chunk file takes its name
just before the row that vouches for it is committed, and is removed just after its row is gone.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadiskfs.crash import crash_point
from metadiskfs.errors import ChunkDamaged
from metadiskfs.store.cache import Cache
from metadiskfs.store.files import Digest
from metadiskfs.store.index import Index, read_only, translated
from metadiskfs.store.schema import LOST, PENDING, STORED

_FEW = 500
"""Values bound in one statement."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot of a file holds: the first ``length`` bytes of a chunk."""

    chunk: int
    sha256: bytes
    size: int
    length: int


@dataclass(frozen=True, slots=True)
class SealedWork:
    """A work file whose content is settled and known. ``durable``: an index row of fsync points to it."""

    path: str
    digest: Digest
    durable: bool


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """What the index knows about one chunk. ``blocks``: concatenated block digests, or b""."""

    id: int
    sha256: bytes
    size: int
    state: int
    filehash: str
    key: str
    counter_start: int
    blocks: bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a proven upload returned for a chunk."""

    chunk: int
    filehash: bytes
    key: bytes
    counter_start: int
    blocks: bytes


@dataclass(frozen=True, slots=True)
class ContentChange:
    """How a file's content changed, to be committed in one transaction.

    Rows of slots from ``removed_from`` on (None: none) go first; then ``slots`` are written (None: a hole), and
    ``sealed`` becomes chunks of their slots. ``work`` are work files that fsync made durable: slot -> (name, length).
    """

    inode: int
    size: int
    held: int
    mtime_ns: int
    ctime_ns: int
    removed_from: int | None
    slots: Mapping[int, Slot | None]
    sealed: Mapping[int, SealedWork]
    work: Mapping[int, tuple[str, int]]


class Chunks:
    """The chunk side of a volume's index. Safe to use from any thread."""

    def __init__(self, index: Index, cache: Cache) -> None:
        self._index = index
        self._cache = cache
        self.generation: int = index.meta("generation")
        self.on_revived: Callable[[int], None] = lambda _chunk: None
        """Told of a lost chunk that waits for upload again, its number not being a new one."""
        with index.lock, translated():
            last = index.db.execute("SELECT coalesce(max(id), 0) FROM chunk").fetchone()[0]
        self._numbers = itertools.count(last + 1)
        """Never the same twice in a session, as SQLite's own would be after a delete: the queue goes by them."""

    def small_files_after(self, folder: int, name: bytes, limit: int) -> list[tuple[bytes, int]]:
        """(name, chunk) of the next files behind ``name`` in a folder that consist of one stored chunk."""
        with self._index.lock, translated():
            rows: list[tuple[bytes, int]] = self._index.db.execute(
                "SELECT name.name, slot.chunk FROM name JOIN inode ON inode.id = name.inode"
                " JOIN slot ON slot.inode = name.inode AND slot.slot = 0"
                " JOIN chunk ON chunk.id = slot.chunk AND chunk.state = 1"
                " WHERE name.parent = ? AND name.name > ? AND inode.size <= ? ORDER BY name.name LIMIT ?",
                (folder, name, self._index.chunk_size, limit),
            ).fetchall()
        return rows

    # -- content of files -----------------------------------------------------------------------------------------

    def slots_of(self, inode: int) -> dict[int, Slot]:
        with self._index.lock, translated():
            rows = self._index.db.execute(
                "SELECT slot.slot, slot.chunk, chunk.sha256, chunk.size, slot.length"
                " FROM slot LEFT JOIN chunk ON chunk.id = slot.chunk WHERE slot.inode = ?",
                (inode,),
            )
            slots = {slot: Slot(chunk, sha256, size, length) for slot, chunk, sha256, size, length in rows}
        if any(slot.sha256 is None for slot in slots.values()):  # not to be taken for a hole
            raise ChunkDamaged(f"inode {inode} refers to a chunk the index does not have: run metadiskfs verify")
        return slots

    def commit(self, change: ContentChange, *, durable: bool = False) -> dict[int, Slot]:
        """Make a change of content visible and permanent, all of it or nothing. Returns the slots sealed by it.

        Raises CacheFull or VolumeError, with every work file back in its place.
        """
        sealed: dict[int, Slot] = {}
        with self._index.transaction(durable=durable) as db:
            released = self._release_rows(change)
            for slot, work in change.sealed.items():
                sealed[slot] = self._adopt(work)
                crash_point("placed-before-row")
            rows = [(change.inode, n, s.chunk, s.length) for n, s in change.slots.items() if s is not None]
            rows += [(change.inode, n, s.chunk, s.length) for n, s in sealed.items()]
            db.executemany("INSERT OR REPLACE INTO slot VALUES (?, ?, ?, ?)", rows)
            db.executemany(
                "INSERT OR REPLACE INTO work VALUES (?, ?, ?, ?)",
                [(change.inode, slot, name, length) for slot, (name, length) in change.work.items()],
            )
            db.execute(
                "UPDATE inode SET size = ?, held = ?, mtime_ns = ?, ctime_ns = ? WHERE id = ?",
                (change.size, change.held, change.mtime_ns, change.ctime_ns, change.inode),
            )
            self._drop_unreferenced(released)
            crash_point("content-before-commit")
        crash_point("content-after-commit")
        return sealed

    def _release_rows(self, change: ContentChange) -> list[int]:
        """Delete the rows the change replaces; return the chunks they referred to."""
        db, inode = self._index.db, change.inode
        released: list[int] = []
        if change.removed_from is not None:
            where = (inode, change.removed_from)
            released += _column(db.execute("SELECT chunk FROM slot WHERE inode = ? AND slot >= ?", where))
            db.execute("DELETE FROM slot WHERE inode = ? AND slot >= ?", where)
            db.execute("DELETE FROM work WHERE inode = ? AND slot >= ?", where)
        for slot in (*change.slots, *change.sealed):
            released += _column(db.execute("SELECT chunk FROM slot WHERE inode = ? AND slot = ?", (inode, slot)))
            db.execute("DELETE FROM work WHERE inode = ? AND slot = ?", (inode, slot))
        for slot, piece in change.slots.items():
            if piece is None:
                db.execute("DELETE FROM slot WHERE inode = ? AND slot = ?", (inode, slot))
        return released

    def _adopt(self, work: SealedWork) -> Slot:
        """Turn a work file into a chunk, or into a reference to the one that has the same content already."""
        db, cache, digest = self._index.db, self._cache, work.digest
        row = db.execute("SELECT id, state FROM chunk WHERE sha256 = ?", (digest.sha256,)).fetchone()
        if row is None:
            self._seal_file(work)
            chunk = next(self._numbers)
            db.execute(
                "INSERT INTO chunk (id, sha256, size, state, created_ns, born) VALUES (?, ?, ?, ?, ?, ?)",
                (chunk, digest.sha256, digest.size, PENDING, time.time_ns(), self.generation),
            )
        else:
            chunk, state = row
            if state == LOST:  # the next write of the same content heals it
                self._seal_file(work)
                db.execute("UPDATE chunk SET state = ?, dead = NULL WHERE id = ?", (PENDING, chunk))
                self._index.on_commit(lambda: self.on_revived(chunk))
            elif state == STORED:
                db.execute("UPDATE chunk SET dead = NULL WHERE id = ?", (chunk,))
                self._index.on_commit(lambda: cache.work_to_cache(work.path, digest.sha256, digest.size))
            else:
                if work.durable:  # what fsync vouched for rests on that chunk's file from now on
                    cache.sync_chunks([digest.sha256])
                self._index.on_commit(lambda: cache.spare(work.path, digest.sha256, digest.size))
        return Slot(chunk, digest.sha256, digest.size, digest.size)

    def _seal_file(self, work: SealedWork) -> None:
        cache, sha256 = self._cache, work.digest.sha256
        cache.seal(work.path, sha256, durable=work.durable)
        self._index.on_rollback(lambda: cache.unseal(sha256))
        self._index.on_commit(lambda: cache.discard_work(work.path, 0))

    def pin(self, inode: int, work: SealedWork) -> int:
        """Keep content for an inode that no slot of it refers to. Returns the chunk."""
        with self._index.transaction() as db:
            slot = self._adopt(work)
            db.execute("INSERT OR IGNORE INTO pin VALUES (?, ?)", (inode, slot.chunk))
        return slot.chunk

    def pin_slots(self, source: int, first: int, last: int, owner: int) -> tuple[dict[int, Slot], list[int]]:
        """Read slots ``first`` to ``last`` of a file and pin their chunks for another inode, in one step.

        Returns the slots and the chunks to unpin() once something else of the owner refers to them.
        """
        with self._index.transaction() as db:
            held = {slot: piece for slot, piece in self.slots_of(source).items() if first <= slot < last}
            pinned = [
                chunk
                for chunk in {piece.chunk for piece in held.values()}
                if db.execute("INSERT OR IGNORE INTO pin VALUES (?, ?)", (owner, chunk)).rowcount
            ]
        return held, pinned

    def unpin(self, owner: int, chunks: Sequence[int]) -> None:
        with self._index.transaction() as db:
            db.executemany("DELETE FROM pin WHERE inode = ? AND chunk = ?", [(owner, chunk) for chunk in chunks])
            self._drop_unreferenced(chunks)

    def forget_inode(self, inode: int) -> None:
        """Delete an inode with all that belongs to it, and the chunks nothing else refers to."""
        with self._index.transaction() as db:
            released = _column(
                db.execute(
                    "SELECT chunk FROM slot WHERE inode = ?1 UNION SELECT chunk FROM pin WHERE inode = ?1", (inode,)
                )
            )
            for table in ("slot", "pin", "work", "xattr"):
                if table != "slot" or released:
                    db.execute(f"DELETE FROM {table} WHERE inode = ?", (inode,))
            db.execute("DELETE FROM inode WHERE id = ?", (inode,))
            self._drop_unreferenced(released)

    def _drop_unreferenced(self, chunks: Iterable[int]) -> None:
        db, cache = self._index.db, self._cache
        for chunk in set(chunks):
            row = db.execute(
                "SELECT sha256, size, state FROM chunk WHERE id = ?1"
                " AND NOT EXISTS (SELECT 1 FROM slot WHERE chunk = ?1)"
                " AND NOT EXISTS (SELECT 1 FROM pin WHERE chunk = ?1)",
                (chunk,),
            ).fetchone()
            if row is None:
                continue
            sha256, size, state = row
            if state == STORED:
                db.execute("UPDATE chunk SET dead = ? WHERE id = ?", (self.generation, chunk))
            else:
                db.execute("DELETE FROM chunk WHERE id = ?", (chunk,))
            self._index.on_commit(functools.partial(cache.drop_chunk, sha256, size))

    def states_of(self, inode: int) -> set[int]:
        """The states of all chunks a file consists of."""
        with self._index.lock, translated():
            return set(
                _column(
                    self._index.db.execute(
                        "SELECT DISTINCT state FROM slot JOIN chunk ON chunk.id = slot.chunk WHERE slot.inode = ?",
                        (inode,),
                    )
                )
            )

    # -- single chunks --------------------------------------------------------------------------------------------

    def chunk(self, number: int) -> ChunkRow | None:
        with self._index.lock, translated():
            row = self._index.db.execute(f"SELECT {CHUNK_COLUMNS} FROM chunk WHERE id = ?", (number,)).fetchone()
        return chunk_row(row) if row else None

    def chunk_of_content(self, sha256: bytes) -> ChunkRow | None:
        with self._index.lock, translated():
            row = self._index.db.execute(f"SELECT {CHUNK_COLUMNS} FROM chunk WHERE sha256 = ?", (sha256,)).fetchone()
        return chunk_row(row) if row else None

    def usual_counter_start(self) -> int:
        """Where this volume's node lets the counter start, as far as receipts told (see wire.py)."""
        with self._index.lock, translated():
            row = self._index.db.execute(
                "SELECT counter_start FROM chunk WHERE counter_start IS NOT NULL ORDER BY id DESC LIMIT 1"
            ).fetchone()
        return row[0] if row else 0

    def mark_lost(self, chunk: int) -> None:
        """The node says it has no such object, and neither has this machine."""
        with self._index.transaction() as db:
            db.execute("UPDATE chunk SET state = ? WHERE id = ?", (LOST, chunk))

    def mark_pending(self, chunk: int) -> None:
        """Its bytes turned up on this machine: upload them again."""
        with self._index.transaction() as db:
            db.execute("UPDATE chunk SET state = ? WHERE id = ?", (PENDING, chunk))

    def mark_found(self, chunk: int) -> None:
        """A lost chunk's object was fetched and proven after all."""
        with self._index.transaction() as db:
            db.execute("UPDATE chunk SET state = ? WHERE id = ? AND state = ?", (STORED, chunk, LOST))

    # -- the upload queue -----------------------------------------------------------------------------------------

    def pending_after(self, chunk: int, limit: int) -> list[tuple[int, bytes, int]]:
        """The next (id, SHA-256, size) of the queue, in the order in which they were sealed."""
        with self._index.lock, translated():
            rows: list[tuple[int, bytes, int]] = self._index.db.execute(
                "SELECT id, sha256, size FROM chunk WHERE state = 0 AND id > ? ORDER BY id LIMIT ?", (chunk, limit)
            ).fetchall()
        return rows

    def pending_of(self, chunk: int) -> tuple[int, bytes, int] | None:
        """The queue's entry for one chunk, None when it is stored, lost or dropped."""
        with self._index.lock, translated():
            row: tuple[int, bytes, int] | None = self._index.db.execute(
                "SELECT id, sha256, size FROM chunk WHERE state = 0 AND id = ?", (chunk,)
            ).fetchone()
        return row

    def mark_stored(self, receipts: Sequence[Receipt]) -> None:
        """Record proven receipts in one transaction; chunks dropped or stored meanwhile are passed over.

        The chunk files then move to the cache, outside the lock: a reader that misses one looks twice.
        """
        moved: list[tuple[bytes, int]] = []
        with self._index.transaction() as db:
            for receipt in receipts:
                row = db.execute(
                    "UPDATE chunk SET state = 1, filehash = ?, key = ?, counter_start = ?, blocks = ?"
                    " WHERE id = ? AND state != 1 RETURNING sha256, size",
                    (receipt.filehash, receipt.key, receipt.counter_start, receipt.blocks or None, receipt.chunk),
                ).fetchone()
                if row is not None:
                    moved.append(row)
            crash_point("stored-before-row")
        crash_point("stored-before-move")
        for sha256, size in moved:
            self._cache.stored(sha256, size)

    def totals(self) -> dict[str, int]:
        """Chunks and bytes by state: pending_chunks, pending_bytes, stored_..., lost_..., left_behind_... .

        Reads the whole table, on a connection of its own: nobody waits for it.
        """
        with translated(), contextlib.closing(self._index.connect(cache_kib=256)) as db:
            rows = db.execute(
                "SELECT iif(dead IS NULL, state, -1), count(*), total(size) FROM chunk GROUP BY 1"
            ).fetchall()
        found = {state: (count, int(size)) for state, count, size in rows}
        totals = {}
        for state, word in ((PENDING, "pending"), (STORED, "stored"), (LOST, "lost"), (-1, "left_behind")):
            totals[f"{word}_chunks"], totals[f"{word}_bytes"] = found.get(state, (0, 0))
        return totals

    def pending_total(self) -> tuple[int, int]:
        """(chunks, bytes) that wait for upload; cheap."""
        with self._index.lock, translated():
            row = self._index.db.execute("SELECT count(*), total(size) FROM chunk WHERE state = 0").fetchone()
        return row[0], int(row[1])

    # -- work files made durable by fsync -------------------------------------------------------------------------

    def durable_work(self) -> list[tuple[int, int, str, int]]:
        """(inode, slot, file name, length) of every work file a crashed session vouched for."""
        with self._index.lock, translated():
            return self._index.db.execute("SELECT inode, slot, file, length FROM work").fetchall()

    def forget_work(self, inode: int, slot: int) -> None:
        """Delete the row of a work file that is not there: its name may be given to another."""
        with self._index.transaction() as db:
            db.execute("DELETE FROM work WHERE inode = ? AND slot = ?", (inode, slot))

    def heal(self, chunk: int, *, found: bool = False) -> str:
        """Settle a chunk its node does not have: upload it again from a copy here, else count it as lost.

        ``found``: the node has it after all. Returns the state it is in then: 'pending', 'stored' or 'lost'.
        """
        with self._index.transaction() as db:
            row = self.require(chunk)
            if found:
                db.execute("UPDATE chunk SET state = ? WHERE id = ?", (STORED, chunk))
                return "stored"
            if self._cache.take_back(row.sha256, row.size):
                crash_point("taken-back-before-row")
                db.execute("UPDATE chunk SET state = ? WHERE id = ?", (PENDING, chunk))
                return "pending"
            db.execute("UPDATE chunk SET state = ? WHERE id = ?", (LOST, chunk))
            return "lost"

    def has_dropped(self) -> bool:
        """Whether any stored content is not needed any more."""
        with self._index.lock, translated():
            return self._index.db.execute("SELECT 1 FROM chunk WHERE dead IS NOT NULL").fetchone() is not None

    def require(self, number: int) -> ChunkRow:
        """The chunk's row. Raises ChunkDamaged where a slot refers to a chunk the index does not have."""
        row = self.chunk(number)
        if row is None:
            raise ChunkDamaged(f"chunk {number} is not in the index")
        return row


def objects_needed(path: Path, needed: set[bytes]) -> tuple[str, int]:
    """Add the filehash of every object an index needs, its kept backups included, to ``needed``.

    Returns the volume's uuid and when its oldest pending chunk was sealed (ns; now where there is none).
    """
    with contextlib.closing(read_only(path)) as db, translated():
        db.execute("BEGIN")
        needed.update(row[0] for row in db.execute("SELECT filehash FROM chunk WHERE filehash IS NOT NULL"))
        needed.update(row[0] for row in db.execute("SELECT filehash FROM backup_object"))
        oldest = db.execute("SELECT min(created_ns) FROM chunk WHERE state = 0").fetchone()[0]
        uuid = db.execute("SELECT value FROM meta WHERE key = 'uuid'").fetchone()[0]
    return str(uuid), time.time_ns() if oldest is None else int(oldest)


def purge_dead(index: Index) -> int:
    """Forget dropped chunks that no kept backup holds; returns how many. Their objects are then garbage."""
    with index.transaction(counted=False) as db:
        return db.execute(
            "DELETE FROM chunk WHERE dead IS NOT NULL AND NOT EXISTS"
            " (SELECT 1 FROM backup WHERE chunk.born <= backup.generation AND backup.generation < chunk.dead)"
        ).rowcount


CHUNK_COLUMNS = "id, sha256, size, state, filehash, key, counter_start, blocks"


def chunk_row(row: tuple[Any, ...]) -> ChunkRow:
    number, sha256, size, state, filehash, key, counter_start, blocks = row
    return ChunkRow(
        number,
        sha256,
        size,
        state,
        filehash.hex() if filehash else "",
        key.hex() if key else "",
        counter_start or 0,
        blocks or b"",
    )


def _column(rows: Iterable[tuple[int]]) -> list[int]:
    return [row[0] for row in rows]
