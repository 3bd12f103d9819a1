"""What all tests stand on: an environment of their own, mounts that end with the test, and logs that stay quiet."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metadiskfs import control
from metadiskfs.errors import MountError

PROJECT = Path(__file__).parent.parent
COMMAND_SECONDS = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """METADISKFS_SKIP_FUSE=1, set by hand, leaves out what needs a mount; a missing FUSE otherwise fails."""
    if os.environ.get("METADISKFS_SKIP_FUSE") == "1":
        for item in items:
            if "mount" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="METADISKFS_SKIP_FUSE=1"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HOME: no setting and no file of whoever runs the tests counts."""
    for name in list(os.environ):
        if name.startswith(("XDG_", "METADISKFS_", "AWS_")):
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return folder


class Mount:
    """One volume mounted by the command line, as a user would; ends with the test whatever happens."""

    def __init__(self, home: Path, path: Path, *options: str, volume: str = "default") -> None:
        self.home = home
        self.path = path
        self.options = [*options, "--volume", volume]
        self.volume = volume

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def data_dir(self) -> Path:
        return self.home / ".local/share/metadiskfs"

    @property
    def volume_dir(self) -> Path:
        return self.data_dir / "volumes" / self.volume

    @property
    def cache_dir(self) -> Path:
        return self.home / ".cache/metadiskfs/volumes" / self.volume

    @property
    def log(self) -> str:
        file = self.home / f".local/state/metadiskfs/{self.volume}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return metadiskfs(*arguments, check=check)

    def start(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("mount", str(self.path), *self.options, *options, check=check)

    def unmount(self, *options: str) -> None:
        self.run("unmount", str(self.path), *options)

    def remount(self, *options: str) -> None:
        self.unmount()
        self.start(*options)

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run("status", str(self.path), "--json").stdout)
        return answer

    def sync(self) -> None:
        self.run("sync", str(self.path))

    def clear_cache(self) -> None:
        self.run("cache", "clear", str(self.path))

    def drop_kernel_caches(self) -> None:
        Path("/proc/sys/vm/drop_caches").write_text("3")

    def pids(self) -> list[int]:
        """The mount, its transfer process and its node, as far as they run."""
        try:
            status = control.ask_once(self.volume_dir, "status")
        except MountError:
            return []
        return [pid for name in ("pid", "transfer_pid", "node_pid") if (pid := status[name])]

    def kill(self, *, everything: bool = False) -> None:
        """kill -9 the mount, or it with its helpers; the mountpoint is left as that leaves it."""
        pids = self.pids()
        for pid in pids if everything else pids[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(is_running(pid) for pid in pids))

    def end(self) -> None:
        pids = self.pids()
        subprocess.run(["fusermount3", "-u", "-z", str(self.path)], capture_output=True, check=False, timeout=30)
        until = time.monotonic() + 20
        while any(is_running(pid) for pid in pids) and time.monotonic() < until:
            time.sleep(0.02)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def metadiskfs(
    *arguments: str, check: bool = True, timeout: float = COMMAND_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a command. With ``check`` a failure shows what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "metadiskfs", *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )
    if check and done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
    return done


def is_running(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], Any], timeout: float = 20.0) -> None:
    """Wait for something that happens by itself; fails when it does not within ``timeout`` seconds."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def make_mount(home: Path, tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    """A factory of mounts, not started yet: make_mount(*options, volume=..., name=...)."""
    made: list[Mount] = []

    def make(*options: str, volume: str = "default", name: str = "m") -> Mount:
        mount = Mount(home, tmp_path / name, *options, volume=volume)
        made.append(mount)
        return mount

    yield make
    for mount in made:
        mount.end()


@pytest.fixture
def mount(make_mount: Callable[..., Mount]) -> Mount:
    """A fresh volume over the embedded node, mounted."""
    fresh = make_mount()
    fresh.start()
    return fresh
