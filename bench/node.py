"""``scripts/bench --node``: the node on its own, beside a plain file server on the same machine."""

import argparse
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import picture, processes
from bench.picture import Chart
from bench.processes import PROJECT, Failed, cpu_seconds, say, wait_for
from bench.report import markdown, show
from bench.workloads import MIB

Report = Callable[[argparse.Namespace, str, dict[str, object], str], None]
_SIZES = ((4096, 3000), (256 * 1024, 800), (4 * MIB, 100))
"""(bytes of a body, requests for it)."""
_CONNECTIONS = (1, 8, 32)
_LARGE, _MANY = 200 * MIB, 200

_NGINX = """
worker_processes 2; daemon off; pid {base}/nginx.pid; error_log {base}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000; client_max_body_size 1g;
  client_body_temp_path {base}/body; proxy_temp_path {base}/t1; fastcgi_temp_path {base}/t2;
  uwsgi_temp_path {base}/t3; scgi_temp_path {base}/t4;
  server {{ listen 127.0.0.1:{port}; root {base}/files; location / {{ dav_methods PUT; }} }}
}}
"""


class Server:
    """A server process on a port of its own."""

    plain = True

    def __init__(self, name: str, command: Sequence[str | Path], base: Path, port: int) -> None:
        self.name = name
        self.port = port
        self.token = ""
        self._process = processes.start(command, base / f"{name}.log", environment={"PYTHONPATH": str(PROJECT)})
        try:
            wait_for(lambda: processes.answers(port), f"{name} to answer; its log is {base / name}.log")
        except Failed:
            self.close()
            raise

    def roots(self) -> dict[str, int]:
        return {self.name: self._process.pid}

    def close(self) -> None:
        processes.end(self._process)


class Node(Server):
    """Ours, with limits a client address has raised: all the load comes from one."""

    plain = False

    def __init__(self, base: Path) -> None:
        port, limit = processes.free_port(), str(4 * _MANY)
        store = base / "store"
        store.mkdir()
        command = [sys.executable, "-m", "metadiskfs", "node", "--listen", f"127.0.0.1:{port}", "--store", str(store)]
        limits = ["--client-uploads", limit, "--client-requests", limit, "--threads", "256", "--access-log", "off"]
        super().__init__("node", [*command, *limits], base, port)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/accounts/token/new")
        self.token = json.loads(connection.getresponse().read())["token"]
        connection.close()


def nginx(base: Path) -> Server | None:
    """nginx as a file server; None where it is not installed."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
    if program is None:
        return None
    port = processes.free_port()
    base.chmod(0o755)
    (base / "files").mkdir(mode=0o777)
    if os.geteuid() == 0:
        os.chmod(base / "files", 0o777)  # its workers give root up
    config = base / "nginx.conf"
    config.write_text(_NGINX.format(base=base, port=port))
    return Server("nginx", [program, "-c", config, "-p", base], base, port)


@dataclass(frozen=True, slots=True)
class Measured:
    """One stretch of load on one server. ``cpu_ms``: of the server, a request. ``peak``: MiB so far."""

    server: str
    kind: str
    size: int
    connections: int
    per_second: float
    mib_per_second: float
    median_ms: float
    p99_ms: float
    cpu_ms: float
    client_cpu_ms: float
    peak: float
    errors: int


def load(
    server: Server, kind: str, size: int, count: int, connections: int, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the load in a process of its own. Raises Failed when no request came through."""
    request = {
        "port": server.port, "kind": kind, "size": size, "count": count, "connections": connections,
        "token": server.token, "names": list(names), "plain": server.plain,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench.load", json.dumps(request)], cwd=PROJECT, stdout=subprocess.PIPE, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    if answer["errors"]:
        say(f"  {server.name}: {len(answer['errors'])} connections failed: {answer['errors'][0]}")
    if not answer["requests"]:
        raise Failed(f"{server.name} answered no {kind}: {answer['errors'][:1]}")
    return answer


def measure(
    server: Server, kind: str, size: int, count: int, connections: int, names: Sequence[str] = ()
) -> tuple[Measured, list[str]]:
    """One stretch; with it the names of what was uploaded."""
    os.sync()
    before = sum(cpu_seconds(server.roots()).values())
    answer = load(server, kind, size, count, connections, names)
    cpu = sum(cpu_seconds(server.roots()).values()) - before
    requests = answer["requests"]
    measured = Measured(
        server.name, kind, size, connections,
        requests / answer["seconds"], requests * size / MIB / answer["seconds"],
        answer["median_ms"], answer["p99_ms"], cpu / requests * 1000, answer["cpu"] / requests * 1000,
        sum(processes.group_memory(server.roots()).values()) / MIB, len(answer["errors"]),
    )  # fmt: skip
    say(
        f"  {server.name:<6} {kind:<9}{size:>9} bytes, {connections:>3} connections: {measured.per_second:8.1f} /s"
        f" {measured.mib_per_second:7.1f} MiB/s, CPU {measured.cpu_ms:.2f} ms each, peak {measured.peak:.0f} MiB"
    )
    return measured, answer["done"]


def _speeds(servers: Sequence[Server], factor: float, rounds: int) -> list[Measured]:
    """Interleaved: every size and number of connections on one server, then the other, round by round."""
    found = []
    for _ in range(rounds):
        for size, requests in _SIZES:
            count = max(10, int(requests * factor))
            for connections in _CONNECTIONS:
                for server in servers:
                    measured, names = measure(server, "upload", size, count, connections)
                    found.append(measured)
                    found.append(measure(server, "download", size, count, connections, names)[0])
                    if not server.plain:
                        found.append(measure(server, "opened", size, count, connections, names)[0])
    return found


def _memory(server: Server, factor: float) -> list[Measured]:
    """Bodies of 200 MiB, then 200 connections: the node's peak must not grow with either."""
    large = max(MIB, int(_LARGE * factor))
    found = [measure(server, "upload", MIB, 20, 4)[0]]
    for connections in (1, 4):
        measured, names = measure(server, "upload", large, connections, connections)
        found += [measured, measure(server, "download", large, connections, connections, names)[0]]
        found.append(measure(server, "opened", large, connections, connections, names)[0])
    measured, names = measure(server, "upload", MIB, 2 * _MANY, _MANY)
    found += [measured, measure(server, "download", MIB, 2 * _MANY, _MANY, names)[0]]
    return found


def _table(found: Sequence[Measured]) -> str:
    lines = [
        ["server", "what", "body", "connections", "/s", "MiB/s", "ms", "p99", "CPU ms each", "client's", "peak MiB"]
    ]
    for one in found:
        body = f"{one.size // 1024} KiB" if one.size < MIB else f"{one.size // MIB} MiB"
        figures = [
            one.per_second,
            one.mib_per_second,
            one.median_ms,
            one.p99_ms,
            one.cpu_ms,
            one.client_cpu_ms,
            one.peak,
        ]
        lines.append([one.server, one.kind, body, str(one.connections), *[show(value) for value in figures]])
    return markdown(lines)


def _median_of(found: Sequence[Measured]) -> list[Measured]:
    """One line for each stretch: that of the median speed over the rounds."""
    groups: dict[tuple[str, str, int, int], list[Measured]] = {}
    for one in found:
        groups.setdefault((one.kind, one.server, one.size, one.connections), []).append(one)
    picked = [sorted(group, key=lambda one: one.per_second)[len(group) // 2] for group in groups.values()]
    return sorted(picked, key=lambda one: (one.kind != "upload", one.kind, one.size, one.connections, one.server))


def _charts(speeds: Sequence[Measured], memory: Sequence[Measured]) -> list[Chart]:
    shown = []
    for kind in ("upload", "download"):
        for size, _ in _SIZES:
            curves: dict[str, list[tuple[float, float]]] = {}
            for one in speeds:
                if one.size == size and one.kind in (kind, "opened" if kind == "download" else kind):
                    name = one.server if one.kind == kind else f"{one.server}, with the key"
                    value = one.per_second if size < MIB else one.mib_per_second
                    curves.setdefault(name, []).append((float(one.connections), value))
            unit = "/s" if size < MIB else "MiB/s"
            title = f"{kind}s of {size // 1024} KiB" if size < MIB else f"{kind}s of {size // MIB} MiB"
            shown.append(Chart(title, "connections", unit, curves, log_x=True))
    curve = [(float(number), one.peak) for number, one in enumerate(memory)]
    title = "Peak memory: 200 MiB bodies, then 200 connections"
    shown.append(Chart(title, "stretch of load", "MiB", {"node": curve}))
    return shown


def run(arguments: argparse.Namespace, base: Path, report: Report) -> None:
    """The node and nginx, each in its own folder on the same disk."""
    factor = arguments.size_factor
    folders = [base / "node", base / "nginx"]
    base.chmod(0o755)
    for folder in folders:
        folder.mkdir()
    servers: list[Server] = []
    try:
        servers.append(Node(folders[0]))
        beside = nginx(folders[1])
        if beside is None:
            say("nginx is left out: not found")
        else:
            servers.append(beside)
        speeds = _median_of(_speeds(servers, factor, arguments.rounds))
    finally:
        for server in servers:
            server.close()
    fresh = base / "fresh"
    fresh.mkdir()
    node = Node(fresh)
    try:
        memory = _memory(node, factor)
    finally:
        node.close()
    facts: dict[str, object] = {
        "machine": processes.machine(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "speeds": [asdict(one) for one in speeds],
        "memory": [asdict(one) for one in memory],
    }
    text = _table(speeds) + "\n\nMemory, a fresh node:\n\n" + _table(memory)
    report(arguments, text, facts, picture.charts("The node beside a plain file server", _charts(speeds, memory)))
