"""The embedded node: a child process that serves this user's objects on loopback.

It is exec'ed, not forked: a fork would hold /dev/fuse and the volume's lock. It reads the upload token from its
standard input and ends when that pipe closes, so that it outlives nobody, however its parent ends.
"""

import json
import logging
import os
import secrets
import select
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from metadiskfs.errors import NodeUnreachable

log = logging.getLogger(__name__)

_START_SECONDS = 30.0
_NICE = 10
"""Storing goes on behind the programs that write; measured: 10 % more files a second where cores are few."""
_TOKEN_LETTERS = string.ascii_letters + string.digits


def register_volume(store: Path, uuid: str, name: str) -> None:
    """Note that a volume keeps objects here: the sweep (sweep.py) refuses to run while such a one is missing."""
    known = store / "volumes"
    if not known.exists() or uuid not in known.read_text():
        with open(os.open(known, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
            file.write(f"{uuid} {name}\n")


class EmbeddedNode:
    """Runs the node and starts it anew, on the same port, should it die. Safe to use from any thread."""

    def __init__(self, store: Path, *, on_restart: Callable[[], None] = lambda: None) -> None:
        """``store``: the folder of its objects. ``on_restart`` is told when it runs again."""
        self._store = store
        self._on_restart = on_restart
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self.token = "".join(secrets.choice(_TOKEN_LETTERS) for _ in range(32))
        self.url = ""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start it and wait until it answers. Raises NodeUnreachable."""
        self._launch("127.0.0.1:0")
        threading.Thread(target=self._watch, name="node-watch", daemon=True).start()

    def stop(self) -> None:
        """End it, with requests in flight answered."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            log.warning("the embedded node did not end by itself")
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def _launch(self, listen: str) -> None:
        self._store.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [sys.executable, "-m", "metadiskfs", "node", "--embedded", "--listen", listen, "--store"]
        process = subprocess.Popen(
            [*command, str(self._store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None and process.stdout is not None
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)
        self._process = process
        process.stdin.write(f"{self.token}\n".encode())
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
        line = process.stdout.readline() if ready else b""
        if not line:
            process.kill()
            process.wait()
            raise NodeUnreachable("the embedded node did not start; the log says why")
        self.url = json.loads(line)["url"]

    def _watch(self) -> None:
        pause = 0.2
        while not self._stopping.is_set():
            process = self._process
            assert process is not None
            process.wait()
            if self._stopping.is_set():
                return
            log.warning("the embedded node died (status %s), starting it again", process.returncode)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            started = time.monotonic()
            try:
                self._launch(self.url.removeprefix("http://"))
                self._on_restart()
            except (NodeUnreachable, OSError) as error:
                log.error("the embedded node does not start: %s", error)
            pause = 0.2 if time.monotonic() - started > 60 else min(10.0, pause * 2)
            self._stopping.wait(pause)
