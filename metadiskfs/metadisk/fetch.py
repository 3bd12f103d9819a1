"""One fetch job: an object's ciphertext from the node, opened, proven and written, block by block."""

import contextlib
import hashlib
import hmac
import os
from collections.abc import Generator, Iterator

from metadiskfs.errors import ContentMismatch
from metadiskfs.metadisk import wire
from metadiskfs.metadisk.client import Client
from metadiskfs.metadisk.jobs import FetchJob, FetchResult
from metadiskfs.metadisk.stream import ObjectStream

TOGETHER = 2
"""Blocks read, proven and told at once, but for the first one wanted."""


def fetch(client: Client, job: FetchJob, *, deadline: float, patience: float) -> Iterator[FetchResult]:
    """Do the job; yields what the mount is told, ``done`` last. On an error the file is removed.

    ``deadline``: seconds to the first proven block and between any two, ``patience``: seconds to wait for any byte.
    Raises NodeError and its kind, UsageError where the job makes no sense, OSError of the file.

    A file left by an earlier attempt is written over, not replaced: whoever has it open goes on reading there.
    """
    key = _key(job)
    fd = os.open(job.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    work = _Fetch(client, job, key, fd, deadline, patience)
    try:
        os.ftruncate(fd, job.size)
        yield from work.by_blocks() if job.blocks else work.whole()
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(job.path)
        raise
    finally:
        os.close(fd)


class _Fetch:
    def __init__(self, client: Client, job: FetchJob, key: bytes, fd: int, deadline: float, patience: float) -> None:
        self._client = client
        self._job = job
        self._key = key
        self._fd = fd
        self._deadline = deadline
        self._patience = patience
        self._count = -(-job.size // wire.BLOCK_SIZE)

    def whole(self) -> Iterator[FetchResult]:
        """Without block digests nothing is proven before the last byte is here."""
        digest, size = hashlib.sha256(), self._job.size
        if size:
            with self._stream(0, size, progress=size) as stream:
                cipher = wire.cipher_stream(self._key, counter_start=self._job.counter_start)
                for position in range(0, size, wire.BLOCK_SIZE):
                    plain = cipher.update(stream.read(min(wire.BLOCK_SIZE, size - position)))
                    digest.update(plain)
                    _write(self._fd, plain, position)
        if digest.hexdigest() != self._job.sha256:
            raise self._mismatch("")
        yield FetchResult(self._job.id, 0, self._count, done=True)

    def by_blocks(self) -> Iterator[FetchResult]:
        """From the first block wanted to the end, then what lies before it."""
        digests = bytes.fromhex(self._job.blocks)
        if len(digests) != self._count * wire.BLOCK_DIGEST_SIZE or not 0 <= self._job.first < self._count:
            raise ContentMismatch(f"the block digests of object {self._job.filehash} do not fit its size")
        begun = yield from self._pass(digests, self._job.first, self._count)
        if begun:
            yield from self._pass(digests, 0, begun)
        yield FetchResult(self._job.id, 0, self._count, done=True)

    def _pass(self, digests: bytes, start: int, stop: int) -> Generator[FetchResult, None, int]:
        """Blocks ``start`` to ``stop``; returns the block it began with (0 where the node ignores ranges)."""
        size, end = wire.BLOCK_SIZE, min(stop * wire.BLOCK_SIZE, self._job.size)
        with self._stream(start * size, end, progress=size) as stream:
            begun = stream.start // size
            cipher = wire.cipher_stream(self._key, offset=stream.start, counter_start=self._job.counter_start)
            block = begun
            while block < stop:
                until = min(stop, block + (TOGETHER if block > start else 1))
                plain = memoryview(cipher.update(stream.read(min(until * size, end) - block * size)))
                for number in range(block, until):
                    piece = plain[(number - block) * size : (number - block + 1) * size]
                    digest = digests[number * wire.BLOCK_DIGEST_SIZE : (number + 1) * wire.BLOCK_DIGEST_SIZE]
                    if not hmac.compare_digest(wire.block_digest(piece), digest):
                        raise self._mismatch(f" in block {number}")
                _write(self._fd, plain, block * size)
                yield FetchResult(self._job.id, block, until)
                block = until
        return begun

    def _stream(self, start: int, stop: int, *, progress: int) -> ObjectStream:
        return ObjectStream(
            self._client,
            self._job.filehash,
            size=self._job.size,
            start=start,
            stop=stop,
            deadline=self._deadline,
            progress=progress,
            patience=self._patience,
        )

    def _mismatch(self, where: str) -> ContentMismatch:
        return ContentMismatch(f"object {self._job.filehash} is not what was stored{where}")


def _key(job: FetchJob) -> bytes:
    if not wire.is_key(job.key) or job.size < 0:
        raise ContentMismatch(f"object {job.filehash} has no usable key")
    return bytes.fromhex(job.key)


def _write(fd: int, data: bytes | memoryview, position: int) -> None:
    done = os.pwrite(fd, data, position)
    while done < len(data):  # a disk that fills up takes a part first
        done += os.pwrite(fd, memoryview(data)[done:], position + done)
