"""Cutting off connections that hold a thread and do not move. Linux only: it asks the kernel about its sockets.

The HTTP server gives no access to a request's socket, and a thread that waits inside it for a client cannot be
woken. But the sockets are this process's own descriptors, and the kernel knows how much each has moved.
"""

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

from metadiskfs.node.gate import Gate

log = logging.getLogger(__name__)

_TCP_INFO_SIZE = 136
_BYTES_ACKED, _BYTES_RECEIVED = 120, 128  # offsets in struct tcp_info (linux/tcp.h), 64 bit each
_PROGRESS = 16 << 10
"""Bytes, either way, that count as moving. Less in a whole stall timeout is a trickle."""


class StallWatcher:
    """Looks at all connections of this process, four times in ``patience`` seconds, from a thread of its own."""

    def __init__(self, gate: Gate, patience: float) -> None:
        self._gate = gate
        self._patience = patience
        self._marks: dict[str, tuple[float, int]] = {}  # socket -> when it last moved, bytes moved by then

    def start(self) -> None:
        threading.Thread(target=self._run, name="stalls", daemon=True).start()

    def look(self, now: float) -> int:
        """Note what has moved, and shut down what stands still for clients that hold a thread; how many.

        A client with one stalled request may lose a second one that the node has worked on for as long without
        sending a byte; it comes again.
        """
        stalled = self._gate.stalled(now)
        marks: dict[str, tuple[float, int]] = {}
        cut = 0
        for name, connection in _connections():
            moved = _bytes_moved(connection)
            mark = self._marks.get(name, (now, moved))
            marks[name] = (now, moved) if moved - mark[1] >= _PROGRESS else mark
            if now - marks[name][0] >= self._patience and _peer(connection) in stalled:
                with contextlib.suppress(OSError):  # closed this moment
                    connection.shutdown(socket.SHUT_RDWR)
                    cut += 1
        self._marks = marks
        if cut:
            log.warning("cut %d connections that did not move for %.0f s", cut, self._patience)
        return cut

    def _run(self) -> None:
        while True:
            time.sleep(min(5.0, self._patience / 4))
            try:
                self.look(time.monotonic())
            except Exception:
                log.exception("looking for stalled connections failed")


def _connections() -> Iterator[tuple[str, socket.socket]]:
    """This process's connected TCP sockets, each under a name that no later one gets; valid until the next."""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if not name.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and _peer(connection):
                    yield name, connection


def _peer(connection: socket.socket) -> str:
    try:
        return str(connection.getpeername()[0]).removeprefix("::ffff:")
    except OSError:
        return ""  # a listening socket, or one that was closed this moment


def _bytes_moved(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    acked, received = (struct.unpack_from("=Q", info, offset)[0] for offset in (_BYTES_ACKED, _BYTES_RECEIVED))
    return int(acked) + int(received)
