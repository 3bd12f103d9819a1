"""The node as a WSGI application: every route of the web-core API (docs/PROTOCOL.md) over an Engine."""

import functools
import json
from dataclasses import dataclass

import falcon
from falcon.media import JSONHandler

from metadiskfs.metadisk import wire
from metadiskfs.node import access_log, answers
from metadiskfs.node.accounts import Accounts
from metadiskfs.node.engine import Engine
from metadiskfs.node.gate import Gate
from metadiskfs.node.health import Health, Metrics, Status, StoreSize
from metadiskfs.node.objects import Download, Find, Upload
from metadiskfs.node.page import Page
from metadiskfs.node.settings import NodeSettings
from metadiskfs.node.tokens import Balance, NewToken, Payment, Prices, Redeem
from metadiskfs.node.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Parts:
    """What a running node is made of; one set a process."""

    engine: Engine
    accounts: Accounts
    traffic: Traffic

    def close(self) -> None:
        self.traffic.close()
        self.accounts.close()
        self.engine.close()


def build(settings: NodeSettings, parts: Parts) -> Gate:
    """The whole application, gate included. It may be called from any number of threads."""
    app = falcon.App(middleware=[_Bookkeeping(parts.traffic)])
    if settings.cors_origins:
        origins = "*" if "*" in settings.cors_origins else settings.cors_origins
        app.add_middleware(falcon.CORSMiddleware(allow_origins=origins, expose_headers="Content-Disposition"))
    app.resp_options.media_handlers[falcon.MEDIA_JSON] = JSONHandler(dumps=functools.partial(json.dumps))
    app.req_options.strip_url_path_trailing_slash = False
    answers.install(app)
    _add_routes(app, settings, parts)
    return Gate(app, settings)


def _add_routes(app: falcon.App[falcon.Request, falcon.Response], settings: NodeSettings, parts: Parts) -> None:
    engine, accounts, traffic = parts.engine, parts.accounts, parts.traffic
    size = StoreSize(engine, traffic)
    token = "/accounts/token/"
    routes: dict[str, object] = {
        wire.UPLOAD_ROUTE: Upload(settings, engine, accounts, traffic),
        wire.DOWNLOAD_ROUTE + "{filehash}": Download(settings, engine, accounts, traffic),
        wire.FIND_ROUTE + "{filehash}": Find(engine),
        wire.STATUS_ROUTE: Status(settings, engine, traffic, size),
        wire.TOKEN_ROUTE: NewToken(),
        token + "balance/{token}": Balance(accounts),
        token + "prices": Prices(accounts),
        token + "redeem/{token}": Redeem(accounts),
        token + "deposit/{token}": Payment(settings, accounts, deposit=True),
        token + "withdraw/{token}": Payment(settings, accounts, deposit=False),
        "/healthz": Health(engine),
        "/metrics": Metrics(engine, traffic, size),
    }
    if settings.web_page:
        page = Page()
        routes |= {"/": page, "/web/{name}": page}
    for path, resource in routes.items():
        app.add_route(path, resource)


class _Bookkeeping:
    """After every answer: count it, log it."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def process_response(
        self, request: falcon.Request, response: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        route = type(resource).__name__.lower() if resource is not None else "none"
        self._traffic.answered(route, response.status_code)
        size = response.content_length
        if size is None:
            size = len(response.render_body() or b"")
        access_log.write(request, response, int(size))
