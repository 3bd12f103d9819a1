"""The scratch world of a torture run: a home of its own, a mount in it, and ways to hurt its processes."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from metadiskfs import control
from metadiskfs.errors import MetadiskfsError, MountError

_COMMAND_SECONDS = 120.0
_END_SECONDS = 20.0
_PACKAGE = Path(__file__).parents[2]


class TortureFailed(MetadiskfsError):
    """The run cannot go on: what went wrong is the last difference."""


class Process:
    """One process by a descriptor of it: a signal never reaches another that was given its number since."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = -1

    @property
    def is_running(self) -> bool:
        return self._fd >= 0 and not select.select([self._fd], [], [], 0)[0]

    def signal(self, number: int) -> None:
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class World:
    """Everything lies below ``folder``; nothing of the user's is touched."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="metadiskfs-torture-"))
        self.mountpoint = self.folder / "mountpoint"
        self.home = self.folder / "home"
        self.home.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "METADISKFS_"))}
        path = os.pathsep.join(filter(None, (str(_PACKAGE), os.environ.get("PYTHONPATH", ""))))
        self._environment = {**kept, "HOME": str(self.home), "PYTHONPATH": path}
        self.volume_dir = self.home / ".local/share/metadiskfs/volumes/default"
        self.cache_dir = self.home / ".cache/metadiskfs/volumes/default"
        self._processes: dict[str, Process] = {}

    # -- commands -------------------------------------------------------------------------------------------------

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command as a user would give it. Raises TortureFailed when it hangs."""
        try:
            return subprocess.run(
                [sys.executable, "-P", "-m", "metadiskfs", *arguments],
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=_COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TortureFailed(f"metadiskfs {' '.join(arguments)} hangs") from error

    def mount(self) -> None:
        """Raises TortureFailed where it does not come up: no manual step may be needed, ever."""
        done = self.run("mount", str(self.mountpoint), "--chunk-size", "64K", "--cache-size", "256M")
        if done.returncode:
            raise TortureFailed(f"the mount does not come up: {done.stderr.strip()}")
        self._forget_processes()
        status = control.ask_once(self.volume_dir, "status")
        self._processes = {name: Process(int(status[f"{name}_pid"])) for name in ("transfer", "node")}
        self._processes["mount"] = Process(int(status["pid"]))

    def verify(self) -> list[str]:
        """What ``metadiskfs verify`` finds."""
        done = self.run("verify", str(self.mountpoint), "--json")
        try:
            findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
        except ValueError:
            return [f"verify: {done.stderr.strip()}"]
        return [f"verify: {one['kind']}: {one['message']} {one['path']}".strip() for one in findings]

    def ask(self, op: str) -> None:
        """A request to the mount. Raises MountError when it dies over it."""
        for _ in control.ask(self.volume_dir, op):
            pass

    def unmount(self) -> None:
        """A plain unmount, as another program would do it, and wait for the end."""
        subprocess.run(["fusermount3", "-u", "-z", str(self.mountpoint)], capture_output=True, check=False)
        self.wait_for_end()

    # -- processes ------------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        return self._processes["mount"].is_running

    def signal(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send it to 'mount', 'transfer', 'node' or 'worker' (of the node), as they are now."""
        if name in ("transfer", "node"):
            self._look_again(name)
        if name != "worker":
            self._processes[name].signal(number)
            return
        self._look_again("node")
        for pid in children_of(self._processes["node"].pid):
            worker = Process(pid)
            worker.signal(number)
            worker.close()

    def _look_again(self, name: str) -> None:
        """A helper that died has a successor."""
        with contextlib.suppress(MountError):
            pid = int(control.ask_once(self.volume_dir, "status")[f"{name}_pid"] or 0)
            if pid and pid != self._processes[name].pid:
                self._processes[name].close()
                self._processes[name] = Process(pid)

    def wait_for_end(self) -> list[str]:
        """After the mount's end: all its processes must follow. Returns differences, and kills what is left."""
        until = time.monotonic() + _END_SECONDS
        while strays := [name for name, process in self._processes.items() if process.is_running]:
            if time.monotonic() > until:
                for name in strays:
                    self._processes[name].signal(signal.SIGKILL)
                return [f"the {name} process did not end" for name in strays]
            time.sleep(0.01)
        return []

    def _forget_processes(self) -> None:
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def leftovers(self) -> list[str]:
        """Work files and downloads that lie about though nothing is open."""
        places = (self.volume_dir / "work", self.cache_dir / "part")
        return [f"left over: {path.name}" for place in places for path in place.iterdir()]

    def log(self) -> str:
        path = self.home / ".local/state/metadiskfs/default.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self, *, keep: bool) -> None:
        if self._processes:
            self.unmount()
        self._forget_processes()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def children_of(pid: int) -> list[int]:
    """The processes a process started, as far as they live."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
