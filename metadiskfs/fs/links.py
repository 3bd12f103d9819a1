"""From a file back to the network: the links that, fetched in order, are the file."""

import hashlib
import os

from metadiskfs.fs.inode import Inode
from metadiskfs.fs.volume import Volume
from metadiskfs.fs.work import WorkFile
from metadiskfs.metadisk.wire import Link, cipher_stream, convergent_key
from metadiskfs.store.chunks import ChunkRow, SealedWork
from metadiskfs.store.files import digest_of

_BUFFER = 1 << 20


def links_of(volume: Volume, inode: Inode) -> list[Link]:
    """The file's links, one a chunk-sized piece; an empty file has the one of empty content.

    Seals what open handles wrote. Holes, and chunks of which only a part counts, become chunks of their own that the
    file keeps from then on, so that what the lines name is uploaded and stays. May wait for the node (NodeError).
    """
    number = volume.open(inode, os.O_RDONLY)
    try:
        content = volume.handle(number).content
        assert content is not None
        content.seal()
        slots, size, chunk_size = content.slots(), inode.size, volume.index.chunk_size
        known: dict[int, Link] = {}
        links = []
        for slot in range(max(1, -(-size // chunk_size))):
            length = min(chunk_size, size - slot * chunk_size)
            held = slots.get(slot)
            if held is not None and held.length == held.size == length:
                chunk = held.chunk
            else:
                chunk = _chunk_of_piece(volume, inode, number, slot, length)
            if chunk not in known:
                known[chunk] = _link_of_chunk(volume, volume.chunks.require(chunk))
            links.append(known[chunk])
    finally:
        volume.release(number)
    volume.uploader.wake()
    return links


def _chunk_of_piece(volume: Volume, inode: Inode, handle: int, slot: int, length: int) -> int:
    """Make exactly these bytes of the file a chunk, and let the file keep it."""
    chunk_size, cache = volume.index.chunk_size, volume.cache
    work = WorkFile(cache.new_work_path(0, slot))
    with cache.descriptors.borrow(work.path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        done = 0
        while done < length:
            piece = volume.read(handle, min(_BUFFER, length - done), slot * chunk_size + done)
            if not piece:  # cut off meanwhile
                break
            os.pwrite(fd, piece, done)
            done += len(piece)
        digest = digest_of(fd)
    cache.count(pending=digest.size)
    return volume.chunks.pin(inode.number, SealedWork(work.path, digest, durable=False))


def _link_of_chunk(volume: Volume, chunk: ChunkRow) -> Link:
    if chunk.filehash:
        return Link(chunk.filehash, chunk.key)
    opened = volume.cache.open_chunk(chunk.sha256)
    if opened is None:  # stored in the meantime
        fresh = volume.chunks.require(chunk.id)
        return Link(fresh.filehash, fresh.key)
    key = convergent_key(chunk.sha256)
    stream = cipher_stream(key, counter_start=volume.chunks.usual_counter_start())
    hasher = hashlib.sha256()
    with opened as fd:
        offset = 0
        while piece := os.pread(fd, _BUFFER, offset):
            hasher.update(stream.update(piece))
            offset += len(piece)
    return Link(hasher.hexdigest(), key.hex())
