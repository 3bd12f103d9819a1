"""An index of any size, written straight into a volume's SQLite database by the program's own schema.

Folders three levels deep, 20 files in each leaf; every file has one stored chunk of its own, as most small files do.
"""

import hashlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from metadiskfs.store.index import Index
from metadiskfs.store.schema import ROOT, STORED

FILES_PER_FOLDER = 20
_FAN = 80
_SIZE = 4096
_FILE, _FOLDER = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755

InodeRow = tuple[int, int, int, int, int, int, int, int, int, int, int, None]


def leaves_of(files: int) -> int:
    return max(1, files // FILES_PER_FOLDER)


def leaf_path(number: int) -> str:
    """Where the n-th leaf folder lies."""
    upper = number // _FAN
    return f"a{upper // _FAN:04d}/b{upper % _FAN:02d}/c{number % _FAN:02d}"


def file_path(number: int) -> str:
    return f"{leaf_path(number // FILES_PER_FOLDER)}/file{number % FILES_PER_FOLDER:02d}.txt"


def generate(path: Path, files: int, *, chunk_size: int = 4 << 20) -> float:
    """Create the index at ``path`` with that many files; returns the seconds it took."""
    started = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    index = Index(path, chunk_size=chunk_size)
    with index.transaction():
        index.set_meta("node", "embedded")
    index.close()
    db = sqlite3.connect(path, isolation_level=None)
    for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -400000", "temp_store = MEMORY"):
        db.execute(f"PRAGMA {setting}")
    try:
        db.execute("BEGIN")
        _write(db, files)
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")
    finally:
        db.close()
    return time.monotonic() - started


def _write(db: sqlite3.Connection, files: int) -> None:
    leaves = leaves_of(files)
    tops = -(-leaves // (_FAN * _FAN))
    middles = -(-leaves // _FAN)
    first_middle = ROOT + 1 + tops
    first_leaf = first_middle + middles
    first_file = first_leaf + leaves
    now = time.time_ns()
    owner = (os.getuid(), os.getgid())

    def folder(number: int, folders: int) -> InodeRow:
        return (number, _FOLDER, *owner, 2 + folders, 0, 0, 0, now, now, now, None)

    def inodes() -> Iterator[InodeRow]:
        for top in range(tops):
            yield folder(ROOT + 1 + top, min(_FAN, middles - top * _FAN))
        for middle in range(middles):
            yield folder(first_middle + middle, min(_FAN, leaves - middle * _FAN))
        for leaf in range(leaves):
            yield folder(first_leaf + leaf, 0)
        for number in range(first_file, first_file + files):
            yield (number, _FILE, *owner, 1, _SIZE, _SIZE, 0, now, now, now, None)

    def names() -> Iterator[tuple[int, bytes, int]]:
        for top in range(tops):
            yield ROOT, b"a%04d" % top, ROOT + 1 + top
        for middle in range(middles):
            yield ROOT + 1 + middle // _FAN, b"b%02d" % (middle % _FAN), first_middle + middle
        for leaf in range(leaves):
            yield first_middle + leaf // _FAN, b"c%02d" % (leaf % _FAN), first_leaf + leaf
        for number in range(files):
            leaf = min(number // FILES_PER_FOLDER, leaves - 1)
            yield first_leaf + leaf, b"file%02d.txt" % (number % FILES_PER_FOLDER), first_file + number

    filler = hashlib.sha256(b"not on any node").digest()

    def chunks() -> Iterator[tuple[int, bytes, int, int, int, bytes, bytes, int, int]]:
        for number in range(1, files + 1):
            sha256 = number.to_bytes(8, "big") + filler[8:]
            yield number, sha256, _SIZE, STORED, now, sha256, filler, 0, 1

    _insert(db, "inode VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", inodes())
    db.execute("UPDATE inode SET nlink = ? WHERE id = ?", (2 + tops, ROOT))
    _insert(db, "name VALUES (?, ?, ?)", names())
    _insert(
        db,
        "chunk (id, sha256, size, state, created_ns, filehash, key, counter_start, born)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        chunks(),
    )
    _insert(db, "slot VALUES (?, 0, ?, ?)", ((first_file + n, n + 1, _SIZE) for n in range(files)))


def _insert(db: sqlite3.Connection, what: str, rows: Iterator[tuple[object, ...]]) -> None:
    db.executemany(f"INSERT INTO {what}", rows)
