"""The index on the node: saved as objects like any other, restored from one link.

A backup is a snapshot of the index cut into blocks, each an object, and a manifest that names them; the manifest's
link is the recovery link. A block whose bytes the last backup had already is not sent again, so a backup costs what
changed. Manifest, version 1: zlib-compressed JSON::

    {"format": "metadiskfs-index", "version": 1, "uuid": ..., "generation": ..., "created_ns": ..., "size": bytes of
     the index, "sha256": of the index, "blocks": [[sha256 of the block, filehash, key, counter start], ...]}

Each block holds BLOCK_SIZE bytes of the index, the last one what is left, compressed by zlib.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadiskfs.crash import crash_point
from metadiskfs.errors import IndexDamaged, MetadiskfsError, NodeUnreachable
from metadiskfs.metadisk.jobs import UploadJob, UploadResult
from metadiskfs.metadisk.wire import Link, link_of
from metadiskfs.store.chunks import Chunks
from metadiskfs.store.fsck import check_index
from metadiskfs.store.index import Index, translated
from metadiskfs.store.ports import Transfer
from metadiskfs.store.schema import LOST, PENDING, check_is_ours, check_known

log = logging.getLogger(__name__)

BLOCK_SIZE = 256 * 1024
JOB_IDS = 1 << 60
"""Upload jobs from here on are the backup's; chunk ids stay far below."""

_IN_FLIGHT = 8
_TRIES = 5
_KEEP_LAST = 5
_DAY_NS = 86_400 * 10**9
_MANIFEST_MAX = 256 << 20
_FORMAT = "metadiskfs-index"


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a saved index: digest of its bytes as they are in the index, and the object that holds them."""

    sha256: str
    filehash: str
    key: str
    counter_start: int


@dataclass(frozen=True, slots=True)
class Manifest:
    uuid: str
    generation: int
    created_ns: int
    size: int
    sha256: str
    blocks: tuple[Block, ...]

    def encode(self) -> bytes:
        blocks = [[block.sha256, block.filehash, block.key, block.counter_start] for block in self.blocks]
        fields = {"uuid": self.uuid, "generation": self.generation, "created_ns": self.created_ns}
        fields |= {"size": self.size, "sha256": self.sha256}
        return zlib.compress(json.dumps({"format": _FORMAT, "version": 1, **fields, "blocks": blocks}).encode())

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """Read what came from a node: untrusted. Raises IndexDamaged."""
        try:
            fields = json.loads(unzip(data, _MANIFEST_MAX))
            if fields["format"] != _FORMAT or fields["version"] != 1:
                raise IndexDamaged("not a backup of this program, or of a newer one")
            blocks = tuple(_checked_block(block) for block in fields["blocks"])
            size, sha256 = int(fields["size"]), str(fields["sha256"])
            if len(blocks) != -(-size // BLOCK_SIZE) or size <= 0:
                raise IndexDamaged("the backup's parts do not make its whole")
            return cls(
                str(fields["uuid"]), int(fields["generation"]), int(fields["created_ns"]), size, sha256, blocks
            )
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise IndexDamaged("this link does not lead to a backup of an index") from error


def _checked_block(fields: Any) -> Block:
    sha256, filehash, key, start = fields
    Link.parse(f"{filehash}?key={key}")
    return Block(str(sha256), filehash, key, int(start))


def unzip(data: bytes, limit: int) -> bytes:
    """Decompress at most ``limit`` bytes: a small object may claim to hold terabytes. Raises IndexDamaged."""
    inflater = zlib.decompressobj()
    plain = inflater.decompress(data, limit)
    if inflater.unconsumed_tail or not inflater.eof:
        raise IndexDamaged("a part of the backup is larger than it may be")
    return plain


class Backups:
    """Saves the index, one backup at a time. Safe to use from any thread."""

    def __init__(self, index: Index, chunks: Chunks, folder: Path, *, recovery_file: str = "") -> None:
        """``folder``: of the volume, for the snapshot while it is sent. ``recovery_file`` gets each new link."""
        self._index = index
        self._chunks = chunks
        self._folder = folder / "backup"
        self._recovery_file = recovery_file
        self._running = threading.Lock()
        self._changed = threading.Condition(threading.Lock())
        self._results: dict[int, UploadResult] = {}
        self._numbers = itertools.count(JOB_IDS)
        self.transfer: Transfer | None = None
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._saved_changes = index.changes if index.meta("saved") and self.latest_link() else -1
        self.saved_at = time.monotonic()

    # -- what there is --------------------------------------------------------------------------------------------

    def latest_link(self) -> str:
        """The recovery link of the newest backup, "" where there is none yet."""
        with self._index.lock, translated():
            row = self._index.db.execute("SELECT link FROM backup ORDER BY generation DESC LIMIT 1").fetchone()
        return row[0] if row else ""

    @property
    def changes(self) -> int:
        """Counts what a backup should hold; it stands still while nothing changes."""
        return self._index.changes

    @property
    def is_needed(self) -> bool:
        """Whether the index changed since it was saved."""
        return self._index.changes != self._saved_changes

    def on_result(self, result: UploadResult) -> None:
        with self._changed:
            self._results[result.id] = result
            self._changed.notify_all()

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(self, *, timeout: float) -> str:
        """Save the index as it is now; returns the recovery link. Gives up after ``timeout`` seconds.

        Raises NodeError where the node does not take it; the last backup then stays the latest.
        """
        until = time.monotonic() + timeout
        with self._running:
            snapshot = self._folder / "index"
            try:
                changes, generation = self._snapshot(snapshot)
                link = self._send(snapshot, generation, until)
            finally:
                for path in self._folder.glob("[ib]*"):
                    path.unlink()
            self._record(generation, link)
            self._saved_changes = changes
            self.saved_at = time.monotonic()
        self._write_recovery_file(link)
        log.info("index saved, generation %d", generation)
        return link

    def _snapshot(self, path: Path) -> tuple[int, int]:
        """Copy the index as of one moment: that at which the generation is counted up."""
        source = self._index.connect()
        try:
            with self._index.transaction(counted=False):
                generation = self._chunks.generation
                self._index.set_meta("generation", generation + 1)
                self._chunks.generation = generation + 1
            with translated(), self._index.lock:
                source.execute("BEGIN")
                source.execute("SELECT value FROM meta").fetchone()  # the read transaction begins here
                changes = self._index.changes
            path.unlink(missing_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            with translated(), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as target:
                source.backup(target)
                target.execute("PRAGMA journal_mode = DELETE")
        finally:
            source.close()
        return changes, generation

    def _send(self, snapshot: Path, generation: int, until: float) -> str:
        known = {block.sha256: block for block in self._last_blocks()}
        blocks: list[Block | None] = []
        waiting: dict[int, tuple[int, str, UploadJob]] = {}
        whole = hashlib.sha256()
        for position, data in enumerate(_blocks_of(snapshot)):
            whole.update(data)
            digest = hashlib.sha256(data).hexdigest()
            blocks.append(known.get(digest))
            if blocks[-1] is None:
                job = self._offer(zlib.compress(data, 1), generation, until)
                waiting[job.id] = (position, digest, job)
            else:
                self._keep_object(generation, blocks[-1].filehash)
            while len(waiting) >= _IN_FLIGHT:
                self._settle_one(waiting, blocks, until)
        while waiting:
            self._settle_one(waiting, blocks, until)
        done = tuple(block for block in blocks if block is not None)
        size = snapshot.stat().st_size
        manifest = Manifest(self._index.meta("uuid"), generation, time.time_ns(), size, whole.hexdigest(), done)
        crash_point("backup-before-manifest")
        job = self._offer(manifest.encode(), generation, until)
        waiting[job.id] = (0, "", job)
        last: list[Block | None] = [None]
        self._settle_one(waiting, last, until)
        assert last[0] is not None
        self._remember_blocks(manifest)
        return f"{last[0].filehash}?key={last[0].key}"

    def _offer(self, data: bytes, generation: int, until: float) -> UploadJob:
        """Hand one object out for upload, noted first: the sweep of the node must never take it for garbage."""
        for start in (0, 1):
            self._keep_object(generation, link_of(data, counter_start=start).filehash)
        number = next(self._numbers)
        path = self._folder / f"b{number}"
        with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
            file.write(data)
        job = UploadJob(number, str(path), hashlib.sha256(data).hexdigest(), len(data))
        self._hand_out(job, until)
        return job

    def _hand_out(self, job: UploadJob, until: float) -> None:
        while self.transfer is None or not self.transfer.upload(job):
            if time.monotonic() >= until:
                raise NodeUnreachable("the index could not be saved in time")
            time.sleep(0.05)

    def _settle_one(
        self, waiting: dict[int, tuple[int, str, UploadJob]], blocks: list[Block | None], until: float
    ) -> None:
        """Wait for one of the jobs and note its block; a failed one is tried again a few times."""
        tries = 0
        while True:
            result = self._next_result(waiting, until)
            position, digest, job = waiting[result.id]
            if not result.error:
                break
            tries += 1
            if tries >= _TRIES or time.monotonic() >= until:
                raise NodeUnreachable(f"the index could not be saved: {result.error}: {result.message}")
            time.sleep(min(2.0**tries / 4, 5.0))
            self._hand_out(job, until)
        del waiting[result.id]
        os.unlink(job.path)
        blocks[position] = Block(digest, result.filehash, result.key, result.counter_start)

    def _next_result(self, waiting: dict[int, Any], until: float) -> UploadResult:
        with self._changed:
            while not (ready := self._results.keys() & waiting.keys()):
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    raise NodeUnreachable("the index could not be saved in time")
            return self._results.pop(ready.pop())

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _keep_object(self, generation: int, filehash: str) -> None:
        with self._index.transaction(counted=False) as db:
            db.execute("INSERT OR IGNORE INTO backup_object VALUES (?, ?)", (generation, bytes.fromhex(filehash)))

    def _record(self, generation: int, link: str) -> None:
        """Note a complete backup and thin the older ones, with the objects only they had."""
        with self._index.transaction(durable=True, counted=False) as db:
            db.execute("INSERT INTO backup VALUES (?, ?, ?)", (generation, time.time_ns(), link))
            rows = db.execute("SELECT generation, created_ns FROM backup ORDER BY generation DESC").fetchall()
            kept = thinned(rows, time.time_ns())
            for number, _ in rows:
                if number not in kept:
                    db.execute("DELETE FROM backup WHERE generation = ?", (number,))
            db.execute("DELETE FROM backup_object WHERE generation NOT IN (SELECT generation FROM backup)")

    def _last_blocks(self) -> tuple[Block, ...]:
        try:
            return Manifest.decode((self._folder / "last").read_bytes()).blocks
        except FileNotFoundError:
            return ()
        except MetadiskfsError as error:
            log.warning("the last backup's list is unreadable, sending everything: %s", error)
            return ()

    def _remember_blocks(self, manifest: Manifest) -> None:
        part = self._folder / "new"
        with open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
            file.write(manifest.encode())
        part.replace(self._folder / "last")

    def _write_recovery_file(self, link: str) -> None:
        if not self._recovery_file:
            return
        path = Path(self._recovery_file)
        part = path.with_name(f".{path.name}.part")
        try:
            with open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
                file.write(f"{link}\n")
            part.replace(path)
        except OSError as error:
            log.error("the recovery link could not be written to %s: %s", path, error.strerror)


def thinned(backups: list[tuple[int, int]], now_ns: int) -> set[int]:
    """Which of (generation, created_ns), newest first, to keep: the last five, one a day for a week, one a week."""
    kept = {generation for generation, _ in backups[:_KEEP_LAST]}
    seen: set[tuple[str, int]] = set()
    for generation, created in backups:
        age = now_ns - created
        period = ("day", created // _DAY_NS) if age < 7 * _DAY_NS else ("week", created // (7 * _DAY_NS))
        if age < 35 * _DAY_NS and period not in seen:
            seen.add(period)
            kept.add(generation)
    return kept


def _blocks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(BLOCK_SIZE):
            yield data


def fetch_index(manifest: Manifest, fetch: Callable[[Link], bytes], target: Path) -> None:
    """Put a saved index together at ``target``. ``fetch`` returns proven objects. Raises IndexDamaged, NodeError."""
    whole = hashlib.sha256()
    left = manifest.size
    with open(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "wb") as file:
        for block in manifest.blocks:
            data = unzip(fetch(Link(block.filehash, block.key)), BLOCK_SIZE)
            if len(data) != min(BLOCK_SIZE, left):
                raise IndexDamaged("a part of the backup has the wrong size")
            whole.update(data)
            file.write(data)
            left -= len(data)
        file.flush()
        os.fsync(file.fileno())
    if whole.hexdigest() != manifest.sha256:
        raise IndexDamaged("the backup's parts do not make its whole")


def adopt_index(path: Path, node: str) -> int:
    """Make a restored index this machine's: check that it is one, drop what only the old machine had.

    It is untrusted: its tables must be exactly ours, and it must pass every check of fsck.py. Chunks that were still
    pending when it was saved are lost with the old machine; returns how many. Raises IndexDamaged, IndexTooNew.
    """
    with translated(), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA trusted_schema = OFF")
        if not check_known(db):
            raise IndexDamaged("it has no tables")
        check_is_ours(db)
        db.execute("DELETE FROM work")
        db.execute("UPDATE inode SET held = (SELECT coalesce(sum(length), 0) FROM slot WHERE inode = inode.id)"
                   " WHERE mode & 0xF000 = 0x8000")  # fmt: skip
        lost = db.execute("UPDATE chunk SET state = ? WHERE state = ?", (LOST, PENDING)).rowcount
        for key, value in (("node", node), ("session", ""), ("saved", 0)):
            db.execute(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, value)
            )
        found = next(check_index(db), None)
        if found is not None:
            raise IndexDamaged(f"{found.message} {found.path}".strip())
    return lost
