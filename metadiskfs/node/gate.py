"""What stands between the HTTP server and the routes: who may come in, and how long one may dawdle.

A request holds one thread from its first byte to its last. Three walls keep slow or greedy clients from taking all
of them: a client may have only so many requests, and fewer uploads, under way (429 beyond); a body or an answer that
moves more slowly than MIN_RATE is cut off; and where nothing moves at all, which leaves the thread waiting inside
the server, a watcher shuts the connection's socket down (stalls.py), so that the thread comes back with an error.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from metadiskfs.node.settings import NodeSettings

log = logging.getLogger(__name__)

MIN_RATE = 4096
"""Bytes a second, on average, that a body must bring once it has lasted longer than the stall timeout."""

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
WsgiApp = Callable[[Environ, StartResponse], Iterable[bytes]]


class BodyTooSlow(OSError):
    """A request body came in more slowly than MIN_RATE."""


class Passage:
    """One request under way. ``waiting_since`` (monotonic) is set while it waits for its client, else 0."""

    __slots__ = ("client", "is_upload", "waiting_since")

    def __init__(self, client: str, is_upload: bool) -> None:
        self.client = client
        self.is_upload = is_upload
        self.waiting_since = 0.0


class Gate:
    """WSGI middleware around the routes. Called from any thread."""

    def __init__(self, app: WsgiApp, settings: NodeSettings) -> None:
        self._app = app
        self._settings = settings
        self._lock = threading.Lock()
        self._inside: set[Passage] = set()
        self._requests: Counter[str] = Counter()
        self._uploads: Counter[str] = Counter()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        passage = Passage(environ["REMOTE_ADDR"].removeprefix("::ffff:"), environ["REQUEST_METHOD"] == "POST")
        if not self._enter(passage):
            return _refuse(start_response)
        try:
            environ["wsgi.input"] = _Body(environ["wsgi.input"], passage, self._settings.stall_timeout)
            answer = self._app(environ, start_response)
        except BaseException:
            self._leave(passage)
            raise
        if isinstance(answer, list):
            self._leave(passage)
            return answer
        return _Answer(answer, passage, self._leave)

    def stalled(self, now: float) -> set[str]:
        """Clients with a request that has waited for them longer than the stall timeout."""
        limit = now - self._settings.stall_timeout
        with self._lock:
            return {passage.client for passage in self._inside if 0 < passage.waiting_since < limit}

    def _enter(self, passage: Passage) -> bool:
        client = passage.client
        with self._lock:
            if self._requests[client] >= self._settings.client_requests:
                return False
            if passage.is_upload and self._uploads[client] >= self._settings.client_uploads:
                return False
            self._inside.add(passage)
            self._requests[client] += 1
            self._uploads[client] += passage.is_upload
        return True

    def _leave(self, passage: Passage) -> None:
        with self._lock:
            if passage not in self._inside:
                return
            self._inside.discard(passage)
            for counter, count in ((self._requests, 1), (self._uploads, int(passage.is_upload))):
                counter[passage.client] -= count
                if counter[passage.client] <= 0:
                    del counter[passage.client]


class _Body:
    """A request body that notes when it waits for the client. Raises BodyTooSlow."""

    def __init__(self, body: Any, passage: Passage, patience: float) -> None:
        self._read = body.read
        self._passage = passage
        self._patience = patience
        self._begun = 0.0
        self._size = 0

    def read(self, size: int = -1) -> bytes:
        now = time.monotonic()
        self._begun = self._begun or now
        lasted = now - self._begun
        if lasted > self._patience and self._size < lasted * MIN_RATE:
            raise BodyTooSlow("the request body comes in too slowly")
        self._passage.waiting_since = now
        try:
            data: bytes = self._read(size)
        finally:
            self._passage.waiting_since = 0.0
        self._size += len(data)
        return data


class _Answer:
    """A streamed answer: the server asks for a piece when it could pass on the one before.

    So the time between two pieces is the client's. A piece has PIECE bytes at most, which makes the stall timeout a
    lowest rate as well.
    """

    def __init__(self, inner: Iterable[bytes], passage: Passage, leave: Callable[[Passage], None]) -> None:
        self._inner = inner
        self._pieces = iter(inner)
        self._passage = passage
        self._leave = leave

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self._passage.waiting_since = 0.0
        piece = next(self._pieces)
        self._passage.waiting_since = time.monotonic()
        return piece

    def close(self) -> None:
        """Called by the server after the last piece, and when the client went away."""
        try:
            if hasattr(self._inner, "close"):
                self._inner.close()
        finally:
            self._leave(self._passage)


def _refuse(start_response: StartResponse) -> list[bytes]:
    body = b'{"error": "too-many-requests"}'
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Retry-After", "1")]
    start_response("429 Too Many Requests", headers)
    return [body]
