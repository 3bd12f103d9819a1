"""The routes of objects: upload, download, find."""

import contextlib
import hmac
import logging
import re
import time
from collections.abc import Iterator

import falcon
from falcon.media.multipart import BodyPart, MultipartFormHandler, MultipartParseOptions

from metadiskfs.errors import ContentMismatch, ObjectMissing
from metadiskfs.metadisk import wire
from metadiskfs.node import names, sealing
from metadiskfs.node.accounts import Accounts
from metadiskfs.node.answers import Refusal
from metadiskfs.node.engine import Engine, Facts
from metadiskfs.node.proofs import STREAM_FROM, Pieces, ProvenReader
from metadiskfs.node.sealing import Sealed
from metadiskfs.node.settings import NodeSettings
from metadiskfs.node.traffic import Traffic

log = logging.getLogger(__name__)

UPLOAD_PRICE, DOWNLOAD_PRICE = 4, 1
"""Bytes of balance for each byte up and down, as the old servers charged."""

_FORM_OVERHEAD = 64 << 10  # what a form may weigh beside its file
_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII)


class Upload:
    """POST /api/upload. The form's parts may come in any order; nothing is stored before its closing boundary."""

    def __init__(self, settings: NodeSettings, engine: Engine, accounts: Accounts, traffic: Traffic) -> None:
        self._settings, self._engine, self._accounts, self._traffic = settings, engine, accounts, traffic
        self._budget = sealing.MemoryBudget(settings.memory)
        options = MultipartParseOptions()
        options.max_body_part_buffer_size = 4096  # the token's part; the file is streamed
        self._forms = MultipartFormHandler(options)

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        length = request.content_length
        if length is not None and length > self._settings.max_file_size + _FORM_OVERHEAD:
            raise Refusal(413, "file-too-large")
        try:
            link = self._receive(request, length)
        except UnicodeDecodeError as error:  # headers of a part that are no UTF-8
            raise Refusal(400, "bad-request") from error
        response.status = 201
        response.media = {"filehash": link.filehash, "key": link.key}

    def _receive(self, request: falcon.Request, length: int | None) -> wire.Link:
        form = _Form(request, self._forms, self._settings.max_file_size + _FORM_OVERHEAD, self._settings.upload_token)
        part = form.find_file()
        limit = self._settings.max_file_size
        if length is not None and length <= sealing.IN_MEMORY and self._budget.take(length):
            try:
                body = sealing.Body(length)
                body.receive(part.stream.read, limit)
                form.finish()
                return self._store(body.seal(), form)
            finally:
                self._budget.give_back(length)
        with sealing.spooled(part.stream.read, self._engine.spools, limit) as (spool, key):
            form.finish()
            return self._store(sealing.seal_spool(spool, key), form)

    def _store(self, sealed: Sealed, form: "_Form") -> wire.Link:
        """Charge, put, count. A put that fails costs nothing."""
        cost = sealed.size * UPLOAD_PRICE if self._settings.charge else 0
        if cost:
            self._accounts.withdraw(form.token, cost)
        try:
            new = self._engine.put(sealed.link.filehash, sealed.content, Facts(form.filename, int(time.time())))
        except BaseException:
            if cost:
                self._accounts.deposit(form.token, cost)
            raise
        self._traffic.put(sealed.size if new else None)
        self._traffic.received(sealed.size)
        return sealed.link


class _Form:
    """A multipart form read part by part; the file's content stays in the stream until the caller reads it."""

    def __init__(
        self, request: falcon.Request, forms: MultipartFormHandler, max_length: int, upload_token: str
    ) -> None:
        if not (request.content_type or "").lower().startswith("multipart/form-data"):
            raise Refusal(400, "no-file")
        length = request.content_length
        if length is None:  # a chunked body ends by itself; the parser wants an upper bound
            length = max_length
        self._parts = iter(forms.deserialize(request.stream, request.content_type, length))
        self._upload_token = upload_token
        self.token = ""
        self.filename = ""

    def find_file(self) -> BodyPart:
        """Read up to the content of the first usable file. Raises Refusal where there is none.

        An embedded node wants the right token before the file: what a stranger sends is not even spooled.
        """
        for part in self._parts:
            if part.name == "file" and part.filename:
                if self._upload_token and not _same(self.token, self._upload_token):
                    raise Refusal(401, "invalid-token")
                self.filename = names.clean(part.filename)
                return part
            self._look_at(part)
        raise Refusal(400, "no-file")

    def finish(self) -> None:
        """Read the rest, to the closing boundary. Raises falcon.MultipartParseError where that is missing."""
        for part in self._parts:
            self._look_at(part)

    def _look_at(self, part: BodyPart) -> None:
        if part.name == "token" and not self.token:
            self.token = part.get_data().decode("ascii", "replace").strip()


class Download:
    """GET and HEAD /api/download/FILEHASH: plaintext with a key, ciphertext without."""

    def __init__(self, settings: NodeSettings, engine: Engine, accounts: Accounts, traffic: Traffic) -> None:
        self._settings, self._engine, self._accounts, self._traffic = settings, engine, accounts, traffic
        self._proven = ProvenReader(settings.memory)

    def on_get(self, request: falcon.Request, response: falcon.Response, filehash: str) -> None:
        stored = self._engine.open(filehash)
        with contextlib.ExitStack() as cleanup:
            cleanup.enter_context(stored)
            key, size, facts = _read_key(request), stored.size, stored.facts()
            wanted = _read_range(request, response, size)
            start, stop = wanted or (0, size)
            if request.method != "HEAD":
                with self._charged(request, stop - start), self._counting_damage():
                    if key is None and request.get_header("Prefer") == wire.UNPROVEN:
                        pieces = Pieces(stored.pieces(start, stop), stored.close)
                    else:
                        pieces = self._proven.open(stored, filehash, start, stop)
                cleanup.pop_all()  # from here on the answer's close() closes the object
                _fill(response, _Opened(pieces, key, start), stop - start)
                self._traffic.sent(stop - start)
            # Only now: an error's answer must carry none of it.
            response.content_length = stop - start
            response.set_headers(_download_headers(filehash, facts))
            if wanted:
                response.status = 206
                response.set_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")

    on_head = on_get

    @contextlib.contextmanager
    def _charged(self, request: falcon.Request, size: int) -> Iterator[None]:
        """Take what ``size`` bytes cost before the block, give it back if the block fails."""
        if not self._settings.charge:
            yield
            return
        token = request.get_param("token") or ""
        self._accounts.withdraw(token, size * DOWNLOAD_PRICE)
        try:
            yield
        except BaseException:
            self._accounts.deposit(token, size * DOWNLOAD_PRICE)
            raise

    @contextlib.contextmanager
    def _counting_damage(self) -> Iterator[None]:
        try:
            yield
        except ContentMismatch:
            self._traffic.event("damaged")
            raise


class _Opened:
    """Pieces decrypted on their way out, where there is a key. CTR opens anywhere.

    A class, not a generator: close() of a generator that was never started runs none of its code, and a client that
    leaves before the first byte would leave the object open.
    """

    def __init__(self, pieces: Pieces, key: bytes | None, start: int) -> None:
        self._pieces = pieces
        self._stream = wire.cipher_stream(key, offset=start) if key is not None else None
        self.close = pieces.close

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        piece = next(self._pieces)
        return self._stream.update(piece) if self._stream else piece


def _fill(response: falcon.Response, pieces: _Opened, size: int) -> None:
    """Whole where it is small; else piece by piece, or slow clients would pile whole answers up in memory."""
    if size > STREAM_FROM:
        response.stream = pieces
        return
    try:
        response.data = b"".join(pieces)
    finally:
        pieces.close()


def _read_key(request: falcon.Request) -> bytes | None:
    key = request.get_param("key")
    if key is None:
        return None
    if not wire.is_key(key):
        raise Refusal(400, "invalid-key")
    return bytes.fromhex(key)


def _read_range(request: falcon.Request, response: falcon.Response, size: int) -> tuple[int, int] | None:
    """Start and stop from the Range header; None, the whole, for several ranges and for what is no range.

    Raises Refusal (416) for a range beyond the object.
    """
    match = _RANGE.fullmatch((request.get_header("Range") or "").replace(" ", ""))
    if not match or not (match[1] or match[2]):
        return None
    if match[1]:
        start, stop = int(match[1]), min(int(match[2] or size) + 1, size)
        if match[2] and int(match[2]) < start:
            return None
    else:
        start, stop = max(size - int(match[2]), 0), size
    if start >= stop:
        response.set_header("Content-Range", f"bytes */{size}")
        raise Refusal(416, "range-not-satisfiable")
    return start, stop


def _download_headers(filehash: str, facts: Facts) -> dict[str, str]:
    return {
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"attachment; filename={_shown_name(filehash, facts)}",
        "X-Content-Type-Options": "nosniff",  # strangers' bytes under the page's origin: never more than a download
    }


def _shown_name(filehash: str, facts: Facts) -> str:
    return f"{filehash[:7]}_{facts.name or names.NAMELESS}"


class Find:
    """GET /api/find/FILEHASH."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def on_get(self, request: falcon.Request, response: falcon.Response, filehash: str) -> None:
        try:
            stored = self._engine.open(filehash)
        except ObjectMissing as error:
            raise Refusal(404, "File not found") from error
        with stored:
            facts = stored.facts()
            response.media = {
                "datetime": str(facts.stored_at),
                "filehash": filehash,
                "filename": _shown_name(filehash, facts),
                "filesize": stored.size,
                "uploads": [{"host_name": self._engine.label, "url": f"{request.prefix}/api/download/{filehash}"}],
                "version": "0.2",
            }

    on_head = on_get


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())
