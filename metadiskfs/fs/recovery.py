"""What a mount does before it serves: bring files and rows of the last session back in step.

Every crash window ends here (docs/CRASH.md). Nothing else runs yet, so no locks are thought of.
"""

import itertools
import logging
import os
import stat

from metadiskfs.fs.inode import Inode
from metadiskfs.fs.volume import Volume
from metadiskfs.store.schema import LOST, ROOT, STORED

log = logging.getLogger(__name__)

LOST_AND_FOUND = b"lost+found"


def recover(volume: Volume) -> None:
    """Heal what a crash or power cut left; adopt what fsync vouched for, keep the rest in lost+found."""
    unlinked = volume.index.unlinked_inodes()
    for number in unlinked:
        volume.chunks.forget_inode(number)
    _match_sealed(volume)
    _match_pending(volume)
    _adopt_durable_work(volume)
    _keep_other_work(volume, set(unlinked))


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
        elif row.state == LOST:
            chunks.mark_pending(row.id)
    cache.settle()


def _match_pending(volume: Volume) -> None:
    """Rows that wait for upload against files: what has none is lost, unless the cache has a copy."""
    cache, chunks = volume.cache, volume.chunks
    last = 0
    while batch := chunks.pending_after(last, 1000):
        for number, sha256, size in batch:
            last = number
            if os.path.exists(cache.sealed_path(sha256)):
                continue
            if os.path.exists(cache.cached_path(sha256)):
                os.rename(cache.cached_path(sha256), cache.sealed_path(sha256))
                cache.count(pending=size, cached=-size)
            else:
                log.error("chunk %s waited for upload and its file is gone", sha256.hex())
                chunks.mark_lost(number)


def _adopt_durable_work(volume: Volume) -> None:
    by_inode: dict[int, dict[int, tuple[str, int]]] = {}
    for number, slot, name, length in volume.chunks.durable_work():
        path = f"{volume.cache.work_dir}/{name}"
        if os.path.exists(path):
            by_inode.setdefault(number, {})[slot] = (path, length)
    for number, work in by_inode.items():
        log.info("adopting what fsync made durable of inode %d", number)
        _seal_work(volume, volume.tree.inode(number), work)


def _seal_work(volume: Volume, inode: Inode, work: dict[int, tuple[str, int]]) -> None:
    handle = volume.open(inode, os.O_RDWR)
    try:
        content = volume.handle(handle).content
        assert content is not None
        for slot, (path, length) in work.items():
            content.adopt_work(slot, path, length)
        content.seal()
    finally:
        volume.release(handle)


def _keep_other_work(volume: Volume, unlinked: set[int]) -> None:
    """Work files nobody vouched for: written, never closed. Their data is kept, in lost+found."""
    cache = volume.cache
    found: dict[int, dict[int, tuple[int, str]]] = {}
    for name in cache.work_files():
        path = f"{cache.work_dir}/{name}"
        inode, slot, serial = (int(part) for part in name.split("-"))
        if inode in unlinked or os.stat(path).st_size == 0:
            os.unlink(path)
            continue
        best = found.setdefault(inode, {}).get(slot)
        if best is None or serial > best[0]:
            found[inode][slot] = (serial, path)
            path = best[1] if best else ""
        if path:
            os.unlink(path)
    for number, slots in found.items():
        _keep(volume, number, {slot: path for slot, (_, path) in slots.items()})


def _keep(volume: Volume, number: int, slots: dict[int, str]) -> None:
    known = [name for _, name in volume.index.names_of(number)]
    name = b"-".join([b"%d" % number, *known])[:200]
    folder = _lost_and_found(volume)
    name = _free_name(volume, folder, name)
    owner = volume.tree.inode(number) if known else folder
    kept = volume.tree.make(folder, name, stat.S_IFREG | 0o600, uid=owner.uid, gid=owner.gid)
    log.warning("written but never closed: kept as %s/%s", LOST_AND_FOUND.decode(), os.fsdecode(name))
    _seal_work(volume, kept, {slot: (path, os.stat(path).st_size) for slot, path in slots.items()})


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
