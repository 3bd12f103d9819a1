"""Whole files to and from a node, as the commands ``upload`` and ``download`` want them: no volume, any size."""

import hashlib
import os
from typing import BinaryIO

from metadiskfs.errors import ContentMismatch
from metadiskfs.metadisk import wire
from metadiskfs.metadisk.body import PIECE, Progress, Source
from metadiskfs.metadisk.client import Client, Receipt
from metadiskfs.metadisk.stream import ObjectStream

DOWNLOAD_LIMIT = 1 << 40
"""Bytes. No object is larger; an endless answer must end somewhere."""


def upload_part(
    client: Client, fd: int, *, offset: int = 0, size: int, progress: Progress = lambda _sent: None
) -> Receipt:
    """Put ``size`` bytes of an open file on the node as one object.

    Reads them twice: the key depends on the whole content. Raises NodeError and its kind (ObjectTooLarge where the
    node's limit is lower), ChunkDamaged when the file changed meanwhile.
    """
    digest = hashlib.sha256()
    for piece in Source(fd, size, b"", offset).pieces():
        digest.update(piece)
    return client.upload(Source(fd, size, digest.digest(), offset), progress=progress)


def download(
    client: Client,
    link: wire.Link,
    out: BinaryIO,
    *,
    deadline: float = 60.0,
    patience: float = 20.0,
    limit: int = DOWNLOAD_LIMIT,
    progress: Progress = lambda _received: None,
) -> int:
    """Fetch an object and open it into ``out``; returns the counter start it was sealed with.

    ``out`` is an empty file open for reading and writing, buffered. Nothing in it is proven before the
    return: the ciphertext by the filehash, the key by the plaintext it must have been derived from. ``deadline``:
    seconds in which another piece must come, retries included. Raises ContentMismatch where either proof fails,
    NodeError and its kind.
    """
    key = bytes.fromhex(link.key)
    streams = [wire.cipher_stream(key, counter_start=start) for start in wire.COUNTER_STARTS]
    plain, cipher, size = [hashlib.sha256() for _ in streams], hashlib.sha256(), 0
    with ObjectStream(
        client, link.filehash, size=None, deadline=deadline, progress=wire.BLOCK_SIZE, patience=patience
    ) as stream:
        while piece := stream.read(PIECE):
            size += len(piece)
            if size > limit:
                raise ContentMismatch(f"object {link.filehash} does not end after {limit} bytes")
            cipher.update(piece)
            opened = [each.update(piece) for each in streams]
            for digest, text in zip(plain, opened, strict=True):
                digest.update(text)
            out.write(opened[0])
            progress(size)
    if cipher.hexdigest() != link.filehash:
        raise ContentMismatch(f"what came for object {link.filehash} is not that object")
    for start, digest in zip(wire.COUNTER_STARTS, plain, strict=True):
        if wire.convergent_key(digest.digest()) == key:
            _reopen(out, key, start, size)
            return start
    raise ContentMismatch(f"the key of the link does not open object {link.filehash}")


def _reopen(out: BinaryIO, key: bytes, counter_start: int, size: int) -> None:
    """Put right in place what was opened from the first counter start and should have been from another."""
    first = wire.COUNTER_STARTS[0]
    if counter_start == first:
        return
    seal, unseal = wire.cipher_stream(key, counter_start=first), wire.cipher_stream(key, counter_start=counter_start)
    for position in range(0, size, PIECE):
        out.seek(position)
        opened = unseal.update(seal.update(out.read(min(PIECE, size - position))))
        out.seek(position)
        out.write(opened)
    out.seek(0, os.SEEK_END)
