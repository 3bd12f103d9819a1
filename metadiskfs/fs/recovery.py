"""What a mount does before it serves: bring files and rows of the last session back in step.

Every crash window ends here (docs/CRASH.md). Nothing else runs yet, so no locks are thought of.
"""

import functools
import itertools
import logging
import os
import stat

from metadiskfs.crash import crash_point
from metadiskfs.fs.inode import Inode
from metadiskfs.fs.volume import Volume
from metadiskfs.store.chunks import Slot
from metadiskfs.store.files import digest_of
from metadiskfs.store.schema import LOST, ROOT, STORED

log = logging.getLogger(__name__)

LOST_AND_FOUND = b"lost+found"
_NOBODY = 0
"""Instead of an inode number in a work file's name: a copy that was under way."""


def recover(volume: Volume) -> None:
    """Heal what a crash or power cut left; adopt what fsync vouched for, keep the rest in lost+found."""
    _forget_unlinked(volume)
    crash_point("recovery-after-unlinked")
    _match_sealed(volume)
    _match_pending(volume)
    crash_point("recovery-after-chunks")
    adopted = _adopt_durable_work(volume)
    crash_point("recovery-after-adopting")
    _keep_other_work(volume, adopted)


def _forget_unlinked(volume: Volume) -> None:
    """Deleted while open. The files go first: without the row nobody would know that they may."""
    unlinked = set(volume.index.unlinked_inodes())
    if unlinked:
        for name in volume.cache.work_files():
            if _parts(name)[0] in unlinked:
                os.unlink(f"{volume.cache.work_dir}/{name}")
        crash_point("recovery-before-unlinked")
    for number in unlinked:
        volume.chunks.forget_inode(number)


def _match_sealed(volume: Volume) -> None:
    """Sealed files against rows: no row, a crash before the commit; stored, a crash before the move."""
    cache, chunks = volume.cache, volume.chunks
    for sha256, size in cache.sealed_chunks():
        row = chunks.chunk_of_content(sha256)
        if row is None:
            os.unlink(cache.sealed_path(sha256))
            continue
        cache.count(pending=size)
        if row.state == STORED:
            cache.stored(sha256, size)
            continue
        cache.mark_volatile(sha256)  # the session that placed it may not have synced it
        if row.state == LOST:
            chunks.mark_pending(row.id)
    cache.settle()


def _match_pending(volume: Volume) -> None:
    """Rows that wait for upload against files: what has none is lost, unless the cache has a copy."""
    cache, chunks = volume.cache, volume.chunks
    last = 0
    while batch := chunks.pending_after(last, 1000):
        for number, sha256, size in batch:
            last = number
            if not cache.take_back(sha256, size):
                log.error("chunk %s waited for upload and its file is gone", sha256.hex())
                chunks.mark_lost(number)


def _adopt_durable_work(volume: Volume) -> dict[tuple[int, int], int]:
    """Returns the serial number of the work file that was taken for each (inode, slot)."""
    by_inode: dict[int, dict[int, tuple[str, int]]] = {}
    adopted: dict[tuple[int, int], int] = {}
    for number, slot, name, length in volume.chunks.durable_work():
        path = f"{volume.cache.work_dir}/{name}"
        if os.path.exists(path):
            by_inode.setdefault(number, {})[slot] = (path, length)
            adopted[number, slot] = _parts(name)[2]
        else:
            volume.chunks.forget_work(number, slot)
    for number, work in by_inode.items():
        log.info("adopting what fsync made durable of inode %d", number)
        _seal_work(volume, volume.tree.inode(number), work)
    return adopted


def _seal_work(volume: Volume, inode: Inode, work: dict[int, tuple[str, int]]) -> None:
    handle = volume.open(inode, os.O_RDONLY)  # a read-only mount recovers as well
    try:
        content = volume.handle(handle).content
        assert content is not None
        for slot, (path, length) in work.items():
            content.adopt_work(slot, path, length)
        content.seal()
    finally:
        volume.release(handle)


def _keep_other_work(volume: Volume, adopted: dict[tuple[int, int], int]) -> None:
    """Work files nobody vouched for: written, never closed. Their data is kept, in lost+found."""
    work_dir = volume.cache.work_dir
    newest: dict[int, dict[int, tuple[int, str]]] = {}
    slots_of = functools.cache(volume.chunks.slots_of)
    for name in volume.cache.work_files():
        inode, slot, serial = _parts(name)
        path = f"{work_dir}/{name}"
        before = newest.get(inode, {}).get(slot, (adopted.get((inode, slot), -1), ""))
        if inode == _NOBODY or serial < before[0] or _is_sealed(path, slots_of(inode).get(slot)):
            os.unlink(path)
            continue
        if before[1]:
            os.unlink(before[1])
        newest.setdefault(inode, {})[slot] = (serial, path)
    for number, slots in newest.items():
        _keep(volume, number, {slot: path for slot, (_, path) in slots.items()})


def _parts(name: str) -> tuple[int, int, int]:
    """Inode, slot and serial number of a work file; a name that is none of ours counts as nobody's."""
    try:
        inode, slot, serial = (int(part) for part in name.split("-"))
    except ValueError:
        return _NOBODY, 0, 0
    return inode, slot, serial


def _is_sealed(path: str, held: Slot | None) -> bool:
    """Whether its slot holds just this, the session having died between the seal's commit and its tidying up."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return True
        return held is not None and held.length == size and digest_of(file.fileno()).sha256 == held.sha256


def _keep(volume: Volume, number: int, slots: dict[int, str]) -> None:
    known = [name for _, name in volume.index.names_of(number)]
    name = b"-".join([b"%d" % number, *known])[:200]
    with volume.index.transaction(durable=True):  # in one, or a crash leaves an empty file
        folder = _lost_and_found(volume)
        name = _free_name(volume, folder, name)
        owner = volume.tree.inode(number) if known else folder
        kept = volume.tree.make(folder, name, stat.S_IFREG | 0o600, uid=owner.uid, gid=owner.gid)
        log.warning("written but never closed: kept as %s/%s", LOST_AND_FOUND.decode(), os.fsdecode(name))
        _seal_work(volume, kept, {slot: (path, os.stat(path).st_size) for slot, path in slots.items()})
        crash_point("recovery-before-kept")


def _lost_and_found(volume: Volume) -> Inode:
    root = volume.tree.inode(ROOT)
    try:
        return volume.tree.child(ROOT, LOST_AND_FOUND)
    except FileNotFoundError:
        return volume.tree.make(root, LOST_AND_FOUND, stat.S_IFDIR | 0o700, uid=root.uid, gid=root.gid)


def _free_name(volume: Volume, folder: Inode, name: bytes) -> bytes:
    for candidate in itertools.chain([name], (b"%s.%d" % (name, number) for number in itertools.count(1))):
        if volume.index.lookup(folder.number, candidate) is None:
            return candidate
    raise AssertionError("the candidates never end")
