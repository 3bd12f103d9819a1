"""The tables of a volume's index, as prose with SQL, and the ordered migrations that make them.

Words: an *inode* is a file, directory or link itself; a *name* is an entry in a directory; a *slot* is the n-th
chunk-sized piece of a file; a *chunk* is immutable content, known by the SHA-256 of its plaintext. Times are
nanoseconds since 1970. Names, targets and attribute names are bytes, so BLOBs. ``PRAGMA user_version`` counts the
migrations that were applied; an index with more of them than this program knows is refused, untouched.
"""

import sqlite3

from metadiskfs.errors import IndexDamaged, IndexTooNew

ROOT = 1
"""Inode number of the root directory."""

PENDING, STORED, LOST = 0, 1, 2
"""chunk.state: sealed here only / acknowledged by the node and proven / known but nowhere to be had."""

_TABLES = """
-- Facts about the volume as a whole. Keys: 'uuid'; 'chunk_size' (bytes, fixed for life); 'node' (what holds the
-- chunks: a URL, or 'embedded'); 'session' (boot id while mounted, '' after a clean end: tells a power cut from a
-- mere crash); 'doubted' (chunk files last changed before this moment, ns, prove themselves before use: set after a
-- power cut); 'saved' (1: unmounted cleanly and the last backup holds all of it); 'generation' (number of the next
-- backup); 'fsyncs' (a counter: SQLite syncs nothing when a commit changes nothing).
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value ANY
) STRICT, WITHOUT ROWID;

-- One row a file, directory, symlink or special file.
-- nlink: names of it; for a directory 2 + its subdirectories; 0: deleted but still open, dropped at the next start.
-- size: bytes as stat shows it; held: bytes of it that are content, not holes (st_blocks).
-- target: of a symlink, else NULL. rdev: of a device file, else 0.
CREATE TABLE inode (
    id INTEGER PRIMARY KEY,
    mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL, nlink INTEGER NOT NULL,
    size INTEGER NOT NULL, held INTEGER NOT NULL, rdev INTEGER NOT NULL,
    atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    target BLOB
) STRICT;
CREATE INDEX inode_unlinked ON inode (id) WHERE nlink = 0;

-- Directory entries, without '.' and '..'. Stored in the order in which a directory is listed.
CREATE TABLE name (
    parent INTEGER NOT NULL, name BLOB NOT NULL, inode INTEGER NOT NULL,
    PRIMARY KEY (parent, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE xattr (
    inode INTEGER NOT NULL, name BLOB NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (inode, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX xattr_security ON xattr (inode) WHERE substr(name, 1, 9) = x'73656375726974792e';

-- Immutable content. Same bytes, same row: dedup is the UNIQUE constraint.
-- A pending chunk has a file among the sealed chunks and no link yet. filehash, key, counter_start and blocks (block
-- digests, see wire.block_digest; NULL where the chunk is one block) are set when the node's receipt was proven.
-- A chunk no slot refers to is deleted at once while pending; once stored it is kept with 'dead' set as long as a
-- kept backup may refer to it: backup g holds the chunk when born <= g and (dead IS NULL or g < dead).
CREATE TABLE chunk (
    id INTEGER PRIMARY KEY,
    sha256 BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
    state INTEGER NOT NULL, created_ns INTEGER NOT NULL,
    filehash BLOB, key BLOB, counter_start INTEGER, blocks BLOB,
    born INTEGER NOT NULL, dead INTEGER
) STRICT;
CREATE INDEX chunk_pending ON chunk (id) WHERE state = 0;
CREATE INDEX chunk_lost ON chunk (id) WHERE state = 2;
CREATE INDEX chunk_dead ON chunk (id) WHERE dead IS NOT NULL;

-- What a file consists of. A slot without a row is a hole. length: how many bytes of the chunk count (a truncated
-- file shows zeros where a longer chunk has more); what is missing up to the slot's end or the file's reads as zeros.
CREATE TABLE slot (
    inode INTEGER NOT NULL, slot INTEGER NOT NULL, chunk INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (inode, slot)
) STRICT, WITHOUT ROWID;
CREATE INDEX slot_chunk ON slot (chunk);

-- Chunks a file needs besides its slots: those its published link names for holes and for short slots.
CREATE TABLE pin (
    inode INTEGER NOT NULL, chunk INTEGER NOT NULL,
    PRIMARY KEY (inode, chunk)
) STRICT, WITHOUT ROWID;
CREATE INDEX pin_chunk ON pin (chunk);

-- Work files that fsync made durable: the next start adopts them as content of the slot. Removed by the seal.
CREATE TABLE work (
    inode INTEGER NOT NULL, slot INTEGER NOT NULL, file TEXT NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (inode, slot)
) STRICT, WITHOUT ROWID;

-- Backups of this index on the node that are kept, newest last, and the objects each consists of; those of one that
-- was not completed have no row in backup.
CREATE TABLE backup (
    generation INTEGER PRIMARY KEY, created_ns INTEGER NOT NULL, link TEXT NOT NULL
) STRICT;
CREATE TABLE backup_object (
    generation INTEGER NOT NULL, filehash BLOB NOT NULL,
    PRIMARY KEY (generation, filehash)
) STRICT, WITHOUT ROWID;
"""

MIGRATIONS: tuple[str, ...] = (_TABLES,)
"""Each script brings the index from version n to n + 1, in one transaction with the record that it did."""


def check_known(connection: sqlite3.Connection) -> int:
    """Return the index's version. Raises IndexTooNew."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise IndexTooNew(
            f"the index has version {version}, this program knows up to {len(MIGRATIONS)}: use a newer metadiskfs"
        )
    return version


def migrate(connection: sqlite3.Connection) -> None:
    """Bring an index, new or old, to this program's version. Raises IndexTooNew and leaves it as it is."""
    version = check_known(connection)
    for number in range(version, len(MIGRATIONS)):
        connection.executescript(f"BEGIN IMMEDIATE;{MIGRATIONS[number]};PRAGMA user_version = {number + 1};COMMIT;")


def objects_of(connection: sqlite3.Connection) -> set[tuple[str, str, str]]:
    """What the database defines: (type, name, SQL). A foreign index must equal our own here, or it is not ours."""
    rows = connection.execute(
        "SELECT type, name, coalesce(sql, '') FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
    )
    return {(kind, name, " ".join(sql.split())) for kind, name, sql in rows}


def check_is_ours(connection: sqlite3.Connection) -> None:
    """Refuse a database that defines anything but our tables: triggers and views run code of their maker.

    Raises IndexDamaged.
    """
    reference = sqlite3.connect(":memory:", isolation_level=None)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        for script in MIGRATIONS[:version]:
            reference.executescript(script)
        if objects_of(connection) != objects_of(reference):
            raise IndexDamaged("not an index of this program: its tables differ")
    finally:
        reference.close()
