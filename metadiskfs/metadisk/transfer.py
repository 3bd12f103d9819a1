"""The mount's handle on its transfer process: start it, hand it jobs, take its results, start it again.

The process is exec'ed, never forked: a fork would hold /dev/fuse and the volume's lock. It ends when its sockets are
closed, so it cannot outlive the mount.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

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

R = TypeVar("R", UploadResult, FetchResult)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_END_TIMEOUT = 5.0
_ENVIRONMENT = {
    # Two threads' worth of malloc arenas: with one per thread the process is twice as large for nothing.
    "MALLOC_ARENA_MAX": "2",
}


class Transfer:
    """One transfer process. ``upload`` and ``fetch`` may be called from any thread, under any lock: they never wait.

    Results come on threads of its own, one for uploads and one for fetches. The process is started anew when it dies,
    after a growing pause; then ``on_restart`` is called, and every job without a result must be handed out again. A
    job handed out while that goes on may be done twice: results for an id that has had its own are to be ignored.
    """

    def __init__(
        self,
        settings: TransferSettings,
        *,
        on_upload: Callable[[UploadResult], None],
        on_fetch: Callable[[FetchResult], None],
        on_restart: Callable[[], None],
    ) -> None:
        """Starts nothing yet (a daemon forks first). An exception of a callback is logged and ends nothing."""
        self._settings = settings
        self._on_upload = on_upload
        self._on_fetch = on_fetch
        self._on_restart = on_restart
        self._process: subprocess.Popen[bytes] | None = None
        self._uploads: socket.socket | None = None
        self._fetches: socket.socket | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        """Guards the sockets' going: held for one send that does not wait. A leaf."""
        self._receivers: list[threading.Thread] = []
        self._supervisor = threading.Thread(target=self._supervise, name="transfer", daemon=True)

    @property
    def pid(self) -> int:
        """Of the process that runs now or ran last; 0 before start()."""
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """Start the process and the threads that listen to it. Raises OSError where that is impossible."""
        self._spawn()
        self._supervisor.start()

    def upload(self, *jobs: UploadJob) -> bool:
        """Hand out jobs, to be done one after the other; each has a result of its own.

        False: none was taken, because the queue to the process is full or it is just being started. The caller keeps
        them then, and offers them again after the next result or on_restart.
        """
        return self._send(self._uploads, encode(jobs))

    def fetch(self, job: FetchJob) -> bool:
        """Hand out a job; like upload()."""
        return self._send(self._fetches, encode([job]))

    def close(self) -> None:
        """End the process; what it was doing is given up. Not to be called from a callback. May be called twice."""
        self._closing.set()
        self._drop_sockets()
        if self._supervisor.is_alive():
            self._supervisor.join()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _send(self, sock: socket.socket | None, message: bytes) -> bool:
        with self._lock:
            if sock is None or sock.fileno() < 0:
                return False
            try:
                sock.send(message, socket.MSG_DONTWAIT)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                return False
            return True

    def _spawn(self) -> None:
        uploads, uploads_there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fetches, fetches_there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        uploads.send(encode([self._settings]))
        ends = (uploads_there.fileno(), fetches_there.fileno())
        try:
            self._process = subprocess.Popen(
                # -P: whatever lies in the working directory is not imported.
                [sys.executable, "-P", "-m", "metadiskfs.metadisk.worker", *map(str, ends)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=ends,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": _python_path()},
                cwd="/",
                start_new_session=True,  # Ctrl-C and a closed terminal are the mount's business
            )
        except OSError:
            uploads.close()
            fetches.close()
            raise
        finally:
            uploads_there.close()
            fetches_there.close()
        self._listen(uploads, fetches)

    def _listen(self, uploads: socket.socket, fetches: socket.socket) -> None:
        self._receivers = [
            threading.Thread(
                target=_receive, args=(uploads, UploadResult, self._on_upload), name="transfer-uploads", daemon=True
            ),
            threading.Thread(
                target=_receive, args=(fetches, FetchResult, self._on_fetch), name="transfer-fetches", daemon=True
            ),
        ]
        for receiver in self._receivers:
            receiver.start()
        with self._lock:
            self._uploads, self._fetches = uploads, fetches
        if self._closing.is_set():  # close() came between: it had no chance to drop these
            self._drop_sockets()

    def _supervise(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            started = time.monotonic()
            self._wait_for_end()
            if self._closing.is_set():
                return
            pause = _FIRST_PAUSE if time.monotonic() - started > 2 * _LONGEST_PAUSE else pause
            while not self._restarted(pause):
                pause = min(_LONGEST_PAUSE, 2 * pause)
                if self._closing.is_set():
                    return
            pause = min(_LONGEST_PAUSE, 2 * pause)

    def _wait_for_end(self) -> None:
        """Until the process is gone and all it had said is heard."""
        assert self._process is not None
        for receiver in self._receivers:
            receiver.join()
        self._drop_sockets()
        try:
            status = self._process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if not self._closing.is_set():
            log.warning("the transfer process ended with status %d; starting it again", status)

    def _restarted(self, pause: float) -> bool:
        if self._closing.wait(pause):
            return False
        try:
            self._spawn()
        except OSError as error:
            log.error("the transfer process cannot be started: %s", error)
            return False
        _call(self._on_restart)
        return True

    def _drop_sockets(self) -> None:
        with self._lock:
            for sock in (self._uploads, self._fetches):
                if sock is not None and sock.fileno() >= 0:
                    try:
                        sock.shutdown(socket.SHUT_RDWR)  # wakes the receiver, which close() would not
                    except OSError as error:
                        log.debug("the transfer process had hung up already: %s", error)
                    sock.close()
            self._uploads = self._fetches = None


def _receive(sock: socket.socket, kind: type[R], tell: Callable[[R], None]) -> None:
    """Hand on results until the other end is gone."""
    while True:
        try:
            message = sock.recv(MAX_MESSAGE)
        except OSError as error:
            log.debug("the transfer process hung up: %s", error)
            return
        if not message:
            return
        for result in decode(kind, message):
            _call(tell, result)


def _call(callback: Callable[..., None], *arguments: object) -> None:
    try:
        callback(*arguments)
    except Exception:
        log.exception("a result of the transfer process could not be taken")


def _python_path() -> str:
    """Where the new process finds this very package, however this one was started."""
    here = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
