"""Load for an HTTP server: blocking sockets on threads, requests made beforehand, so that little of it is Python.

    python -m bench.load '{"port": ..., "kind": "upload", ...}'

Runs in a process of its own; prints one line of JSON with what it did and what CPU time it took.
"""

import json
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass, field

from bench.contents import content

_ANSWER = 64 * 1024


class BadAnswer(Exception):
    """The server did not do as asked."""


@dataclass(slots=True)
class Connection:
    """One keep-alive connection. A server that closes it between requests is connected to anew."""

    port: int
    stream: socket.socket | None = None
    buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(256 * 1024)))

    def exchange(self, *parts: bytes | memoryview) -> tuple[int, int, bytes]:
        """Send a request, read its answer: (status, bytes of the body, its first 64 KiB)."""
        if self.stream is None:
            self.stream = socket.create_connection(("127.0.0.1", self.port), 120)
            self.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            self.stream.sendall(part)
        head, body = self._head()
        lines = head.decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        total = self._rest(len(body), int(headers["content-length"]), body)
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), total, bytes(body)

    def _head(self) -> tuple[bytes, bytearray]:
        assert self.stream is not None
        received = bytearray()
        while (end := received.find(b"\r\n\r\n")) < 0:
            count = self.stream.recv_into(self.buffer)
            if not count:
                raise BadAnswer("the connection was closed before an answer")
            received += self.buffer[:count]
        return bytes(received[:end]), received[end + 4 :]

    def _rest(self, have: int, total: int, body: bytearray) -> int:
        assert self.stream is not None
        while have < total:
            count = self.stream.recv_into(self.buffer)
            if not count:
                raise BadAnswer("the connection was closed within an answer")
            if len(body) < _ANSWER:
                body += self.buffer[:count]
            have += count
        return have

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


@dataclass(slots=True)
class Load:
    """What to do: ``count`` requests in all over ``connections``. ``names``: what can be downloaded."""

    port: int
    kind: str
    size: int
    count: int
    connections: int
    token: str = ""
    names: list[str] = field(default_factory=list)
    plain: bool = False
    """Whether it is a plain file server: PUT and GET of paths."""
    done: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def run(self) -> float:
        """Seconds it took."""
        data = memoryview(content(7, self.size))
        ready = threading.Barrier(self.connections + 1)
        threads = [
            threading.Thread(target=self._work, args=(number, data, ready)) for number in range(self.connections)
        ]
        for thread in threads:
            thread.start()
        ready.wait()
        started = time.monotonic()
        for thread in threads:
            thread.join()
        return time.monotonic() - started

    def _work(self, number: int, data: memoryview, ready: threading.Barrier) -> None:
        connection = Connection(self.port)
        ready.wait()
        try:
            for turn in range(number, self.count, self.connections):
                start = time.monotonic()
                if self.kind == "upload":
                    self._upload(connection, data)
                else:
                    self._download(connection, turn)
                self.latencies.append(time.monotonic() - start)
        except (OSError, BadAnswer, KeyError, ValueError) as error:
            self.errors.append(f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    def _upload(self, connection: Connection, data: memoryview) -> None:
        """Each content differs in its first bytes: a node keeps one object of equal ones."""
        name = secrets.token_hex(16)
        body = (name.encode(), data[32:])
        if self.plain:
            head = f"PUT /{name} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(data)}\r\n\r\n"
            status, _, answer = connection.exchange(head.encode() + body[0], body[1])
        else:
            form = f'--{name}\r\nContent-Disposition: form-data; name="token"\r\n\r\n{self.token}\r\n--{name}\r\n'
            form += f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n'
            form += "Content-Type: application/octet-stream\r\n\r\n"
            tail = f"\r\n--{name}--\r\n".encode()
            length = len(form) + len(data) + len(tail)
            head = f"POST /api/upload HTTP/1.1\r\nHost: bench\r\nContent-Length: {length}\r\n"
            head += f"Content-Type: multipart/form-data; boundary={name}\r\n\r\n{form}"
            status, _, answer = connection.exchange(head.encode() + body[0], body[1], tail)
        if status not in (200, 201, 204):
            raise BadAnswer(f"{status} {answer[:200]!r}")
        self.done.append(name if self.plain else _link(answer))

    def _download(self, connection: Connection, turn: int) -> None:
        name = self.names[turn % len(self.names)]
        path = f"/{name}" if self.plain else f"/api/download/{name if self.kind == 'opened' else name[:64]}"
        status, size, _ = connection.exchange(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
        if status != 200 or size != self.size:
            raise BadAnswer(f"{status}, {size} bytes of {name}")


def _link(answer: bytes) -> str:
    told = json.loads(answer)
    return f"{told['filehash']}?key={told['key']}"


def main() -> None:
    load = Load(**json.loads(sys.argv[1]))
    before = time.process_time()
    seconds = load.run()
    cpu = time.process_time() - before
    ordered = sorted(load.latencies) or [0.0]
    answer = {
        "seconds": seconds,
        "requests": len(load.latencies),
        "cpu": cpu,
        "median_ms": ordered[len(ordered) // 2] * 1000,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1000,
        "done": load.done,
        "errors": load.errors,
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
