"""Connections whose every wait is bounded, so that no node can hold a thread for ever.

A socket's own timeout starts anew with each byte that trickles in: a node that sends one header byte every few
seconds is never too slow for it. So the connection classes here ask ``BOUNDS`` before each send and each receive how
long they may still wait. The pool between us and the connection hands nothing through, which is why the bounds are
kept per thread; whoever starts an exchange sets them around it.
"""

import http.client
import io
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.wait import wait_for_read

_SLACK = 0.1
"""Seconds by which a wait may exceed its bound."""
_LARGE = 64 * 1024
"""Bytes. What is smaller is sent before a node could answer."""


class Bounds(threading.local):
    """How long this thread may wait: for one step at most ``patience`` seconds, for all until ``deadline``.

    ``deadline`` is a reading of time.monotonic().
    """

    patience: float = 20.0
    deadline: float = math.inf

    @contextmanager
    def within(self, patience: float, deadline: float) -> Iterator[None]:
        """Set both for what happens inside; a deadline already set is not put off."""
        before = self.patience, self.deadline
        self.patience, self.deadline = patience, min(deadline, self.deadline)
        try:
            yield
        finally:
            self.patience, self.deadline = before

    def within_one_patience(self) -> AbstractContextManager[None]:
        """For an answer of a few lines: it may neither be long in coming nor trickle."""
        return self.within(self.patience, time.monotonic() + self.patience)

    def left(self) -> float:
        """Seconds the next step may take. Raises TimeoutError when there are none left."""
        left = min(self.patience, self.deadline - time.monotonic())
        if left <= 0:
            raise TimeoutError("the time allowed for it is over")
        return left


BOUNDS = Bounds()


class _BoundedReader(io.RawIOBase):
    """The receiving end of a socket; each read asks BOUNDS first."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._raw: Any = sock.makefile("rb", buffering=0)  # keeps the descriptor open after the socket's close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left, present = BOUNDS.left(), self._sock.gettimeout()
        if present is None or not left <= present <= left + _SLACK:  # a system call, and there are many reads
            self._sock.settimeout(left)
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Incoming:
    """All that http.client's response wants of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_BoundedReader(self._sock))


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(_Incoming(sock), *args, **kwargs)  # type: ignore[arg-type]


class _BoundedMixin:
    """Bounded sending and receiving; stops sending as soon as the node has answered.

    A node that refuses a body (413) answers before it has read it, and then reads no further or cuts the line.
    """

    response_class = _Response
    sock: Any
    _answered_early = False

    def send(self, data: Any) -> None:
        """Send ``data``. BrokenPipeError when the node answered instead of reading: the pool reads the answer."""
        if self.sock is None:
            self.connect()  # type: ignore[attr-defined]
        view = memoryview(data)
        while len(view):
            # An encrypted line may become readable for reasons of its own (session tickets).
            if len(view) >= _LARGE and not isinstance(self.sock, ssl.SSLSocket):
                self._stop_if_answered()
            self.sock.settimeout(BOUNDS.left())
            try:
                view = view[self.sock.send(view) :]
            except TimeoutError:
                self._stop_if_answered()
                raise

    def _stop_if_answered(self) -> None:
        if wait_for_read(self.sock, timeout=0):
            self._answered_early = True
            raise BrokenPipeError("the node answered before it had read the body")

    def getresponse(self) -> Any:
        """Read the answer's head, all of it within one patience."""
        with BOUNDS.within_one_patience():
            return super().getresponse()  # type: ignore[misc]

    @property
    def is_connected(self) -> bool:
        """Whether the pool may lend it out again: not while it owes the rest of a body."""
        connected: bool = super().is_connected  # type: ignore[misc]
        return connected and not self._answered_early

    def close(self) -> None:
        self._answered_early = False
        super().close()  # type: ignore[misc]


class _BoundedHTTP(_BoundedMixin, HTTPConnection):  # type: ignore[misc]
    pass


class _BoundedHTTPS(_BoundedMixin, HTTPSConnection):  # type: ignore[misc]
    pass


class BoundedHTTPPool(HTTPConnectionPool):
    ConnectionCls = _BoundedHTTP


class BoundedHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _BoundedHTTPS


POOLS = {"http": BoundedHTTPPool, "https": BoundedHTTPSPool}
"""For PoolManager.pool_classes_by_scheme."""
