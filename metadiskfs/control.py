"""How commands talk to a running mount: a socket in the volume's folder, one request a connection.

A request is one line of JSON with an ``op``; answers are lines of JSON, the last with ``done`` or ``error``. The
folder is 0700, so the socket is its owner's. A socket's address holds 107 bytes at most, so both ends reach it
through /proc/self/fd of the opened folder, however deep that lies.
"""

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from metadiskfs import errors
from metadiskfs.errors import MetadiskfsError, MountError, UsageError

log = logging.getLogger(__name__)

SOCKET_NAME = "control.sock"
_MAX_REQUEST = 1 << 20

Handler = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]
"""Takes the request, yields answers; raises MetadiskfsError or OSError to fail."""


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET_NAME}"
    finally:
        os.close(fd)


class ControlServer:
    """Answers requests on threads of its own."""

    def __init__(self, folder: Path, handlers: Mapping[str, Handler]) -> None:
        self._folder = folder
        self._handlers = handlers
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / SOCKET_NAME)  # of a session that died: the volume's lock is ours
        with _address(self._folder) as address:
            self._socket.bind(address)
        self._socket.listen(16)
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / SOCKET_NAME)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed by stop()
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream:
            try:
                request = json.loads(stream.readline(_MAX_REQUEST))
                handler = self._handlers.get(request.get("op"))
                if handler is None:
                    raise UsageError(f"unknown request {request.get('op')!r}")
                for answer in handler(request):
                    _send(stream, answer)
                _send(stream, {"done": True})
            except BrokenPipeError:
                log.debug("the asking command has gone")
            except MetadiskfsError as error:
                _send_error(stream, type(error).__name__, str(error))
            except (OSError, ValueError) as error:
                _send_error(stream, "MetadiskfsError", str(error))


def _send(stream: Any, answer: Mapping[str, Any]) -> None:
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()


def _send_error(stream: Any, kind: str, message: str) -> None:
    with contextlib.suppress(OSError):  # nobody is there to hear it
        _send(stream, {"error": kind, "message": message})


def _lines(connection: socket.socket, request: dict[str, Any]) -> Iterator[bytes]:
    """Send a request; the whole lines of its answer. One that dies over it just ends."""

    def received() -> Iterator[bytes]:
        with contextlib.suppress(ConnectionResetError), connection.makefile("rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield line

    with contextlib.suppress(BrokenPipeError):
        connection.sendall(json.dumps(request).encode() + b"\n")
    return received()


def ask(folder: Path, op: str, **values: Any) -> Iterator[dict[str, Any]]:
    """Send one request to the mount of the volume in ``folder``; yields its answers.

    Raises MountError where no mount runs, and the error the mount answered with.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            with _address(folder) as address:
                connection.connect(address)
        except OSError as error:
            raise MountError("the volume is not mounted") from error
        for line in _lines(connection, {"op": op, **values}):
            answer = json.loads(line)
            if "error" in answer:
                kind = getattr(errors, answer["error"], MetadiskfsError)
                raise kind(answer["message"])
            if answer.get("done"):
                return
            yield answer
    raise MountError("the mount ended while answering")


def ask_once(folder: Path, op: str, **values: Any) -> dict[str, Any]:
    """ask() for requests with exactly one answer, or none: then {}."""
    answers = list(ask(folder, op, **values))
    return answers[0] if answers else {}


def mounted_volumes(data_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, answer to 'mount') of every volume of this user that is mounted now."""
    found = []
    for path in sorted((data_dir / "volumes").glob(f"*/{SOCKET_NAME}")):
        with contextlib.suppress(MountError):
            found.append((path.parent, ask_once(path.parent, "mount")))
    return found
