"""A transfer and its node in memory: for scenarios on the volume in-process, without processes or sockets."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from metadiskfs.metadisk import wire
from metadiskfs.metadisk.jobs import FetchJob, FetchResult, UploadJob, UploadResult


class MemoryNode:
    """Does every job at once, on a thread of its own; ``away`` makes it fail like a node that is down."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.away = False
        self.on_upload: Callable[[UploadResult], None] = lambda _result: None
        self.on_fetch: Callable[[FetchResult], None] = lambda _result: None

    def upload(self, *jobs: UploadJob) -> bool:
        for job in jobs:
            threading.Thread(target=self._upload, args=(job,)).start()
        return True

    def fetch(self, job: FetchJob) -> bool:
        threading.Thread(target=self._fetch, args=(job,)).start()
        return True

    def _upload(self, job: UploadJob) -> None:
        if self.away:
            self.on_upload(UploadResult(job.id, error="NodeUnreachable", message="away"))
            return
        try:
            plaintext = Path(job.path).read_bytes()
        except FileNotFoundError:
            self.on_upload(UploadResult(job.id, error="ChunkDamaged", message="gone"))
            return
        assert hashlib.sha256(plaintext).hexdigest() == job.sha256
        link = wire.link_of(plaintext)
        self.objects[link.filehash] = plaintext
        blocks = [plaintext[n : n + wire.BLOCK_SIZE] for n in range(0, len(plaintext), wire.BLOCK_SIZE)]
        digests = b"".join(map(wire.block_digest, blocks)) if len(blocks) > 1 else b""
        self.on_upload(UploadResult(job.id, link.filehash, link.key, 0, digests.hex()))

    def _fetch(self, job: FetchJob) -> None:
        plaintext = None if self.away else self.objects.get(job.filehash)
        if plaintext is None:
            error = "NodeUnreachable" if self.away else "ObjectMissing"
            self.on_fetch(FetchResult(job.id, error=error, message="away" if self.away else "unknown"))
            return
        Path(job.path).write_bytes(plaintext)
        self.on_fetch(FetchResult(job.id, 0, -(-len(plaintext) // wire.BLOCK_SIZE), done=True))
