"""The transfer process: ``python -m metadiskfs.metadisk.worker UPLOAD_FD FETCH_FD``.

A process of its own because threads of the mount would halve its rate of creating files (docs/ARCHITECTURE.md). It
holds no state worth saving. Each thread waits in recv() on its socket, does one job at a time and sends the result
back; the kernel hands each job to one waiting thread. It ends when the other end of either socket is closed: the
mount is gone or wants no more.
"""

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator

from metadiskfs.errors import CacheFull, ChunkDamaged, MetadiskfsError, NodeError
from metadiskfs.metadisk.body import Source
from metadiskfs.metadisk.client import Client
from metadiskfs.metadisk.fetch import fetch
from metadiskfs.metadisk.jobs import (
    MAX_MESSAGE,
    FetchJob,
    FetchResult,
    TransferSettings,
    UploadJob,
    UploadResult,
    decode,
    encode,
)

log = logging.getLogger(__name__)

UPLOAD_THREADS = 4
FETCH_THREADS = 6
_URGENT_SECONDS = 0.05
"""How long a first block goes before all else: five times what it takes."""
_TOLD_WITHIN = 0.02
"""Seconds: hanging on one chunk must not hide what became of the one before."""
NICENESS = 10
"""Of the upload threads: somebody waits for the mount and for what it fetches, nobody for them."""


def run_upload(client: Client, job: UploadJob) -> UploadResult:
    """Do one job. Never raises: what went wrong is in the result."""
    try:
        fd = _open_chunk(job)
        try:
            source = Source(fd, job.size, bytes.fromhex(job.sha256))
            receipt = client.upload(source, want_blocks=True)
        finally:
            os.close(fd)
    except Exception as error:  # noqa: BLE001 - one poisonous chunk must not end the thread
        name, message, retry_after = _told(error, f"upload {job.id}")
        return UploadResult(job.id, error=name, message=message, retry_after=retry_after)
    link = receipt.link
    return UploadResult(job.id, link.filehash, link.key, receipt.counter_start, receipt.blocks.hex())


def run_uploads(client: Client, jobs: list[UploadJob], tell: Callable[[list[UploadResult]], object]) -> None:
    """Do the jobs of one message. Their results are told together, but none is kept back for long."""
    results: list[UploadResult] = []
    told = time.monotonic()
    for job in jobs:
        results.append(run_upload(client, job))
        if job is jobs[-1] or time.monotonic() - told > _TOLD_WITHIN:
            tell(results)
            results, told = [], time.monotonic()


class Urgency:
    """Who may read from the network next: a reader's first block goes before the rest of chunks and read-ahead.

    All threads share one interpreter lock: without this, what nobody waits for takes turns with what somebody does.
    A reader of that rest may be waiting all the same, so it does not stand back for long, least of all for a first
    block that hangs.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._urgent = 0
        self._until = 0.0

    @contextlib.contextmanager
    def urgent(self) -> Iterator[None]:
        with self._changed:
            self._urgent += 1
            self._until = time.monotonic() + _URGENT_SECONDS
        try:
            yield
        finally:
            with self._changed:
                self._urgent -= 1
                self._changed.notify_all()

    def give_way(self) -> None:
        """Wait for what became urgent lately."""
        with self._changed:
            self._changed.wait_for(lambda: not self._urgent, max(0.0, self._until - time.monotonic()))


def run_fetch(
    client: Client,
    job: FetchJob,
    settings: TransferSettings,
    urgency: Urgency,
    tell: Callable[[FetchResult], None],
) -> None:
    """Do one job, telling its results. Raises only what ``tell`` raises."""
    results = fetch(client, job, deadline=settings.read_deadline, patience=settings.read_timeout)
    try:
        if not job.ahead:
            with urgency.urgent():
                tell(next(results))
        urgency.give_way()
        for result in results:
            tell(result)
            urgency.give_way()
    except (BrokenPipeError, ConnectionResetError):
        raise  # of the socket pair: the network's never come as these
    except Exception as error:  # noqa: BLE001 - a job that fails must be told, whatever the reason
        name, message, _retry_after = _told(error, f"fetch {job.id}")
        tell(FetchResult(job.id, error=name, message=message))


def _open_chunk(job: UploadJob) -> int:
    try:
        fd = os.open(job.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ChunkDamaged(f"the file of chunk {job.sha256} cannot be opened: {error.strerror}") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != job.size:
        os.close(fd)
        raise ChunkDamaged(f"the file of chunk {job.sha256} has {found.st_size} bytes instead of {job.size}")
    return fd


def _told(error: Exception, what: str) -> tuple[str, str, float | None]:
    """Name, message and retry_after of an error as the mount is told it."""
    if isinstance(error, NodeError):
        return type(error).__name__, str(error), error.retry_after
    if isinstance(error, MetadiskfsError):
        return type(error).__name__, str(error), None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheFull.__name__, f"{what}: {error.strerror}", None
    log.error("%s failed in a way nobody foresaw", what, exc_info=error)
    return MetadiskfsError.__name__, f"{what}: {type(error).__name__}: {error}", None


def _serve(sock: socket.socket, do: Callable[[bytes], None], niceness: int = 0) -> None:
    """Work off one socket's jobs until its other end is gone."""
    os.nice(niceness)  # of this thread alone, on Linux
    try:
        while message := sock.recv(MAX_MESSAGE):
            do(message)
    except (BrokenPipeError, ConnectionResetError):
        return  # main() sees the hangup and ends the process


def _wait_for_hangup(*socks: socket.socket) -> None:
    """Return when the other end of one is closed. A thread stuck on the network does not keep us from seeing it."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock, 0)
    poll.poll()


def main(upload_fd: int, fetch_fd: int) -> None:
    """Serve both sockets until one is closed; then the process ends at once, whatever is under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the mount, which still has to drain its queue
    logging._srcfile = None  # its documented way not to look for the caller of each line
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uploads, fetches = socket.socket(fileno=upload_fd), socket.socket(fileno=fetch_fd)
    settings = decode(TransferSettings, uploads.recv(MAX_MESSAGE))[0]
    client = Client(
        settings.url,
        token=settings.token,
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
        ca_file=settings.ca_file,
    )

    def upload(message: bytes) -> None:
        run_uploads(client, decode(UploadJob, message), lambda results: uploads.send(encode(results)))

    def fetched(result: FetchResult) -> None:
        fetches.send(encode([result]))

    urgency = Urgency()

    def fetch_one(message: bytes) -> None:
        for job in decode(FetchJob, message):
            run_fetch(client, job, settings, urgency, fetched)

    for number in range(UPLOAD_THREADS):
        threading.Thread(
            target=_serve, args=(uploads, upload, NICENESS), name=f"upload-{number}", daemon=True
        ).start()
    for number in range(FETCH_THREADS):
        threading.Thread(target=_serve, args=(fetches, fetch_one), name=f"fetch-{number}", daemon=True).start()
    _wait_for_hangup(uploads, fetches)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
