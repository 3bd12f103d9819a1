"""The body of an upload: made while it is sent, proven before its last byte goes out.

One pass over the chunk file gives everything: the SHA-256 of the plaintext (is this still the chunk?), the SHA-256 of
the ciphertext (the filehash the node must answer with) and the digests of the blocks. No network here.
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from metadiskfs.errors import ChunkDamaged
from metadiskfs.metadisk import wire

PIECE = 256 * 1024
"""Bytes read, hashed and sent at once; a multiple of wire.BLOCK_SIZE."""

_TOKEN_PART = '--{}\r\nContent-Disposition: form-data; name="token"\r\n\r\n{}\r\n'
_FILE_PART = (
    '--{0}\r\nContent-Disposition: form-data; name="file"; filename="{0}"\r\n'
    "Content-Type: application/octet-stream\r\n\r\n"
)


Progress = Callable[[int], None]
"""Told how many bytes of the content are under way; less than before when it begins anew."""


@dataclass(frozen=True, slots=True)
class Source:
    """``size`` bytes at ``offset`` of the open file ``fd``, which must prove to be ``sha256`` (the plain digest)."""

    fd: int
    size: int
    sha256: bytes
    offset: int = 0

    def pieces(self) -> Iterator[memoryview]:
        """The content in pieces, all in one buffer: each is gone when the next is asked for. Raises ChunkDamaged."""
        buffer = memoryview(bytearray(min(PIECE, self.size)))
        for start in range(0, self.size, PIECE):
            piece = buffer[: min(PIECE, self.size - start)]
            self._fill(piece, self.offset + start)
            yield piece

    def _fill(self, piece: memoryview, position: int) -> None:
        done = 0
        while done < len(piece):
            try:
                count = os.preadv(self.fd, [piece[done:]], position + done)
            except OSError as error:
                raise ChunkDamaged(f"chunk {self.sha256.hex()} cannot be read: {error.strerror}") from error
            if not count:
                raise ChunkDamaged(f"the file of chunk {self.sha256.hex()} is too short")
            done += count


class UploadBody:
    """A multipart form with one file, under a name that no other upload has.

    Servers of old let uploads under one name corrupt each other silently. The same random name is the boundary: fresh
    each time, because a content may well hold that of an earlier upload (a network capture kept in the mount).
    Iterating sends it; ``filehash`` and ``blocks`` are there afterwards. For one upload only: the name is part of it.
    """

    def __init__(
        self, source: Source, *, token: str, key: bytes, counter_start: int, want_blocks: bool, progress: Progress
    ) -> None:
        self._source = source
        self._stream = wire.cipher_stream(key, counter_start=counter_start)
        self._blocks: list[bytes] | None = [] if want_blocks and source.size > wire.BLOCK_SIZE else None
        name = secrets.token_hex(16)
        token_part = _TOKEN_PART.format(name, token) if token else ""
        self._head = (token_part + _FILE_PART.format(name)).encode("ascii")
        self._tail = f"\r\n--{name}--\r\n".encode("ascii")
        self.content_type = f"multipart/form-data; boundary={name}"
        self._progress = progress
        self.filehash = ""

    def __len__(self) -> int:
        return len(self._head) + self._source.size + len(self._tail)

    @property
    def blocks(self) -> bytes:
        """The concatenated digests of the blocks, b"" for a content of one block."""
        return b"".join(self._blocks or ())

    def __iter__(self) -> Iterator[bytes | memoryview]:
        """The body's bytes. Raises ChunkDamaged, in place of the last piece, where the content is another."""
        plain, cipher = hashlib.sha256(), hashlib.sha256()
        left, small = self._source.size, self._source.size <= PIECE
        if not small:
            yield self._head
        for piece in self._source.pieces():
            plain.update(piece)
            cipher.update(self._stream.update(piece))
            self._digest_blocks(piece)
            left -= len(piece)
            if left:
                yield piece
                self._progress(self._source.size - left)
        if plain.digest() != self._source.sha256:
            raise ChunkDamaged(f"the file of chunk {self._source.sha256.hex()} has another content")
        self.filehash = cipher.hexdigest()
        last = piece if self._source.size else b""
        if small:
            yield b"".join((self._head, last, self._tail))
        else:
            yield last
            yield self._tail
        self._progress(self._source.size)

    def _digest_blocks(self, piece: memoryview) -> None:
        if self._blocks is not None:
            for start in range(0, len(piece), wire.BLOCK_SIZE):
                self._blocks.append(wire.block_digest(piece[start : start + wire.BLOCK_SIZE]))


def filehash_of(source: Source, *, key: bytes, counter_start: int) -> str:
    """What a node would name this content, sealed with that key. Raises ChunkDamaged."""
    stream, digest = wire.cipher_stream(key, counter_start=counter_start), hashlib.sha256()
    for piece in source.pieces():
        digest.update(stream.update(piece))
    return digest.hexdigest()
