"""The page a browser gets at ``/``, and the files it needs. Read once at start."""

import re
from importlib import resources

import falcon

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# connect-src and the rest: the page talks to its own node only, runs its own scripts only, and is framed by nobody.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NAME = re.compile(r"[a-z]+\.[a-z]+")


class Page:
    """GET / and GET /web/NAME."""

    def __init__(self) -> None:
        folder = resources.files("metadiskfs.node") / "web"
        self._files = {item.name: item.read_bytes() for item in folder.iterdir() if _NAME.fullmatch(item.name)}

    def on_get(self, request: falcon.Request, response: falcon.Response, name: str = "index.html") -> None:
        content = self._files.get(name)
        if content is None:
            raise falcon.HTTPNotFound()
        response.content_type = _TYPES["." + name.rpartition(".")[2]]
        response.set_headers(
            {
                "Content-Security-Policy": _POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            }
        )
        response.data = content

    on_head = on_get
