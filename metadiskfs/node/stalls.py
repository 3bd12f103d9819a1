"""Cutting off connections that hold a thread and do not move. Linux only: it asks the kernel about its sockets.

The HTTP server gives no access to a request's socket, and a thread that waits inside it for a client cannot be
woken. But the sockets are this process's own descriptors, and the kernel knows when each last moved.
"""

import contextlib
import fcntl
import logging
import os
import socket
import struct
import termios
import threading
import time

from metadiskfs.node.gate import Gate

log = logging.getLogger(__name__)

_TCP_INFO_SIZE = 104
_LAST_DATA_SENT, _LAST_DATA_RECEIVED = 44, 52  # offsets in struct tcp_info (linux/tcp.h): milliseconds, 32 bit


def watch(gate: Gate, patience: float) -> threading.Thread:
    """Start the watcher of this process; it looks four times per ``patience`` seconds."""
    thread = threading.Thread(target=_run, args=(gate, patience), name="stalls", daemon=True)
    thread.start()
    return thread


def _run(gate: Gate, patience: float) -> None:
    while True:
        time.sleep(min(5.0, patience / 4))
        try:
            if clients := gate.stalled(time.monotonic()):
                cut_idle(clients, patience)
        except Exception:
            log.exception("looking for stalled connections failed")


def cut_idle(clients: set[str], patience: float) -> int:
    """Shut down this process's connections to ``clients`` that did not move for ``patience`` seconds; how many.

    A client with one stalled request may lose a second one that the node has worked on for as long without sending a
    byte; it comes again.
    """
    cut = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile, or no connected socket
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if _peer(connection) in clients and _is_idle(connection, patience):
                    connection.shutdown(socket.SHUT_RDWR)
                    cut += 1
    if cut:
        log.warning("cut %d connections that did not move for %.0f s", cut, patience)
    return cut


def _peer(connection: socket.socket) -> str:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        raise ValueError("not TCP")
    address = str(connection.getpeername()[0])
    return address.removeprefix("::ffff:")


def _is_idle(connection: socket.socket, patience: float) -> bool:
    """Nothing came in, and either nothing went out or what goes out is not taken."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    sent = struct.unpack_from("=I", info, _LAST_DATA_SENT)[0]
    received = struct.unpack_from("=I", info, _LAST_DATA_RECEIVED)[0]
    unsent = struct.unpack("=i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    limit = patience * 1000
    return bool(received > limit and (sent > limit or unsent > 0))
