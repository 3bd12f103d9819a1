"""The routes that tell of the node itself: status, healthz, metrics."""

import logging
import threading
import time

import falcon

from metadiskfs.errors import MetadiskfsError
from metadiskfs.node.engine import Engine
from metadiskfs.node.settings import NodeSettings
from metadiskfs.node.traffic import Traffic

log = logging.getLogger(__name__)

_COUNT_EVERY = 600.0
_COUNT_PATIENCE = 2.0


class StoreSize:
    """Bytes and number of objects in the store, counted in the background and not more often than needed.

    A million objects take seconds to list on a disk and a thousand requests at an S3 server, so the count may be ten
    minutes old; what the node's own processes have stored since is added to it. The first caller waits a moment for
    the count, so that a small store's is there at once.
    """

    def __init__(self, engine: Engine, traffic: Traffic) -> None:
        self._engine = engine
        self._traffic = traffic
        self._lock = threading.Lock()
        self._counting = False
        self._known = threading.Event()
        self._counted_at = 0.0
        self._counted = (0, 0)
        self._stored_before = (0, 0)

    def get(self) -> tuple[int, int]:
        """Bytes, objects."""
        with self._lock:
            due = not self._counting and (
                not self._known.is_set() or time.monotonic() > self._counted_at + _COUNT_EVERY
            )
            if due:
                self._counting = True
                threading.Thread(target=self._count, name="store-size", daemon=True).start()
        self._known.wait(_COUNT_PATIENCE)
        now = self._stored()
        return (
            self._counted[0] + now[0] - self._stored_before[0],
            self._counted[1] + now[1] - self._stored_before[1],
        )

    def _stored(self) -> tuple[int, int]:
        totals = self._traffic.totals()
        return totals.get("stored-bytes", 0), totals.get("stored", 0)

    def _count(self) -> None:
        size = objects = 0
        try:
            before = self._stored()
            for entry in self._engine.list():
                size, objects = size + entry.size, objects + 1
            self._counted, self._stored_before, self._counted_at = (size, objects), before, time.monotonic()
            self._known.set()
        except Exception:
            log.exception("counting the store failed")
        finally:
            with self._lock:
                self._counting = False


class Status:
    """GET /api/status."""

    def __init__(self, settings: NodeSettings, engine: Engine, traffic: Traffic, size: StoreSize) -> None:
        self._settings, self._engine, self._traffic, self._size = settings, engine, traffic, size

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        total, month = self._traffic.moved()
        used, _ = self._size.get()
        usage = self._engine.usage()
        nothing = {"count": 0, "size": 0}  # this node has no queues: an upload is stored when it is answered
        response.media = {
            "bandwidth": {
                "total": {"incoming": total.incoming, "outgoing": total.outgoing},
                "current": {"incoming": month.incoming, "outgoing": month.outgoing},
                "limits": {"incoming": 0, "outgoing": 0},
            },
            "storage": {
                "capacity": used + usage.free if usage.capacity else 0,
                "used": used,
                "max_file_size": self._settings.max_file_size,
            },
            "sync": {"cloud_queue": nothing, "blockchain_queue": nothing},
            "datacoin": {"balance": 0, "address": ""},
            "florincoin": {"balance": 0, "address": ""},  # the old page fails without it
        }

    on_head = on_get


class Health:
    """GET /healthz: 200 while the store can be written to in principle, 503 where it is full or gone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        try:
            usage = self._engine.usage()
        except (OSError, MetadiskfsError) as error:
            log.error("the store does not answer: %s", error)
            response.status, response.media = 503, {"status": "store-unreachable"}
            return
        full = usage.capacity and usage.free < self._MARGIN
        response.status = 503 if full else 200
        response.media = {"status": "store-full" if full else "ok"}

    on_head = on_get
    _MARGIN = 1 << 20


class Metrics:
    """GET /metrics in Prometheus' text format 0.0.4: all processes of the node together."""

    def __init__(self, engine: Engine, traffic: Traffic, size: StoreSize) -> None:
        self._engine, self._traffic, self._size = engine, traffic, size

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        totals = self._traffic.totals()
        used, objects = self._size.get()
        usage = self._engine.usage()
        lines = ["# TYPE metadisk_requests_total counter"]
        for name, value in sorted(totals.items()):
            if name.startswith("request:"):
                _, route, status = name.split(":")
                lines.append(f'metadisk_requests_total{{route="{route}",status="{status}"}} {value}')
        for metric, value in (
            ("received_bytes_total", totals.get("in", 0)),
            ("sent_bytes_total", totals.get("out", 0)),
            ("objects_stored_total", totals.get("stored", 0)),
            ("objects_existed_total", totals.get("existed", 0)),
            ("objects_damaged_total", totals.get("damaged", 0)),
        ):
            lines += [f"# TYPE metadisk_{metric} counter", f"metadisk_{metric} {value}"]
        for metric, value in (("store_objects", objects), ("store_bytes", used), ("store_free_bytes", usage.free)):
            lines += [f"# TYPE metadisk_{metric} gauge", f"metadisk_{metric} {value}"]
        response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        response.text = "\n".join(lines) + "\n"

    on_head = on_get
