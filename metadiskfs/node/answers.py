"""How errors look to a client: always JSON with an ``error``, as every MetaDisk client reads it."""

import errno
import logging

import falcon

from metadiskfs.errors import BalanceInsufficient, ContentMismatch, MetadiskfsError, ObjectMissing, ObjectTooLarge
from metadiskfs.metadisk import wire
from metadiskfs.node.gate import BodyTooSlow

log = logging.getLogger(__name__)

_WORDS = {
    400: "bad-request",
    404: "not-found",
    405: "method-not-allowed",
    413: "file-too-large",
    415: "bad-request",
}
_FAILURES = {wire.UPLOAD_ROUTE: "upload-error", wire.DOWNLOAD_ROUTE: "error-downloading-file"}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Refusal(Exception):
    """Answer with this status and ``{"error": word}``; nothing is logged but the request's line."""

    def __init__(self, status: int, word: str) -> None:
        super().__init__(word)
        self.status = status
        self.word = word


def refuse(response: falcon.Response, status: int, word: str) -> None:
    response.status = status
    response.media = {"error": word}


def install(app: falcon.App[falcon.Request, falcon.Response]) -> None:
    """Make ``app`` answer every error in that form. Unforeseen ones are logged with a traceback."""

    def on_refusal(
        request: falcon.Request, response: falcon.Response, error: Refusal, params: dict[str, object]
    ) -> None:
        refuse(response, error.status, error.word)

    def on_http_error(
        request: falcon.Request, response: falcon.Response, error: falcon.HTTPError, params: dict[str, object]
    ) -> None:
        response.set_headers(error.headers or {})
        refuse(response, error.status_code, _WORDS.get(error.status_code, "bad-request"))

    def on_other(
        request: falcon.Request, response: falcon.Response, error: Exception, params: dict[str, object]
    ) -> None:
        status, word = classify(
            error, _FAILURES.get((request.uri_template or "").partition("{")[0], "internal-error")
        )
        if status == 500:
            log.error("%s %s failed", request.method, request.uri_template, exc_info=error)
        refuse(response, status, word)

    app.add_error_handler(Exception, on_other)
    app.add_error_handler(falcon.HTTPError, on_http_error)
    app.add_error_handler(Refusal, on_refusal)


def classify(error: Exception, failure_word: str) -> tuple[int, str]:
    """The status and the word for an error that no route expected."""
    if isinstance(error, ObjectMissing):
        return 404, "file-not-found"
    if isinstance(error, BalanceInsufficient):
        return 402, "balance-insufficient"
    if isinstance(error, ObjectTooLarge):
        return 413, "file-too-large"
    if isinstance(error, BodyTooSlow):
        return 408, "too-slow"
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        log.error("the disk is full: %s", error)
        return 507, "insufficient-storage"
    if isinstance(error, ContentMismatch):
        log.error("%s", error)  # naming the object: this is for whoever runs the node
        return 500, "error-downloading-file"
    if isinstance(error, MetadiskfsError):
        log.error("%s: %s", type(error).__name__, error)
        return 503, failure_word  # the store behind this node: worth another try
    return 500, failure_word
