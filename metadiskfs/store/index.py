"""Every SQL statement about a volume's names, inodes and settings; chunks and slots stand in chunks.py.

One connection writes, under ``Index.lock``: the last lock in the order inode -> cache -> index. Nothing that takes
long may be done under it, and never a network call. WAL with synchronous=NORMAL makes a commit survive the death of
the process; ``transaction(durable=True)`` makes it survive a power cut as well. sqlite3's exceptions stop here.
"""

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from metadiskfs.crash import crash_point
from metadiskfs.errors import CacheFull, IndexDamaged, MetadiskfsError, VolumeError
from metadiskfs.store import schema

log = logging.getLogger(__name__)

InodeRow = tuple[int, int, int, int, int, int, int, int, int, int, int, bytes | None]
"""id, mode, uid, gid, nlink, size, held, rdev, atime_ns, mtime_ns, ctime_ns, target"""

_INODE = "id, mode, uid, gid, nlink, size, held, rdev, atime_ns, mtime_ns, ctime_ns, target"
_FULL = getattr(sqlite3, "SQLITE_FULL", 13)


class _Translated:
    """See translated(). A class, because every statement passes here and a generator would cost it a third more."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, sqlite3.Error):
            raise translate(error) from error


_TRANSLATED = _Translated()


def translated() -> _Translated:
    """The border: sqlite3's exceptions become ours. Raises CacheFull (disk full), IndexDamaged or VolumeError."""
    return _TRANSLATED


def translate(error: sqlite3.Error) -> MetadiskfsError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == _FULL:
        return CacheFull("the disk under the index is full")
    if (isinstance(error, sqlite3.DatabaseError) and "malformed" in str(error)) or "not a database" in str(error):
        return IndexDamaged(f"the index is damaged: {error}")
    return VolumeError(f"the index failed: {error}")


class Index:
    """The volume's SQLite database. Safe to use from any thread; reads and writes take ``lock``."""

    def __init__(self, path: Path, *, chunk_size: int) -> None:
        """Open or create the index at ``path`` (0600); ``chunk_size`` (bytes) counts only when it is created.

        Raises IndexTooNew, IndexDamaged.
        """
        self.path = path
        self.lock = threading.RLock()
        self._joining: dict[int, list[tuple[str, tuple[Any, ...]]]] = {}
        self._durable = True
        self.changes = 0
        """Commits of this session that a backup should hold."""
        self._after_commit: list[Callable[[], None]] = []
        self._after_rollback: list[Callable[[], None]] = []
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with translated():
            if path.stat().st_size:
                read_only(path).close()  # a newer index stays untouched: closing a writer would move its log into it
            self.db = self.connect()
            self.db.execute("PRAGMA journal_mode = WAL")
            schema.migrate(self.db)
            if self.meta("uuid") is None:
                self._create(chunk_size)
        self.chunk_size: int = self.meta("chunk_size")
        self._next_inode: int = self.db.execute("SELECT max(id) FROM inode").fetchone()[0] + 1

    def connect(self, *, cache_kib: int = 8192) -> sqlite3.Connection:
        """Another connection to the same index, for long reads beside the writer.

        ``cache_kib``: the whole memory SQLite may hold for pages; who reads a table once from end to end needs none.
        """
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA cache_size = -{cache_kib}")
        return db

    def _create(self, chunk_size: int) -> None:
        now = os.stat(self.path).st_mtime_ns
        with self.transaction(durable=True):
            self.set_meta("uuid", uuid.uuid4().hex)
            self.set_meta("chunk_size", chunk_size)
            self.set_meta("generation", 1)
            root = (schema.ROOT, 0o40755, os.getuid(), os.getgid(), 2, 0, 0, 0, now, now, now, None)
            self.insert_inode(root)

    def close(self) -> None:
        with self.lock, translated():
            self.db.close()

    # -- transactions ---------------------------------------------------------------------------------------------

    def transaction(self, *, durable: bool = False, counted: bool = True) -> "_Transaction":
        """Hold the lock and commit at the end, or roll back when the block raises. Nests into an outer one.

        ``durable``: on disk when it returns, with all commits before it. ``counted``: a backup should hold it.
        ``with`` gives the connection. Raises CacheFull (disk full), IndexDamaged or VolumeError.
        """
        return _Transaction(self, durable, counted)

    def _begin(self, durable: bool) -> list[tuple[str, tuple[Any, ...]]]:
        """Returns the statements of this thread that joined."""
        if durable:
            self.db.execute("PRAGMA synchronous = FULL")
        self.db.execute("BEGIN IMMEDIATE")
        if not self._joining:
            return []
        joining = self._joining.pop(threading.get_ident(), [])
        try:
            for statement, values in joining:
                self.db.execute(statement, values)
        except sqlite3.Error:
            self._joining[threading.get_ident()] = joining
            raise
        if joining:
            crash_point("joined-before-commit")
        return joining

    def _commit(self, durable: bool, counted: bool) -> None:
        if durable:  # a commit that changes nothing would sync nothing
            self.db.execute("INSERT INTO meta VALUES ('fsyncs', 1) ON CONFLICT DO UPDATE SET value = value + 1")
        self.db.execute("COMMIT")
        self._durable = durable
        self.changes += counted

    def _roll_back(self, joining: list[tuple[str, tuple[Any, ...]]]) -> None:
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
        if joining:  # acknowledged already: they join the next one
            self._joining[threading.get_ident()] = joining
        self._settle(self._after_rollback)

    def make_durable(self) -> None:
        """Make all commits so far survive a power cut; free where they do already."""
        with self.lock:
            if not self._durable or self._joining:
                self.join_all()
                with self.transaction(durable=True):
                    crash_point("durable-before-commit")

    def on_commit(self, act: Callable[[], None]) -> None:
        """Run ``act`` after the running transaction committed, still under the lock: files follow their rows."""
        self._after_commit.append(act)

    def on_rollback(self, act: Callable[[], None]) -> None:
        """Undo something outside the database should the running transaction fail."""
        self._after_rollback.append(act)

    def _settle(self, acts: list[Callable[[], None]]) -> None:
        todo = list(acts)
        self._after_commit.clear()
        self._after_rollback.clear()
        for act in todo:
            try:
                act()
            except OSError as error:  # the rows are settled; the next start's sweep finds what lies about
                log.warning("a file could not follow its row: %s", error)

    def join_next(self, statement: str, values: tuple[Any, ...]) -> None:
        """Let a statement join this thread's next transaction; flush_joining() commits what found none."""
        with self.lock:
            self._joining.setdefault(threading.get_ident(), []).append((statement, values))

    def flush_joining(self) -> None:
        with self.lock:
            if self._joining:
                self.join_all()
                with self.transaction():
                    log.debug("committing names that went by themselves")

    def join_all(self) -> None:
        """Let what waits in any thread join this one's next transaction."""
        with self.lock:
            self._joining = {threading.get_ident(): [item for items in self._joining.values() for item in items]}

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database; what readers still hold stays."""
        with self.lock, translated():
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # -- settings -------------------------------------------------------------------------------------------------

    def meta(self, key: str) -> Any:
        with self.lock:
            row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: Any) -> None:
        with self.transaction() as db:
            db.execute(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, value)
            )

    # -- inodes ---------------------------------------------------------------------------------------------------

    def new_inode_number(self) -> int:
        with self.lock:
            self._next_inode += 1
            return self._next_inode - 1

    def inode(self, number: int) -> InodeRow | None:
        with self.lock, translated():
            row: InodeRow | None = self.db.execute(f"SELECT {_INODE} FROM inode WHERE id = ?", (number,)).fetchone()
        return row

    def insert_inode(self, row: InodeRow) -> None:
        with self.transaction() as db:
            db.execute("INSERT INTO inode VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def update_attributes(self, row: InodeRow) -> None:
        """Write mode, owner, nlink and times; size and held belong to the content and are written by it."""
        number, mode, uid, gid, nlink, _, _, _, atime, mtime, ctime, _ = row
        with self.transaction() as db:
            db.execute(
                "UPDATE inode SET mode = ?, uid = ?, gid = ?, nlink = ?, atime_ns = ?, mtime_ns = ?, ctime_ns = ?"
                " WHERE id = ?",
                (mode, uid, gid, nlink, atime, mtime, ctime, number),
            )

    def touch(self, number: int, nlink: int, now_ns: int) -> None:
        """Record a change in a directory: its times, and its nlink where a subdirectory came or went."""
        self.db.execute(
            "UPDATE inode SET nlink = ?, mtime_ns = ?, ctime_ns = ? WHERE id = ?", (nlink, now_ns, now_ns, number)
        )

    def set_atimes(self, times: Iterable[tuple[int, int]]) -> None:
        """Write (atime_ns, inode) pairs."""
        with self.transaction(counted=False) as db:
            db.executemany("UPDATE inode SET atime_ns = ? WHERE id = ?", times)

    def unlinked_inodes(self) -> list[int]:
        """Inodes without a name: deleted while open, by a session that died."""
        with self.lock, translated():
            return [row[0] for row in self.db.execute("SELECT id FROM inode WHERE nlink = 0")]

    def usage(self) -> tuple[int, int]:
        """(bytes held, inodes) of the whole volume, counted on a connection of its own: it may take a second."""
        with translated(), contextlib.closing(self.connect(cache_kib=256)) as db:
            held, count = db.execute("SELECT total(held), count(*) FROM inode").fetchone()
        return int(held), count

    # -- names ----------------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> int | None:
        with self.lock, translated():
            row = self.db.execute("SELECT inode FROM name WHERE parent = ? AND name = ?", (parent, name)).fetchone()
        return row[0] if row else None

    def insert_name(self, parent: int, name: bytes, inode: int) -> None:
        """Raises FileExistsError."""
        with self.transaction() as db:
            try:
                db.execute("INSERT INTO name VALUES (?, ?, ?)", (parent, name, inode))
            except sqlite3.IntegrityError:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None

    def replace_name(self, parent: int, name: bytes, inode: int) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO name VALUES (?, ?, ?)", (parent, name, inode))

    def delete_name(self, parent: int, name: bytes) -> None:
        with self.transaction() as db:
            db.execute("DELETE FROM name WHERE parent = ? AND name = ?", (parent, name))

    def is_empty(self, directory: int) -> bool:
        with self.lock, translated():
            row = self.db.execute("SELECT 1 FROM name WHERE parent = ? LIMIT 1", (directory,)).fetchone()
        return row is None

    def list_names(self, directory: int, after: bytes, limit: int) -> list[tuple[Any, ...]]:
        """The next names of a directory in its order, each with its whole inode row: (name, *InodeRow)."""
        with self.lock, translated():
            return self.db.execute(
                f"SELECT name.name, {', '.join('inode.' + column for column in _INODE.split(', '))}"
                " FROM name JOIN inode ON inode.id = name.inode"
                " WHERE name.parent = ? AND name.name > ? ORDER BY name.name LIMIT ?",
                (directory, after, limit),
            ).fetchall()

    def names_of(self, inode: int, limit: int = 1) -> list[tuple[int, bytes]]:
        """(parent, name) pairs of an inode. Reads the whole table: for messages and reports only."""
        with self.lock, translated():
            rows = self.db.execute("SELECT parent, name FROM name WHERE inode = ? LIMIT ?", (inode, limit))
            return rows.fetchall()

    # -- extended attributes --------------------------------------------------------------------------------------

    def xattr(self, inode: int, name: bytes) -> bytes | None:
        with self.lock, translated():
            row = self.db.execute("SELECT value FROM xattr WHERE inode = ? AND name = ?", (inode, name)).fetchone()
        return row[0] if row else None

    def has_privileges(self) -> bool:
        """Whether any file has an attribute of security.*: the kernel asks for one before every write."""
        with self.lock, translated():
            row = self.db.execute("SELECT 1 FROM xattr WHERE substr(name, 1, 9) = x'73656375726974792e' LIMIT 1")
            return row.fetchone() is not None

    def xattr_names(self, inode: int) -> list[bytes]:
        with self.lock, translated():
            return [row[0] for row in self.db.execute("SELECT name FROM xattr WHERE inode = ?", (inode,))]

    def set_xattr(self, inode: int, name: bytes, value: bytes) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO xattr VALUES (?, ?, ?)", (inode, name, value))

    def remove_xattr(self, inode: int, name: bytes) -> bool:
        with self.transaction() as db:
            return db.execute("DELETE FROM xattr WHERE inode = ? AND name = ?", (inode, name)).rowcount > 0


class _Transaction:
    """One transaction of an Index, from the lock to what follows the commit."""

    __slots__ = ("_counted", "_durable", "_index", "_joining", "_outer")

    def __init__(self, index: Index, durable: bool, counted: bool) -> None:
        self._index = index
        self._durable = durable
        self._counted = counted
        self._outer = False
        self._joining: list[tuple[str, tuple[Any, ...]]] = []

    def __enter__(self) -> sqlite3.Connection:
        index = self._index
        index.lock.acquire()
        try:
            self._outer = not index.db.in_transaction
            if self._outer:
                self._joining = index._begin(self._durable)
        except BaseException as error:
            self._fail()
            if isinstance(error, sqlite3.Error):
                raise translate(error) from error
            raise
        return index.db

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if not self._outer:
            self._index.lock.release()
            if isinstance(error, sqlite3.Error):
                raise translate(error) from error
            return
        if error is None:
            try:
                self._index._commit(self._durable, self._counted)
            except sqlite3.Error as failure:
                error = failure
        if error is not None:
            self._fail()
            if isinstance(error, sqlite3.Error):
                raise translate(error) from error
            return
        try:
            if self._durable:
                self._index.db.execute("PRAGMA synchronous = NORMAL")
            if self._index._after_commit:
                crash_point("files-before-following")
            self._index._settle(self._index._after_commit)
        finally:
            self._index.lock.release()

    def _fail(self) -> None:
        """Undo all of it and let go of the lock."""
        try:
            self._index._roll_back(self._joining)
            if self._durable:
                self._index.db.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error as error:
            log.error("a transaction could not even be undone: %s", error)
        finally:
            self._index.lock.release()


def read_only(path: Path) -> sqlite3.Connection:
    """Open an index that a mount may be writing, for reading beside it. Raises VolumeError, IndexTooNew."""
    with translated():
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30, isolation_level=None)
        db.execute("PRAGMA trusted_schema = OFF")
        try:
            schema.check_known(db)
        except BaseException:
            db.close()
            raise
    return db
