"""A MetaDisk node that fails on command: a real socket, good until told otherwise.

In a test: ``with BadNode() as node: node.fail("download", "reset:1000", times=2)``.
As a process: ``python -m tests.metadisk.bad_node [--port N] [--fail ROUTE=FAULT[*TIMES]] [--set NAME=JSON]`` prints
its URL and serves until killed; then ``POST /bad/fail {"route", "fault", "times"}``, ``POST /bad/set {...}`` and
``GET /bad/requests`` steer it.

Routes: token, upload, download (GET and HEAD), find, status, balance, any. Faults (``times`` -1: for ever):

    status:CODE[:RETRY_AFTER]   a JSON error once the request was read
    html:CODE                   an HTML page
    early:CODE                  answers before it reads the body, then closes on the sender
    early-hold:CODE             the same, but neither reads on nor closes
    reset[:N]                   RST after N bytes of the body (upload: received, download: sent)
    hang[:N]                    goes silent after N bytes, the connection stays
    drip                        answers with one byte of header every 50 ms, for ever
    drip-body                   the same with the body
    slow:SECONDS                waits, then does its duty
    pace:SECONDS                waits before each 100,000 bytes of a download
    truncate:N                  announces the whole body, sends N bytes and closes
    short:N                     an orderly answer with the first N bytes only
    alter:N                     flips a bit of byte N
    endless                     an answer that never ends
    redirect:URL                302
    wrong-range                 206 with another part than asked for
    close                       closes after the answer without having said so
    receipt:filehash|key|html|list|empty|words      a 201 that proves nothing
    forget                      acknowledges an upload and keeps nothing
    ack-early                   a 201 before the body is read
"""

import argparse
import hashlib
import hmac
import json
import re
import socket
import ssl
import struct
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from metadiskfs.metadisk import wire

LINGER = struct.pack("ii", 1, 0)


@dataclass
class Request:
    method: str
    route: str
    path: str
    headers: dict[str, str]
    length: int
    complete: bool = True
    form: dict[str, str] = field(default_factory=dict)
    connection: int = 0


class _Cut(Exception):
    """The connection is done with."""


class BadNode:
    """Settings may be changed while it runs."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.reset()
        self._lock = threading.Lock()
        self._tls = tls
        self._stop = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def reset(self) -> None:
        """Become good again, and empty. Connections stay."""
        self.counter_start = 0
        self.passphrase = wire.PASSPHRASE
        self.ranges = True
        self.keep_alive = True
        self.lengths = "length"  # or "chunked", or "none": ended by closing
        self.good_tokens: set[str] | None = None  # others are refused with token_status
        self.token_status = 401
        self.balances: dict[str, int] = {}
        self.charge_downloads = False
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.connections = 0
        self.tokens_given = 0
        self._faults: dict[str, list[list[Any]]] = {}

    def stop(self) -> None:
        """Hang up everywhere; the port refuses from now on."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                sock.close()

    def fail(self, route: str, fault: str, times: int = 1) -> None:
        self._faults.setdefault(route, []).append([fault, times])

    def heal(self) -> None:
        self._faults.clear()

    def count(self, route: str) -> int:
        return sum(request.route == route for request in self.requests)

    def put(self, plaintext: bytes) -> wire.Link:
        """Store an object from behind, as this generation of node would."""
        digest = hashlib.sha256(plaintext).hexdigest().encode()
        key = hmac.digest(self.passphrase, digest, "sha256")
        ciphertext = wire.cipher_stream(key, counter_start=self.counter_start).update(plaintext)
        filehash = hashlib.sha256(ciphertext).hexdigest()
        self.objects[filehash] = ciphertext
        return wire.Link(filehash, key.hex())

    # -- connections ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock, self.connections), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with self._lock:
                self._open.add(sock)
            exchange = _Exchange(self, sock, number)
            while exchange.once():
                pass
        except (OSError, _Cut):
            pass
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()

    def next_fault(self, route: str) -> str:
        with self._lock:
            for name in (route, "any"):
                queue = self._faults.get(name)
                if queue:
                    fault: list[Any] = queue[0]
                    if fault[1] > 0:
                        fault[1] -= 1
                        if not fault[1]:
                            queue.pop(0)
                    return str(fault[0])
        return ""

    def hang(self) -> None:
        self._stop.wait()
        raise _Cut


class _Exchange:
    """The requests of one connection."""

    def __init__(self, node: BadNode, sock: socket.socket, number: int) -> None:
        self.node = node
        self.sock = sock
        self.number = number
        self.pending = b""
        self.close = False
        self.fault, self.arg = "", ""

    def once(self) -> bool:
        head = self._head()
        if not head:
            return False
        lines = head.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        route = _route(path)
        request = Request(
            method, route, path, headers, int(headers.get("content-length", "0")), connection=self.number
        )
        if route == "bad":
            self._steer(request)
            return True
        self.node.requests.append(request)
        self.fault, _, self.arg = self.node.next_fault(route).partition(":")
        self.close = not self.node.keep_alive or self.fault == "close"
        self._early(request)
        body = self._body(request)
        self._late()
        getattr(self, "_" + route)(request, body)
        return not self.close

    def _head(self) -> bytes:
        while b"\r\n\r\n" not in self.pending:
            piece = self.sock.recv(65536)
            if not piece:
                return b""
            self.pending += piece
        head, _, self.pending = self.pending.partition(b"\r\n\r\n")
        return head

    def _body(self, request: Request) -> bytes:
        if "transfer-encoding" in request.headers:
            self.json(400, {"error": "chunked"})
            raise _Cut
        limit = int(self.arg or 0) if self.fault in ("reset", "hang") and request.method == "POST" else None
        pieces, got = [self.pending], len(self.pending)
        while got < request.length:
            if limit is not None and got >= limit:
                self._reset() if self.fault == "reset" else self.node.hang()
            try:
                piece = self.sock.recv(65536)
            except OSError:
                piece = b""
            if not piece:
                request.complete = False
                raise _Cut
            pieces.append(piece)
            got += len(piece)
        whole = b"".join(pieces)
        self.pending = whole[request.length :]
        return whole[: request.length]

    def _reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        self.sock.close()
        raise _Cut

    def _early(self, request: Request) -> None:
        """Faults that come before the body was read."""
        if self.fault in ("early", "early-hold"):
            self.json(int(self.arg), {"error": "too-large"})
            if self.fault == "early-hold":
                self.node.hang()
            raise _Cut
        if self.fault == "ack-early":
            self.json(201, {"filehash": "0" * 64, "key": "0" * 64})
            self.node.hang()
        if self.fault == "reset" and (request.method != "GET" or not self.arg) and not int(self.arg or 0):
            self._reset()
        if self.fault == "hang" and request.method == "GET" and not self.arg:
            self.node.hang()

    def _late(self) -> None:
        """Faults that take the place of an answer."""
        if self.fault == "reset" and not self.arg:
            self._reset()
        if self.fault == "hang" and not self.arg:
            self.node.hang()
        if self.fault == "slow":
            time.sleep(float(self.arg))
        if self.fault == "drip":
            self._drip(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        if self.fault == "status":
            code, _, after = self.arg.partition(":")
            self.json(int(code), {"error": "told-to-fail"}, {"Retry-After": after} if after else {})
            raise _Cut
        if self.fault == "html":
            self._send(int(self.arg), b"<html><body>Bad Gateway</body></html>", {"Content-Type": "text/html"})
            raise _Cut
        if self.fault == "redirect":
            self._send(302, b"", {"Location": self.arg})
            raise _Cut
        if self.fault == "endless":
            self.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            while True:
                self.sock.sendall(b"x" * 65536)

    def _drip(self, begin: bytes) -> None:
        self.sock.sendall(begin)
        while not self.node._stop.wait(0.05):
            self.sock.sendall(b"x")
        raise _Cut

    # -- answers --------------------------------------------------------------------------------------------------

    def json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        said = "" if self.fault == "close" or not self.close else "Connection: close\r\n"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {status} Whatever\r\n{lines}{said}Content-Length: {len(body)}\r\n\r\n"
        self.sock.sendall(head.encode() + body)

    def _steer(self, request: Request) -> None:
        told = json.loads(self._body(request) or b"{}")
        if request.path == "/bad/fail":
            self.node.fail(told["route"], told["fault"], told.get("times", 1))
        elif request.path == "/bad/heal":
            self.node.heal()
        elif request.path == "/bad/set":
            for name, value in told.items():
                setattr(self.node, name, value.encode() if name == "passphrase" else value)
        self.json(200, [asdict(each) for each in self.node.requests])

    # -- the node's duties ----------------------------------------------------------------------------------------

    def _token(self, request: Request, _body: bytes) -> None:
        self.node.tokens_given += 1
        token = f"token{self.node.tokens_given:011}"
        self.json(200, {"token": token})

    def _balance(self, request: Request, _body: bytes) -> None:
        self.json(200, {"balance": self.node.balances.get(request.path.rpartition("/")[2], 0)})

    def _status(self, request: Request, _body: bytes) -> None:
        self.json(200, {"storage": {"capacity": 0, "used": 0, "max_file_size": 0}})

    def _find(self, request: Request, _body: bytes) -> None:
        filehash = request.path.rpartition("/")[2]
        if filehash in self.node.objects:
            self.json(200, {"filehash": filehash, "filesize": len(self.node.objects[filehash])})
        else:
            self.json(404, {"error": "File not found"})

    def _other(self, request: Request, _body: bytes) -> None:
        self._send(404, b"<html>nothing here</html>", {"Content-Type": "text/html"})

    def _upload(self, request: Request, body: bytes) -> None:
        request.form, content = _form(request.headers["content-type"], body)
        token = request.form.get("token", "")
        if self.node.good_tokens is not None and token not in self.node.good_tokens:
            self.json(self.node.token_status, {"error": "balance-insufficient"})
            return
        if content is None:
            self.json(400, {"error": "bad-request"})
            return
        link = self.node.put(content)
        if self.fault == "forget":
            del self.node.objects[link.filehash]
        receipt: Any = {"filehash": link.filehash, "key": link.key}
        if self.fault == "receipt":
            if self.arg == "html":
                self._send(201, b"<html>fine</html>", {"Content-Type": "text/html"})
                return
            receipt = {
                "filehash": {**receipt, "filehash": hashlib.sha256(b"other").hexdigest()},
                "key": {**receipt, "key": hashlib.sha256(b"other").hexdigest()},
                "list": [1],
                "empty": {},
                "words": {"filehash": "../../etc/passwd", "key": 7},
            }[self.arg]
        self.json(201, receipt)

    def _download(self, request: Request, _body: bytes) -> None:
        filehash = request.path.partition("?")[0].rpartition("/")[2]
        if self.node.charge_downloads and "token=" not in request.path:
            self.json(402, {"error": "balance-insufficient"})
            return
        if filehash not in self.node.objects:
            body = json.dumps({"error": "file-not-found"}).encode()
            head = f"HTTP/1.1 404 No\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            self.sock.sendall(head.encode() + (b"" if request.method == "HEAD" else body))
            return
        content = self.node.objects[filehash]
        status, extra, content = self._range(request, content)
        if request.method == "HEAD":
            self.sock.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode())
            return
        self._deliver(status, extra, content)

    def _range(self, request: Request, content: bytes) -> tuple[int, str, bytes]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if not match or not self.node.ranges:
            return 200, "", content
        start, stop = int(match[1]), int(match[2]) + 1 if match[2] else len(content)
        if self.fault == "wrong-range":
            start = max(0, start - 1)
        return 206, f"Content-Range: bytes {start}-{stop - 1}/{len(content)}\r\n", content[start:stop]

    def _deliver(self, status: int, extra: str, content: bytes) -> None:
        announced = len(content)
        if self.fault == "short":
            content = content[: int(self.arg)]
            announced = len(content)
        if self.fault == "alter":
            place = int(self.arg)
            content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        cut = int(self.arg) if self.fault in ("truncate", "reset", "hang") and self.arg else None
        how = self.node.lengths
        if how == "length":
            extra += f"Content-Length: {announced}\r\n"
        elif how == "chunked":
            extra += "Transfer-Encoding: chunked\r\n"
        said = "Connection: close\r\n" if how == "none" or (self.close and self.fault != "close") else ""
        self.sock.sendall(f"HTTP/1.1 {status} Yes\r\n{extra}{said}\r\n".encode())
        if self.fault == "drip-body":
            self._drip(b"")
        self._send_body(content if cut is None else content[:cut], how)
        if cut is not None:
            if self.fault == "reset":
                time.sleep(0.05)  # or the reset overtakes what was sent
                self._reset()
            if self.fault == "hang":
                self.node.hang()
            raise _Cut
        if how == "chunked":
            self.sock.sendall(b"0\r\n\r\n")
        if how == "none":
            raise _Cut

    def _send_body(self, content: bytes, how: str) -> None:
        if self.fault == "pace":
            for start in range(0, len(content), 100_000):
                time.sleep(float(self.arg))
                self.sock.sendall(content[start : start + 100_000])
            return
        if how != "chunked":
            self.sock.sendall(content)
            return
        for start in range(0, len(content), 30_000):
            piece = content[start : start + 30_000]
            self.sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))


def _route(path: str) -> str:
    for prefix, name in (
        ("/bad/", "bad"),
        (wire.UPLOAD_ROUTE, "upload"),
        (wire.DOWNLOAD_ROUTE, "download"),
        (wire.FIND_ROUTE, "find"),
        (wire.STATUS_ROUTE, "status"),
        (wire.TOKEN_ROUTE, "token"),
        ("/accounts/token/balance/", "balance"),
    ):
        if path.startswith(prefix):
            return name
    return "other"


def _form(content_type: str, body: bytes) -> tuple[dict[str, str], bytes | None]:
    """Fields and the file of a multipart form; None for a file that is not there or not whole."""
    boundary = b"--" + content_type.partition("boundary=")[2].encode()
    if not body.endswith(boundary + b"--\r\n"):
        return {}, None
    fields: dict[str, str] = {}
    content = None
    for part in (b"\r\n" + body).split(b"\r\n" + boundary)[1:-1]:
        head, _, value = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]*)"', head)
        filename = re.search(rb'filename="([^"]*)"', head)
        if filename:
            content = value
            fields["filename"] = filename[1].decode()
        elif name:
            fields[name[1].decode()] = value.decode()
    return fields, content


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fail", action="append", default=[], metavar="ROUTE=FAULT[*TIMES]")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON")
    options = parser.parse_args()
    node = BadNode(port=options.port)
    for text in options.fail:
        route, _, fault = text.partition("=")
        fault, _, times = fault.partition("*")
        node.fail(route, fault, int(times or 1))
    for text in options.set:
        name, _, value = text.partition("=")
        setattr(node, name, json.loads(value))
    print(node.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
