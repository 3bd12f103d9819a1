"""An object's ciphertext as a stream that outlives broken connections."""

import re
import time
from types import TracebackType
from typing import Self

from urllib3 import BaseHTTPResponse

from metadiskfs.errors import ContentMismatch, NodeRefused, NodeUnreachable
from metadiskfs.metadisk.bounded import BOUNDS
from metadiskfs.metadisk.client import Client, persist

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d{1,19}/(?:\d{1,19}|\*)")
_SKIP = 128 * 1024


class ObjectStream:
    """The bytes ``start`` to ``stop`` of an object, without the key: nothing here is proven, that is the reader's.

    Where a connection breaks, the stream goes on with another from the byte it had reached. A node that ignores
    ranges sends the object from its beginning: at first that is given to the reader (look at ``start``: bytes
    already paid for are not thrown away), later it is skipped. For one thread at a time; not for two at once.
    """

    def __init__(
        self,
        client: Client,
        filehash: str,
        *,
        size: int | None,
        start: int = 0,
        stop: int | None = None,
        deadline: float,
        progress: int,
        patience: float,
    ) -> None:
        """Open it. ``size``: bytes of the whole object where known; then a short or longer answer is an error.

        ``deadline``: seconds in which ``progress`` bytes must come each time, retries included; ``patience``:
        seconds to wait for any byte. Raises NodeError and its kind.
        """
        self._client = client
        self._filehash = filehash
        self._size = size
        self._stop = size if stop is None else stop
        self._window = deadline
        self._progress = progress
        self._patience = patience
        self._until = time.monotonic() + deadline
        self._mark = self._position = start
        self._response: BaseHTTPResponse | None = None
        self.start = persist(self._open, deadline=self._until)
        self._mark = self._position = self.start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection; one with an unread rest is cut."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def read(self, count: int) -> bytes:
        """Read ``count`` bytes; fewer only at the end of an object of unknown size. Raises NodeError and its kind."""
        if self._stop is not None:
            count = min(count, self._stop - self._position)
        goal = self._position + count
        pieces: list[bytes] = []
        while self._position < goal:
            piece = persist(lambda: self._some(goal - self._position), deadline=self._until)
            if not piece:
                break
            pieces.append(piece)
            self._position += len(piece)
            self._note_progress()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _note_progress(self) -> None:
        if self._position - self._mark >= self._progress:
            self._mark = self._position
            self._until = time.monotonic() + self._window

    def _some(self, count: int) -> bytes:
        """The next bytes, from a new connection where the last one broke."""
        if self._response is None:
            self._skip(self._position - self._open())
        return self._receive(count)

    def _receive(self, count: int) -> bytes:
        assert self._response is not None
        try:
            with BOUNDS.within(self._patience, self._until):
                piece = self._client.read_object(self._response, count)
        except NodeUnreachable:
            self.close()
            raise
        if not piece and self._stop is not None:
            self._ended_early()
        return piece

    def _ended_early(self) -> None:
        """The answer is over and the object is not. Only one that says how long it is can be known to be whole."""
        assert self._response is not None
        complete = "Content-Length" in self._response.headers or getattr(self._response, "chunked", False)
        self.close()
        if complete:
            raise ContentMismatch(f"object {self._filehash} is shorter than it should be")
        raise NodeUnreachable(f"the answer with object {self._filehash} was cut off")

    def _skip(self, count: int) -> None:
        while count:
            count -= len(self._receive(min(count, _SKIP)))

    def _open(self) -> int:
        """Ask for the object from ``_position`` on; the byte with which the node really begins."""
        ranged = self._position > 0 or (self._stop is not None and self._stop != self._size)
        last = "" if self._stop is None else str(self._stop - 1)
        headers = {"Range": f"bytes={self._position}-{last}"} if ranged else None
        with BOUNDS.within(self._patience, self._until):
            self._response = self._client.request_object("GET", self._filehash, headers)
        try:
            return self._check(self._response)
        except (NodeRefused, ContentMismatch):
            self.close()
            raise

    def _check(self, response: BaseHTTPResponse) -> int:
        begin, expected = 0, self._size
        if response.status == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != self._position:
                raise NodeRefused(f"asked for object {self._filehash} from a byte on, the node sent another part")
            begin, expected = self._position, None if self._stop is None else self._stop - self._position
        announced = response.headers.get("Content-Length", "")
        if expected is not None and announced.isdecimal() and int(announced) != expected:
            raise ContentMismatch(f"object {self._filehash} has not the length it should have")
        return begin
