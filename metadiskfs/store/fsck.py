"""Is an index consistent in itself? Every invariant of schema.py as a query that must find nothing.

Each check names its finding, selects the offending rows, and knows the statement that mends one. Checks read a
connection of their own beside a mount; mending wants the volume unmounted.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from metadiskfs.store.index import translated
from metadiskfs.store.schema import ROOT

LOST_AND_FOUND = b"lost+found"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. ``path`` is a file it concerns, "" where there is none to name."""

    kind: str
    message: str
    path: str = ""
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """``select`` yields offending rows, an inode number first (0: none) and then what ``mend`` binds."""

    kind: str
    message: str
    select: str
    mend: str


_SUBDIRECTORIES = (
    "(SELECT count(*) FROM name JOIN inode AS child ON child.id = name.inode"
    " WHERE name.parent = inode.id AND child.mode & 0xF000 = 0x4000)"
)
_REACHABLE = (
    "WITH RECURSIVE reachable (id) AS (VALUES (1) UNION SELECT name.inode FROM reachable"
    " JOIN name ON name.parent = reachable.id JOIN inode ON inode.id = name.inode AND inode.mode & 0xF000 = 0x4000) "
)

CHECKS = (
    Check(
        "dangling-name",
        "a name without an inode",
        "SELECT 0, name.parent, name.name FROM name LEFT JOIN inode ON inode.id = name.inode WHERE inode.id IS NULL",
        "DELETE FROM name WHERE parent = ? AND name = ?",
    ),
    Check(
        "bad-name",
        "a name no file system allows",
        "SELECT inode, parent, name FROM name WHERE length(name) NOT BETWEEN 1 AND 255 OR instr(name, x'2f')"
        " OR instr(name, x'00') OR name IN (x'2e', x'2e2e')",
        "UPDATE name SET name = CAST('recovered-' || inode || '-' || hex(randomblob(4)) AS BLOB)"
        " WHERE parent = ? AND name = ?",
    ),
    Check(
        "second-name-of-directory",
        "a directory with more than one name",
        "SELECT name.inode, name.parent, name.name FROM name JOIN inode ON inode.id = name.inode"
        " WHERE inode.mode & 0xF000 = 0x4000 AND EXISTS (SELECT 1 FROM name AS other WHERE other.inode = name.inode"
        " AND (other.parent, other.name) < (name.parent, name.name))",
        "DELETE FROM name WHERE parent = ? AND name = ?",
    ),
    Check(
        "unreachable",
        "a directory that cannot be reached from the root",
        _REACHABLE + "SELECT id, id FROM inode WHERE mode & 0xF000 = 0x4000 AND id NOT IN (SELECT id FROM reachable)",
        "ADOPT",
    ),
    Check(
        "orphan",
        "a file without a name",
        "SELECT inode.id, inode.id FROM inode LEFT JOIN name ON name.inode = inode.id"
        " WHERE name.inode IS NULL AND inode.nlink > 0 AND inode.mode & 0xF000 != 0x4000",
        "ADOPT",
    ),
    Check(
        "not-a-directory",
        "names below something that is no directory",
        "SELECT name.parent, name.parent, name.name FROM name LEFT JOIN inode ON inode.id = name.parent"
        " WHERE inode.id IS NULL OR inode.mode & 0xF000 != 0x4000",
        "DELETE FROM name WHERE parent = ? AND name = ?",
    ),
    Check(
        "link-count",
        "a wrong link count",
        "SELECT inode.id, count(name.inode), inode.id FROM inode LEFT JOIN name ON name.inode = inode.id"
        " WHERE inode.mode & 0xF000 != 0x4000 GROUP BY inode.id HAVING count(name.inode) != inode.nlink"
        " AND inode.nlink > 0",
        "UPDATE inode SET nlink = ? WHERE id = ?",
    ),
    Check(
        "directory-link-count",
        "a wrong link count of a directory",
        f"SELECT id, 2 + {_SUBDIRECTORIES}, id FROM inode"
        f" WHERE mode & 0xF000 = 0x4000 AND nlink != 2 + {_SUBDIRECTORIES}",
        "UPDATE inode SET nlink = ? WHERE id = ?",
    ),
    Check(
        "chunk-missing",
        "a file refers to a chunk the index does not have",
        "SELECT slot.inode, slot.chunk FROM slot LEFT JOIN chunk ON chunk.id = slot.chunk WHERE chunk.id IS NULL",
        "INSERT OR IGNORE INTO chunk (id, sha256, size, state, created_ns, born)"
        " VALUES (?, randomblob(32), (SELECT value FROM meta WHERE key = 'chunk_size'), 2, 0, 0)",
    ),
    Check(
        "slot-without-file",
        "content of a file that does not exist",
        "SELECT 0, slot.inode FROM slot LEFT JOIN inode ON inode.id = slot.inode WHERE inode.id IS NULL",
        "DELETE FROM slot WHERE inode = ?",
    ),
    Check(
        "slot-beyond-end",
        "content behind the end of a file",
        "SELECT slot.inode, slot.inode, slot.slot FROM slot JOIN inode ON inode.id = slot.inode"
        " WHERE slot.slot < 0 OR slot.slot * (SELECT value FROM meta WHERE key = 'chunk_size') >= inode.size",
        "DELETE FROM slot WHERE inode = ? AND slot = ?",
    ),
    Check(
        "slot-length",
        "a slot longer than its chunk",
        "SELECT slot.inode, slot.inode, slot.slot FROM slot JOIN chunk ON chunk.id = slot.chunk"
        " WHERE slot.length NOT BETWEEN 0 AND chunk.size",
        "UPDATE slot SET length = (SELECT size FROM chunk WHERE id = slot.chunk) WHERE inode = ? AND slot = ?",
    ),
    Check(
        "chunk-size",
        "a chunk larger than the volume's chunks are",
        "SELECT 0, id FROM chunk WHERE size NOT BETWEEN 0 AND (SELECT value FROM meta WHERE key = 'chunk_size')",
        # What its slots say is the best guess: where it is wrong the chunk does not prove, and is never read wrongly.
        "UPDATE chunk SET size = min((SELECT value FROM meta WHERE key = 'chunk_size'),"
        " (SELECT coalesce(max(length), 0) FROM slot WHERE slot.chunk = chunk.id)) WHERE id = ?",
    ),
    Check(
        "held",
        "a wrong count of held bytes",
        "SELECT inode.id, coalesce(sum(slot.length), 0), inode.id FROM inode LEFT JOIN slot ON slot.inode = inode.id"
        " WHERE inode.mode & 0xF000 = 0x8000 AND NOT EXISTS (SELECT 1 FROM work WHERE work.inode = inode.id)"
        " GROUP BY inode.id HAVING coalesce(sum(slot.length), 0) != inode.held",
        "UPDATE inode SET held = ? WHERE id = ?",
    ),
    Check(
        "size",
        "an impossible size",
        "SELECT id, id FROM inode WHERE size < 0",
        "UPDATE inode SET size = 0 WHERE id = ?",
    ),
    Check(
        "stored-without-link",
        "a chunk said to be stored without a link",
        "SELECT 0, id FROM chunk WHERE state = 1 AND (length(filehash) IS NOT 32 OR length(key) IS NOT 32"
        " OR counter_start NOT IN (0, 1) OR counter_start IS NULL)",
        "UPDATE chunk SET state = 2, filehash = NULL, key = NULL WHERE id = ?",
    ),
    Check(
        "unreferenced",
        "a chunk no file refers to, not marked as such",
        "SELECT 0, id FROM chunk WHERE dead IS NULL AND NOT EXISTS (SELECT 1 FROM slot WHERE slot.chunk = chunk.id)"
        " AND NOT EXISTS (SELECT 1 FROM pin WHERE pin.chunk = chunk.id)",
        "UPDATE chunk SET dead = born WHERE id = ?",
    ),
    Check(
        "dead-but-used",
        "a chunk in use, marked as dropped",
        "SELECT 0, id FROM chunk WHERE dead IS NOT NULL AND (EXISTS (SELECT 1 FROM slot WHERE slot.chunk = chunk.id)"
        " OR EXISTS (SELECT 1 FROM pin WHERE pin.chunk = chunk.id))",
        "UPDATE chunk SET dead = NULL WHERE id = ?",
    ),
)


class Paths:
    """Names inodes by their paths. The table it needs is built at the first question."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._built = False

    def of(self, inode: int) -> str:
        """A path of the inode, "" where none leads there."""
        if not self._built:
            self._db.execute("DROP TABLE IF EXISTS temp.place")  # of an earlier look: names may have been mended
            self._db.execute("CREATE TEMP TABLE place AS SELECT inode, parent, name FROM name")
            self._db.execute("CREATE INDEX temp.place_inode ON place (inode)")
            self._built = True
        names: list[bytes] = []
        while inode != ROOT:
            row = self._db.execute("SELECT parent, name FROM temp.place WHERE inode = ?", (inode,)).fetchone()
            if row is None or len(names) > 4096:
                return ""
            inode = row[0]
            names.append(row[1])
        return "/" + os.fsdecode(b"/".join(reversed(names)))


def check_index(db: sqlite3.Connection, *, repair: bool = False) -> Iterator[Finding]:
    """Run every check; with ``repair`` mend what each finds, in one transaction a check.

    ``db`` is in autocommit mode. Raises IndexDamaged where SQLite itself cannot read it.
    """
    with translated():
        for (text,) in db.execute("PRAGMA integrity_check(20)"):
            if text != "ok":
                yield Finding("sqlite", text)
        if db.execute("SELECT 1 FROM inode WHERE id = 1 AND mode & 0xF000 = 0x4000").fetchone() is None:
            yield Finding("no-root", "the root directory is missing")
        paths = Paths(db)
        for check in CHECKS:
            yield from _run(db, check, paths, repair)


def _run(db: sqlite3.Connection, check: Check, paths: Paths, repair: bool) -> Iterator[Finding]:
    rows: list[tuple[Any, ...]] = db.execute(check.select).fetchall()
    findings = [Finding(check.kind, check.message, paths.of(row[0]) if row[0] else "", repair) for row in rows]
    if repair and rows:
        db.execute("BEGIN IMMEDIATE")
        mend: Callable[[tuple[Any, ...]], Any] = (
            (lambda row: _adopt(db, row[1]))
            if check.mend == "ADOPT"
            else (lambda row: db.execute(check.mend, row[1:]))
        )
        for row in rows:
            mend(row)
        db.execute("COMMIT")
    yield from findings


def _adopt(db: sqlite3.Connection, inode: int) -> None:
    """Give an inode nobody can reach a name in lost+found."""
    db.execute("DELETE FROM name WHERE inode = ?", (inode,))
    db.execute("INSERT OR REPLACE INTO name VALUES (?, ?, ?)", (_lost_and_found(db), b"#%d" % inode, inode))


def _lost_and_found(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT inode FROM name WHERE parent = ? AND name = ?", (ROOT, LOST_AND_FOUND)).fetchone()
    if row is not None:
        return int(row[0])
    number = int(db.execute("SELECT max(id) + 1 FROM inode").fetchone()[0])
    db.execute(
        "INSERT INTO inode SELECT ?, ?, uid, gid, 2, 0, 0, 0, mtime_ns, mtime_ns, mtime_ns, NULL"
        " FROM inode WHERE id = 1",
        (number, 0o40700),
    )
    db.execute("INSERT INTO name VALUES (?, ?, ?)", (ROOT, LOST_AND_FOUND, number))
    return number
