"""A real node in a process of its own, for tests: started, found ready, ended whatever happens."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TOKEN = "TestTokenOfThisUser01"
READY_WITHIN = 20.0


class RunningNode:
    """``folder`` gets the store and the log. ``embedded``: started as the mount starts its own."""

    def __init__(
        self, folder: Path, *options: str, embedded: bool = False, store: str = "", env: dict[str, str] | None = None
    ) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        self.store = folder / "store"
        self.log = folder / "log"
        self.embedded = embedded
        home = {
            name: str(folder / name)
            for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")
        }
        command = [sys.executable, "-m", "metadiskfs", "node", "--listen", "127.0.0.1:0"]
        command += ["--store", store or str(self.store), *(["--embedded"] if embedded else []), *options]
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | home | (env or {}),
            )
        try:
            self.url = self._wait_until_ready()
        except BaseException:
            self.end()
            raise

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def worker(self) -> int:
        """The pid of the (only) worker process."""
        return children(self.process.pid)[0]

    def log_text(self) -> str:
        """What this process has logged; an earlier one may have used the same file."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def end(self) -> None:
        """Kill it, if it still runs. Its workers die with it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):  # what was still buffered for it
                    pipe.close()

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def _wait_until_ready(self) -> str:
        if self.embedded:
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(TOKEN.encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            assert line, self.log_text()
            told = json.loads(line)
            assert told["ready"] is True
            return str(told["url"])
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline and self.process.poll() is None:
            if match := re.search(r"listening on (\S+)", self.log_text()):
                return match[1]
            time.sleep(0.01)
        raise AssertionError(f"the node did not start: {self.log_text()}")


StartNode = Callable[..., RunningNode]
"""The fixture start_node: starts nodes that end with the test."""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def exists(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: object, within: float = 10.0) -> bool:
    """Call ``condition`` until it is true."""
    deadline = time.monotonic() + within
    assert callable(condition)
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def multipart(parts: Sequence[tuple[bytes, bytes]], boundary: bytes = b"edge") -> bytes:
    """A form body from (content-disposition parameters, content) pairs."""
    body = b""
    for disposition, content in parts:
        body += (
            b"--" + boundary + b"\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + content + b"\r\n"
        )
    return body + b"--" + boundary + b"--\r\n"


def post_head(length: int, more: str = "") -> bytes:
    """The head of an upload's request, whose form has the boundary "edge"."""
    return (
        "POST /api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=edge\r\n"
        f"Content-Length: {length}\r\n{more}\r\n"
    ).encode()


def run_cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "metadiskfs", *arguments],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
