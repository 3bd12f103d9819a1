"""The node as an object: uploads with proven receipts, downloads as a stream of ciphertext.

The only importer of requests; its exceptions, and those of what lies below it, end in ``Client._translated``. Uploads
and downloads go straight to the connection pool of the session: what Session.request adds to each call (cookies,
hooks, redirects, the environment) is not wanted and costs more CPU than the call itself (measured for a 4 KiB GET:
614 against 241 microseconds). The rare routes take the plain way.
"""

import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar, cast
from urllib.parse import quote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse, HTTPConnectionPool, Retry, Timeout
from urllib3.exceptions import HTTPError, InvalidHeader

from metadiskfs.errors import (
    BalanceInsufficient,
    ContentMismatch,
    NodeBusy,
    NodeError,
    NodeRefused,
    NodeUnreachable,
    ObjectMissing,
    ObjectTooLarge,
    UsageError,
)
from metadiskfs.metadisk import wire
from metadiskfs.metadisk.body import Progress, Source, UploadBody, filehash_of
from metadiskfs.metadisk.bounded import BOUNDS, POOLS
from metadiskfs.metadisk.tokens import Tokens

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_ANSWER = 64 * 1024
"""Bytes. No JSON answer of a node is anywhere near as long; an endless one must not fill the memory."""
_MAX_RETRY_AFTER = 3600.0
_NO_LIMIT = 1_000_000_000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_SLOWEST_LINE = 4 * 1024
"""Bytes per second below which an upload is given up: a node that takes a byte now and then is not there."""
_SLOWEST_NODE = 8 * 1024 * 1024
"""Bytes per second at which a node may hash, encrypt and sync an upload before it answers."""
_BALANCE_ROUTE = "/accounts/token/balance/"
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "metadiskfs"}
_OBJECT_HEADERS = {**_HEADERS, "Prefer": wire.UNPROVEN}


@dataclass(frozen=True, slots=True)
class Receipt:
    """A proven upload: the node has this content under this link, sealed from this counter start.

    ``blocks``: concatenated digests of its blocks where asked for, b"" for a content of one block.
    """

    link: wire.Link
    counter_start: int
    blocks: bytes = b""


class _Adapter(HTTPAdapter):
    """requests' adapter over connections whose every wait is bounded."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = POOLS


class Client:
    """One node. Safe to use from any thread: the pool lends each exchange a connection of its own.

    ``token`` is used as it is where one is given; otherwise the node is asked for one before the first upload.
    Times in seconds. Every method raises NodeError and its kind, nothing else but what it names.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        connect_timeout: float = 5.0,
        read_timeout: float = 20.0,
        ca_file: str = "",
        connections: int = 16,
    ) -> None:
        """``ca_file``: whose certificates to trust instead of the usual authorities'. Connects to nothing yet."""
        self.url = url.rstrip("/")
        self._path = urlsplit(self.url).path
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = ca_file or True
        adapter = _Adapter(pool_connections=1, pool_maxsize=connections)
        self._session.mount(self.url, adapter)
        anything = requests.Request("GET", self.url).prepare()
        self._pool = cast(HTTPConnectionPool, adapter.get_connection_with_tls_context(anything, self._session.verify))
        adapter.cert_verify(self._pool, self.url, self._session.verify, None)  # type: ignore[no-untyped-call]
        self._tokens = Tokens(self._new_token, self._balance, fixed=token)
        self._counter_start = wire.COUNTER_STARTS[0]
        self._downloads_cost = False

    def close(self) -> None:
        self._session.close()

    # -- what a node does -----------------------------------------------------------------------------------------

    def upload(
        self, source: Source, *, tries: int = 3, want_blocks: bool = False, progress: Progress = lambda _sent: None
    ) -> Receipt:
        """Put a content on the node and prove the receipt.

        Raises ChunkDamaged where the content is not what ``source`` says; then the connection was cut before the
        last byte, so that the node keeps nothing. An upload that moves on is given time; one that stands still for
        the read timeout is tried again, ``tries`` times in all.
        """
        started = time.monotonic()
        patience = self._read_timeout + source.size / _SLOWEST_NODE
        deadline = started + tries * patience + source.size / _SLOWEST_LINE
        key = wire.convergent_key(source.sha256)

        def attempt() -> Receipt:
            with BOUNDS.within(patience, deadline):
                return self._upload_once(source, key, want_blocks, progress)

        receipt = persist(attempt, deadline=deadline, tries=tries)
        elapsed = (time.monotonic() - started) * 1000
        log.info("uploaded %s, %d bytes, %.0f ms", receipt.link.filehash, source.size, elapsed)
        return receipt

    def exists(self, filehash: str, *, deadline: float = 15.0) -> bool:
        """Ask whether the node has the object (HEAD; a charging node charges for it). ``deadline`` in seconds."""
        until = time.monotonic() + deadline

        def attempt() -> bool:
            with BOUNDS.within(self._read_timeout, until):
                try:
                    self._answer(self.request_object("HEAD", filehash))
                except ObjectMissing:
                    return False
                return True

        return persist(attempt, deadline=until)

    def find(self, filehash: str, *, deadline: float = 15.0) -> dict[str, Any] | None:
        """What the node tells of an object, None where it knows none (old nodes: until it is synced)."""
        try:
            return self._json("GET", wire.FIND_ROUTE + _checked(filehash), deadline)
        except ObjectMissing:
            return None

    def status(self, *, deadline: float = 15.0) -> dict[str, Any]:
        """The node's own figures: storage, bandwidth. Untrusted like all it says."""
        return self._json("GET", wire.STATUS_ROUTE, deadline)

    # -- for stream.py: one answer with an object ------------------------------------------------------------------

    def request_object(self, method: str, filehash: str, headers: dict[str, str] | None = None) -> BaseHTTPResponse:
        """Ask for an object's ciphertext, within BOUNDS; the answer (200, 206) is unread, the caller's to close."""
        route = wire.DOWNLOAD_ROUTE + _checked(filehash)
        for with_token in (self._downloads_cost, True):
            token = self._tokens.current() if with_token else ""
            query = f"?token={quote(token, safe='')}" if token else ""
            response = self._send(method, route + query, {**_OBJECT_HEADERS, **(headers or {})})
            if response.status in (200, 206):
                return response
            answer = self._answer(response)
            if response.status != 402 or with_token:
                break
            self._downloads_cost = True
        raise self._error(response, answer, f"object {filehash}")

    def read_object(self, response: BaseHTTPResponse, count: int) -> bytes:
        """Up to ``count`` bytes of the answer, within BOUNDS; b"" at its end. NodeUnreachable where it was cut."""
        with self._translated():
            return response.read(count)

    # -- one exchange ---------------------------------------------------------------------------------------------

    def _upload_once(self, source: Source, key: bytes, want_blocks: bool, progress: Progress) -> Receipt:
        counter_start = self._counter_start
        while True:
            token = self._tokens.current()
            body = UploadBody(
                source, token=token, key=key, counter_start=counter_start, want_blocks=want_blocks, progress=progress
            )
            headers = {**_HEADERS, "Content-Type": body.content_type, "Content-Length": str(len(body))}
            response = self._send("POST", wire.UPLOAD_ROUTE, headers, body)
            answer = self._answer(response)
            if not (response.status in (401, 402, 403) and self._tokens.renew(token, response.status)):
                break
        if response.status not in (200, 201):
            raise self._error(response, answer, "upload")
        if not body.filehash:
            raise ContentMismatch(f"{self.url} acknowledged an upload before it had all of it")
        link = _link(self.url, answer)
        if link != wire.Link(body.filehash, key.hex()):
            counter_start = self._prove(source, link)
        return Receipt(link, counter_start, body.blocks)

    def _prove(self, source: Source, link: wire.Link) -> int:
        """Find the counter start with which the receipt holds: another generation, or another passphrase."""
        for counter_start in wire.COUNTER_STARTS:
            if filehash_of(source, key=bytes.fromhex(link.key), counter_start=counter_start) == link.filehash:
                self._counter_start = counter_start
                return counter_start
        raise ContentMismatch(f"the receipt of {self.url} does not prove: it did not take what was sent")

    def _send(
        self, method: str, route: str, headers: dict[str, str], body: UploadBody | None = None
    ) -> BaseHTTPResponse:
        with self._translated():
            response: BaseHTTPResponse = self._pool.urlopen(
                method,
                self._path + route,
                body=body,  # type: ignore[arg-type]  # memoryviews are sent like bytes
                headers=headers,
                retries=False,
                redirect=False,
                assert_same_host=False,
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=min(self._connect_timeout, BOUNDS.left()), read=BOUNDS.patience),
            )
            return response

    def _json(self, method: str, route: str, deadline: float, *, tries: int = _NO_LIMIT) -> dict[str, Any]:
        """One of the rare routes. ``deadline`` in seconds."""
        until = time.monotonic() + deadline
        times = (self._connect_timeout, self._read_timeout)

        def attempt() -> dict[str, Any]:
            with BOUNDS.within(self._read_timeout, until):
                with self._translated():
                    raw = self._session.request(
                        method, self.url + route, headers=_HEADERS, timeout=times, stream=True, allow_redirects=False
                    ).raw
                answer = self._answer(raw)
            if raw.status != 200:
                raise self._error(raw, answer, route.rpartition("/")[0])
            return _object(self.url, answer)

        return persist(attempt, deadline=until, tries=tries)

    def _answer(self, response: BaseHTTPResponse) -> bytes:
        """The whole of a short answer; the connection goes back to the pool. NodeRefused where it is not short."""
        try:
            with self._translated(), BOUNDS.within_one_patience():
                answer = response.read(_MAX_ANSWER + 1, decode_content=False)
        finally:
            response.close()
        if len(answer) > _MAX_ANSWER:
            raise NodeRefused(f"{self.url} does not stop answering: not a MetaDisk node")
        return answer

    def _new_token(self) -> str:
        """Ask the node for a token, once: who needs it tries again. "" from a node that gives none."""
        try:
            token = self._json("POST", wire.TOKEN_ROUTE, self._read_timeout, tries=1).get("token")
        except (NodeRefused, ObjectMissing):
            return ""
        if not isinstance(token, str) or not (token.isascii() and token.isalnum() and len(token) <= 256):
            raise NodeRefused(f"{self.url} gave a token that is none")
        return token

    def _balance(self, token: str) -> int:
        """Bytes left on a token."""
        route = _BALANCE_ROUTE + quote(token, safe="")
        balance = self._json("GET", route, self._read_timeout, tries=1).get("balance")
        return balance if isinstance(balance, int) else 0

    # -- errors ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (requests.RequestException, HTTPError, HTTPException, OSError) as error:
            raise NodeUnreachable(f"{self.url} cannot be reached: {_reason(error)}") from error

    def _error(self, response: BaseHTTPResponse, answer: bytes, what: str) -> NodeError:
        """The answer as an exception. A 404 counts only when it speaks MetaDisk: any web server has pages to miss."""
        status, word = response.status, _word(answer)
        message = f"{self.url}: {what}: {status}{' ' + word if word else ''}"
        if status in (408, 429) or status >= 500:
            return NodeBusy(message, retry_after=_retry_after(response))
        if status == 402:
            return BalanceInsufficient(message)
        if status == 404 and "json" in response.headers.get("Content-Type", ""):
            return ObjectMissing(message)
        if status == 413:
            return ObjectTooLarge(message)
        if 300 <= status < 400:
            return NodeRefused(f"{message}: a redirect, which is not followed")
        return NodeRefused(message)


def persist(attempt: Callable[[], T], *, deadline: float, tries: int = _NO_LIMIT) -> T:
    """Call until it succeeds, as long as the error may pass, with growing pauses between.

    ``deadline`` is a reading of time.monotonic(). Raises the last error; at once, when the node named a time that
    lies beyond the deadline.
    """
    number = 1
    while True:
        try:
            return attempt()
        except NodeError as error:
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(number - 1, 10)) * random.uniform(0.5, 1)
            pause = max(pause, error.retry_after or 0.0)
            if not error.transient or number >= tries or time.monotonic() + pause >= deadline:
                raise
            log.debug("%s; trying again in %.1f s", error, pause)
        time.sleep(pause)
        number += 1


def _checked(filehash: str) -> str:
    if not wire.is_filehash(filehash):
        raise UsageError("not a filehash of 64 lower-case hex digits")
    return filehash


def _object(url: str, answer: bytes) -> dict[str, Any]:
    try:
        content = json.loads(answer)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise NodeRefused(f"{url} does not answer in JSON: not a MetaDisk node")
    return content


def _link(url: str, answer: bytes) -> wire.Link:
    content = _object(url, answer)
    filehash, key = content.get("filehash"), content.get("key")
    if not (isinstance(filehash, str) and isinstance(key, str) and wire.is_filehash(filehash) and wire.is_key(key)):
        raise ContentMismatch(f"{url} gave a receipt without filehash and key")
    return wire.Link(filehash, key.lower())


def _word(answer: bytes) -> str:
    """The node's own word for what went wrong, as far as it can be shown."""
    try:
        content = json.loads(answer)
        word = content.get("error") if isinstance(content, dict) else ""
    except (ValueError, RecursionError):
        return ""
    return "".join(letter for letter in str(word or "")[:80] if letter.isprintable())


def _retry_after(response: BaseHTTPResponse) -> float | None:
    value = response.headers.get("Retry-After")
    if not value:
        return None
    try:
        return min(_MAX_RETRY_AFTER, Retry().parse_retry_after(value))
    except (InvalidHeader, ValueError, OverflowError):
        return None


def _reason(error: BaseException) -> str:
    """The innermost cause in one line, which names neither route nor token."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
