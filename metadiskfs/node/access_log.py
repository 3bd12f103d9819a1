"""One line a request, in the combined log format, without a key or a token in it.

Keys and tokens stand in query strings, in the query of a referring page, and in the paths of the account routes.
"""

import logging
import re
import time

import falcon

log = logging.getLogger(__name__)

_TOKEN_PATH = re.compile(r"^(/accounts/token/(?:balance|redeem|deposit|withdraw)/).*", re.DOTALL)
_UNSAFE = re.compile(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]")
_KEY = re.compile(r"key=[0-9A-Fa-f]+")


def write(request: falcon.Request, response: falcon.Response, size: int) -> None:
    """Log one request; ``size`` is what the answer announces, in bytes. Nothing is done where no one listens."""
    if not log.isEnabledFor(logging.INFO):
        return
    log.info(
        '%s - - [%s] "%s %s %s" %d %d "%s" "%s"',
        request.remote_addr,
        time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime()),
        request.method,
        path(request.path),
        request.env["SERVER_PROTOCOL"],
        response.status_code,
        size,
        _escape((request.referer or "-").partition("?")[0]),
        _escape(request.user_agent or "-"),
    )


def path(text: str) -> str:
    """A path fit for the log: no token, no control character, no quote."""
    return _escape(_TOKEN_PATH.sub(r"\1-", text))


def _escape(text: str) -> str:
    text = _KEY.sub("key=-", text)  # a link pasted with its '?' escaped arrives as part of the path
    return _UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
