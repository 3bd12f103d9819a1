"""The node as processes: a main one, which only watches, and workers, which answer.

The main process is single-threaded and holds nothing, so that workers can be forked from it at any time (SIGHUP
replaces them one after the other without losing a request). A worker dies with the main process however that dies.
SIGTERM: no new connections, the requests under way are answered, then everything ends; after ``stop_timeout`` anyway.

An embedded node belongs to the process that started it: when the pipe on its standard input closes, it ends.
"""

import ctypes
import functools
import http.client
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from granian.constants import HTTPModes, Interfaces, RuntimeModes, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.net import SocketSpec  # type: ignore[attr-defined]  # imported there under this name
from granian.server.mp import MPServer

from metadiskfs.errors import MetadiskfsError, UsageError
from metadiskfs.node.accounts import Accounts
from metadiskfs.node.engines import is_folder, open_engine
from metadiskfs.node.gate import Gate
from metadiskfs.node.server import Parts, build
from metadiskfs.node.settings import NodeSettings
from metadiskfs.node.stalls import StallWatcher
from metadiskfs.node.traffic import Traffic

log = logging.getLogger(__name__)

OnReady = Callable[[str], None]
"""Told the node's URL, in a worker process, once it answers."""

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LOGGING = {"handlers": {}, "formatters": {}, "loggers": {"_granian": {"level": "ERROR", "propagate": True}}}


def open_parts(settings: NodeSettings) -> Parts:
    """Open store and accounts in this process. Raises UsageError, OSError, NodeError."""
    engine = open_engine(settings)
    accounts = Accounts(settings.state_dir / "accounts.db")
    return Parts(engine, accounts, Traffic(accounts))


def serve(settings: NodeSettings, *, on_ready: OnReady, owner_fd: int = -1) -> None:
    """Run the node until SIGTERM or SIGINT, or until the other end of ``owner_fd`` (an embedded node's pipe) closes.

    Port 0 picks a free one. Raises UsageError where the address is taken or the store cannot be opened.
    """
    multiprocessing.set_start_method("fork", force=True)
    settings, reserved = _reserve(settings)
    _try_store(settings)
    loader = functools.partial(_load_worker, settings, os.getpid(), on_ready, owner_fd)
    try:
        _granian(settings).serve(target_loader=loader, wrap_loader=False)
    finally:
        reserved.close()


def _try_store(settings: NodeSettings) -> None:
    """Open the store once, so that what is wrong with it is said before any worker is started. Raises UsageError.

    For S3 in a process of its own: its client has threads, and this process is going to be forked.
    """
    if is_folder(settings.store):
        trouble = _trouble(settings)
    else:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.Process(target=lambda: sender.send(_trouble(settings)))
        child.start()
        sender.close()
        try:
            trouble = receiver.recv()
        except EOFError:
            trouble = "opening it ended the process"
        child.join()
    if trouble:
        raise UsageError(f"cannot use the store {settings.store}: {trouble}")


def _trouble(settings: NodeSettings) -> str:
    try:
        open_parts(settings).close()
    except (OSError, MetadiskfsError) as error:
        return str(error)
    return ""


def url_of(settings: NodeSettings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{settings.port}"


class _Server(MPServer):
    """Granian with one listening socket for all workers, as it has it on other systems.

    On Linux it gives each worker one of its own (SO_REUSEPORT); then a worker that is renewed takes the connections
    waiting in its queue with it. Should a later granian name this method otherwise, that is what comes back.
    """

    def _init_shared_socket(self) -> None:
        self._ssp = None
        holder = SocketSpec(self.bind_addr, self.bind_port, self.backlog).build()
        self._shd, self._sfd = holder, holder.get_fd()  # type: ignore[assignment]  # no types of its own: None
        self._sso = socket.socket(fileno=self._sfd)
        self._sso.set_inheritable(True)


def _granian(settings: NodeSettings) -> MPServer:
    return _Server(
        "metadiskfs-node",
        address=settings.host,
        port=settings.port,
        interface=Interfaces.WSGI,
        http=HTTPModes.http1,
        workers=settings.workers,
        # Not its default "mt": there a worker that stops at once can miss its own wake-up and hang until it is killed
        # (granian 2.8, src/serve.rs: a condition variable waited for without looking whether it has happened).
        runtime_mode=RuntimeModes.st,
        blocking_threads=settings.threads,
        # Counts connections, idle ones too. A client that keeps a thousand open must not shut others out.
        backpressure=max(4096, settings.threads),
        http1_settings=HTTP1Settings(header_read_timeout=int(settings.header_timeout * 1000)),
        log_level=LogLevels.error,
        log_dictconfig=_LOGGING,
        ssl_cert=settings.tls_cert,
        ssl_key=settings.tls_key,
        ssl_protocol_min=SSLProtocols.tls12,
        workers_kill_timeout=settings.stop_timeout,
        respawn_failed_workers=settings.workers > 1,
        respawn_interval=1.0,  # what a new worker gets to begin before the old one is stopped; it needs a tenth
        websockets=False,
    )


def _reserve(settings: NodeSettings) -> tuple[NodeSettings, socket.socket]:
    """Make sure that the address is free, and where the port is 0 choose one and keep it.

    The server lets its port be shared (SO_REUSEPORT): of two nodes of one user started by mistake each would get half
    of the requests. So it is first asked for alone. A bound socket that does not listen gets no connections, it
    only keeps a chosen port from being given to someone else.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_STREAM)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if settings.port == 0:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind((settings.host, settings.port))
    except OSError as error:  # a name that does not resolve is one, too
        probe.close()
        raise UsageError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
    address = probe.getsockname()  # a name became an address, which is what the server wants
    if settings.port:
        probe.close()
    return replace(settings, host=address[0], port=address[1]), probe


def _load_worker(settings: NodeSettings, main_pid: int, on_ready: OnReady, owner_fd: int) -> Gate:
    """What a worker does first; it returns the application to be served."""
    _die_with(main_pid)
    _keep_memory()
    parts = open_parts(settings)
    multiprocessing.util.Finalize(None, parts.close, exitpriority=1)  # atexit does not run in such a process
    gate = build(settings, parts)
    StallWatcher(gate, settings.stall_timeout).start()
    threading.Thread(target=_announce, args=(settings, on_ready), name="ready", daemon=True).start()
    if owner_fd >= 0:
        threading.Thread(target=_end_with_owner, args=(owner_fd, main_pid), name="owner", daemon=True).start()
    return gate


def _die_with(main_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends: nobody else would after a kill -9 of the parent."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != main_pid:  # it ended before the line above
        os._exit(1)


def _keep_memory() -> None:
    """Let the allocator keep what bodies were held in, instead of giving it back and asking for it again.

    Bodies of 4 MiB are beyond glibc's threshold for mmap: two thousand page faults each, half of all CPU time of an
    upload. Few arenas, because each keeps its own. Where the C library is another one there is nothing to tell it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20), (_M_ARENA_MAX, 2)):
            libc.mallopt(option, value)


def _announce(settings: NodeSettings, on_ready: OnReady) -> None:
    """Tell when the first request is answered: the server itself has no such hook.

    A connection proves nothing, the main process listens already; and a SIGTERM before the worker serves is lost.
    """
    while True:
        connection = _connect_to(settings)
        try:
            connection.request("HEAD", "/healthz")
            connection.getresponse().read()
            break
        except (OSError, http.client.HTTPException):
            time.sleep(0.005)
        finally:
            connection.close()
    on_ready(url_of(settings))


def _connect_to(settings: NodeSettings) -> http.client.HTTPConnection:
    if settings.tls_cert is None:
        return http.client.HTTPConnection(settings.host, settings.port, timeout=5)
    itself = ssl.create_default_context()
    itself.check_hostname = False  # whatever names the certificate has, this is the node's own socket
    itself.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(settings.host, settings.port, timeout=5, context=itself)


def _end_with_owner(owner_fd: int, main_pid: int) -> None:
    while os.read(owner_fd, 4096):
        pass
    log.info("the owner of this node has gone")
    os.kill(main_pid, signal.SIGTERM)
