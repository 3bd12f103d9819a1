"""Garbage collection on the user's own embedded node: objects that no file, no kept backup and no link needs go.

Why this takes nothing that is needed. Every volume on this node is asked first to forget what it dropped, then read;
one that cannot be read, or that is known and missing, stops the sweep. What is uploaded after that moment has a newer
mtime, also where the object existed (the node renews it), and so has what a chunk that was still pending then may
have uploaded unrecorded: nothing newer than the oldest such chunk is taken. The engine compares and deletes under
its lock, so that an upload cannot come between.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metadiskfs import control
from metadiskfs.config import Config
from metadiskfs.errors import MountError, VolumeError
from metadiskfs.node.disk import DiskEngine
from metadiskfs.store.chunks import objects_needed, purge_dead
from metadiskfs.store.index import Index
from metadiskfs.store.lock import volume_lock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep freed, and what it left."""

    objects: int
    bytes: int
    kept_objects: int


def sweep(config: Config, *, forget: str = "") -> Swept:
    """Delete garbage from the embedded node's store. ``forget``: uuid or name of a volume given up for good.

    Raises VolumeError where a volume cannot be asked, and deletes nothing then.
    """
    store = config.embedded_node_dir
    if not store.is_dir():
        return Swept(0, 0, 0)
    with _published(store) as published:
        until = time.time_ns()
        needed = set(published)
        found: set[str] = set()
        for folder in sorted((config.data_dir / "volumes").glob("*/index.db")):
            _purge(folder.parent)
            uuid, oldest_pending = objects_needed(folder, needed)
            found.add(uuid)
            until = min(until, oldest_pending)
        _check_known(store, found, forget)
        return _delete(store, needed, until)


@contextlib.contextmanager
def _published(store: Path) -> Iterator[set[bytes]]:
    """The filehashes whose links were handed out by `upload` and `link --whole`, with uploads held off meanwhile."""
    fd = os.open(store / "published", os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(fd) as file:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield {bytes.fromhex(line.strip()) for line in file if line.strip()}


@contextlib.contextmanager
def publishing(store: Path) -> Iterator[None]:
    """Hold off a sweep while an object is uploaded whose link is noted afterwards."""
    with os.fdopen(os.open(store / "published", os.O_RDONLY | os.O_CREAT, 0o600)) as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        yield


def note_published(store: Path, filehash: str) -> None:
    """Remember that a link to this object was handed out: the sweep keeps it."""
    with os.fdopen(os.open(store / "published", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        file.write(f"{filehash}\n")


def _purge(folder: Path) -> None:
    """Let a volume forget chunks that it dropped: the mount does it where there is one."""
    try:
        control.ask_once(folder, "purge")
    except MountError:
        with volume_lock(folder):
            index = Index(folder / "index.db", chunk_size=0)
            try:
                purge_dead(index)
            finally:
                index.close()


def _check_known(store: Path, found: set[str], forget: str) -> None:
    """Refuse while a volume that kept objects here has no index: it may yet be restored from its recovery link."""
    known = store / "volumes"
    lines = known.read_text().splitlines() if known.exists() else []
    for line in lines:
        uuid, _, name = line.partition(" ")
        if uuid not in found and forget not in (uuid, name):
            raise VolumeError(
                f"the volume {name!r} kept objects on this node and its index is gone: restore it, or give its"
                f" content up with: metadiskfs gc --forget {name}"
            )


def _delete(store: Path, needed: set[bytes], until_ns: int) -> Swept:
    engine = DiskEngine(store)
    objects = size = kept = 0
    try:
        for entry in engine.list():
            if bytes.fromhex(entry.filehash) in needed or entry.mtime_ns >= until_ns:
                kept += 1
            elif engine.delete(entry.filehash, not_newer_than_ns=until_ns - 1):
                objects += 1
                size += entry.size
    finally:
        engine.close()
    log.info("swept %d objects, %d bytes; %d are needed", objects, size, kept)
    return Swept(objects, size, kept)
