"""What is measured: file systems that are mounted, emptied, waited for and unmounted, all through one interface."""

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

from bench import processes
from bench.processes import PROJECT, Failed, drop_kernel_caches, end, free_port, wait_for


class Target(ABC):
    """A directory to work in, and what stands behind it. Everything it writes lies under ``base``."""

    name = ""
    only: frozenset[str] | None = None
    """The steps it is for; None for all."""
    needs: tuple[str, ...] = ()
    """Commands without which it cannot run."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.mountpoint = base / "mnt"
        self.store = base / "store"
        self.log = base / "log"
        self.peaks: dict[str, int] = {}
        for folder in (base, self.mountpoint, self.store):
            folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def missing(cls) -> list[str]:
        return [command for command in cls.needs if shutil.which(command) is None]

    @abstractmethod
    def start(self) -> None:
        """Mount; returns when the directory is usable."""

    @abstractmethod
    def stop(self) -> None:
        """Unmount and end its processes; harmless where nothing runs."""

    def sync(self) -> float:
        """Wait until everything written is stored behind it; returns when (time.monotonic) that was so."""
        processes.sync_filesystem(self.base)
        return time.monotonic()

    def empty(self) -> None:  # noqa: B027 - most have none
        """Empty the program's own cache; the kernel's are dropped by the caller."""

    def remount(self) -> None:
        self.note_memory()
        self.stop()
        self.start()

    def roots(self) -> dict[str, int]:
        """Its processes by role; one that is the child of another counts only here."""
        return {}

    def note_memory(self) -> None:
        """Keep each process's highest mark, over remounts."""
        for role, size in processes.group_memory(self.roots()).items():
            self.peaks[role] = max(self.peaks.get(role, 0), size)

    def mount_memory(self) -> int:
        """Peak bytes of the mount and its transfer process; what stands behind it does not count."""
        return sum(size for role, size in self.peaks.items() if role in ("mount", "transfer"))

    def stored_bytes(self) -> int:
        """What lies in the store, as the disk holds it."""
        total = 0
        for folder, _, names in os.walk(self.store):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(f"{folder}/{name}").st_blocks * 512
        return total

    def _mounted(self) -> bool:
        return os.path.ismount(self.mountpoint)


class RawDisk(Target):
    """The folder itself: what the disk and the kernel's file system do."""

    name = "raw"

    def start(self) -> None:
        self.mountpoint = self.store

    def stop(self) -> None:
        pass


class _Passthrough(Target):
    """One process in the foreground that mirrors the store at the mountpoint."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]: ...

    def start(self) -> None:
        self._process = processes.start(self.command(), self.log, environment={"PYTHONPATH": str(PROJECT)})
        wait_for(self._mounted, f"{self.name} to mount")

    def stop(self) -> None:
        unmount(self.mountpoint)
        if self._process is not None:
            end(self._process)
            self._process = None

    def roots(self) -> dict[str, int]:
        return {"mount": self._process.pid} if self._process is not None else {}


class Bindfs(_Passthrough):
    """A passthrough in C."""

    name = "bindfs"
    needs = ("bindfs", "fusermount3")

    def command(self) -> list[str]:
        return ["bindfs", "-f", str(self.store), str(self.mountpoint)]


class Bare(_Passthrough):
    """A passthrough in Python, see passthrough.py."""

    name = "bare"
    needs = ("fusermount3",)

    def command(self) -> list[str]:
        return [sys.executable, "-m", "bench.passthrough", str(self.store), str(self.mountpoint)]


class Rclone(Target):
    """rclone mount with a full cache, over rclone serve webdav on loopback."""

    name = "rclone"
    needs = ("rclone", "fusermount3")
    _POLL, _IDLE = 0.005, 0.5

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._cache = base / "cache"
        self._server: subprocess.Popen[bytes] | None = None
        self._mount: subprocess.Popen[bytes] | None = None
        self._ports = (free_port(), free_port())

    def start(self) -> None:
        served, control = self._ports
        quiet = {"RCLONE_CONFIG": "/dev/null"}
        if self._server is None:
            serve = ["rclone", "serve", "webdav", str(self.store), "--addr", f"127.0.0.1:{served}"]
            self._server = processes.start(serve, self.log, environment=quiet)
            wait_for(lambda: processes.answers(served), "rclone serve")
        remote = {
            **quiet,
            "RCLONE_CONFIG_PEER_TYPE": "webdav",
            "RCLONE_CONFIG_PEER_URL": f"http://127.0.0.1:{served}",
            "RCLONE_CONFIG_PEER_VENDOR": "other",
        }
        options = ["--vfs-cache-mode", "full", "--vfs-write-back", "1ms", "--cache-dir", str(self._cache)]
        options += ["--rc", "--rc-addr", f"127.0.0.1:{control}", "--rc-no-auth"]
        self._mount = processes.start(
            ["rclone", "mount", "peer:", str(self.mountpoint), *options], self.log, environment=remote
        )
        wait_for(self._mounted, "rclone to mount")
        wait_for(lambda: processes.answers(control), "rclone's remote control")

    def stop(self) -> None:
        unmount(self.mountpoint)
        if self._mount is not None:
            end(self._mount)
            self._mount = None

    def close(self) -> None:
        self.stop()
        if self._server is not None:
            end(self._server)
            self._server = None

    def sync(self) -> float:
        """Idle for a while: a file is queued when its last descriptor is released, a moment after close().

        With a write-back of 0 the queue would tell nothing: the upload is then part of the release.
        """
        idle_since: float | None = None
        while True:
            if self._queued():
                idle_since = None
            elif idle_since is None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > self._IDLE:
                return idle_since
            time.sleep(self._POLL)

    def _queued(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[1], timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", "/vfs/stats")
            cache = json.loads(connection.getresponse().read())["diskCache"]
        return int(cache["uploadsInProgress"]) + int(cache["uploadsQueued"])

    def empty(self) -> None:
        self.note_memory()
        self.stop()
        shutil.rmtree(self._cache, ignore_errors=True)
        self.start()

    def roots(self) -> dict[str, int]:
        found = {"mount": self._mount, "server": self._server}
        return {role: process.pid for role, process in found.items() if process is not None}


class S3ql(Target):
    """S3QL on a local folder, where it is installed. No network at all stands behind it."""

    name = "s3ql"
    needs = ("mkfs.s3ql", "mount.s3ql", "umount.s3ql", "s3qlctrl")

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._mount: subprocess.Popen[bytes] | None = None
        self._cache = ["--cachedir", str(base / "cache")]

    @property
    def _url(self) -> str:
        return f"local://{self.store}"

    def start(self) -> None:
        if not any(self.store.iterdir()):
            subprocess.run(["mkfs.s3ql", "--plain", *self._cache, self._url], check=True, capture_output=True)
        command = ["mount.s3ql", "--fg", "--compress", "none", *self._cache, self._url, str(self.mountpoint)]
        self._mount = processes.start(command, self.log)
        wait_for(self._mounted, "S3QL to mount")

    def stop(self) -> None:
        if self._mount is not None:
            subprocess.run(["umount.s3ql", self.mountpoint], check=False, capture_output=True)
            end(self._mount, timeout=120)
            self._mount = None

    def _control(self, act: str) -> None:
        subprocess.run(["s3qlctrl", act, self.mountpoint], check=True, capture_output=True)

    def sync(self) -> float:
        self._control("flushcache")
        return time.monotonic()

    def empty(self) -> None:
        self._control("dropcache")

    def roots(self) -> dict[str, int]:
        return {"mount": self._mount.pid} if self._mount is not None else {}


class Metadiskfs(Target):
    """Ours, with its embedded node: a process of its own, over HTTP on loopback."""

    name = "metadiskfs"
    needs = ("fusermount3",)
    options: tuple[str, ...] = ()

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.usable_since = 0.0
        self._home = base / "home"
        self._home.mkdir(exist_ok=True)
        self.folder = self._home / ".local/share/metadiskfs/volumes/default"
        self.store = self._home / ".local/share/metadiskfs/node"
        self._mount: subprocess.Popen[bytes] | None = None
        self._roots: dict[str, int] = {}

    def environment(self) -> dict[str, str]:
        """A home of its own: no setting of whoever runs this counts."""
        cleared = dict.fromkeys((name for name in os.environ if name.startswith(("XDG_", "METADISKFS_"))), "")
        folders = {
            "XDG_DATA_HOME": str(self._home / ".local/share"),
            "XDG_CACHE_HOME": str(self._home / ".cache"),
            "XDG_STATE_HOME": str(self._home / ".local/state"),
            "XDG_CONFIG_HOME": str(self._home / ".config"),
        }
        return {
            **cleared,
            **folders,
            "HOME": str(self._home),
            "PYTHONPATH": str(PROJECT),
            "METADISKFS_LOG": "WARNING",
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "metadiskfs", "mount", "--foreground", *self.options, str(self.mountpoint)]
        self._mount = processes.start(command, self.log, environment=self.environment())
        wait_for(self._usable, f"{self.name} to mount; {self.log} may say why")
        self.usable_since = time.monotonic()
        status = self.ask("status")
        pids = {"mount": status["pid"], "transfer": status["transfer_pid"], "node": status["node_pid"]}
        self._roots = {role: pid for role, pid in pids.items() if isinstance(pid, int)}

    def _usable(self) -> bool:
        if self._mount is not None and self._mount.poll() is not None:
            raise Failed(f"{self.name} ended while mounting; {self.log} says why")
        return self._mounted()

    def ask(self, act: str) -> dict[str, object]:
        """Ask the mount by its control socket, as its commands do: without the start of an interpreter."""
        from metadiskfs import control

        answers = list(control.ask(self.folder, act))
        return answers[-1] if answers else {}

    def stop(self) -> None:
        unmount(self.mountpoint)
        if self._mount is not None:
            try:
                self._mount.wait(120)
            except subprocess.TimeoutExpired:
                end(self._mount)
            self._mount = None
            self._roots = {}

    def sync(self) -> float:
        self.ask("sync")
        return time.monotonic()

    def empty(self) -> None:
        self.ask("clear_cache")

    def roots(self) -> dict[str, int]:
        return self._roots


class MetadiskfsWriteback(Metadiskfs):
    """The same with the kernel's writeback cache, for random writes."""

    name = "metadiskfs-wb"
    options = ("-o", "writeback")
    only = frozenset({"write", "randwrite"})


ALL: dict[str, type[Target]] = {
    target.name: target for target in (RawDisk, Bindfs, Bare, Rclone, S3ql, Metadiskfs, MetadiskfsWriteback)
}
_HELPERS_START = 0.5
"""Seconds in which processes that a mount has started may load their modules, as they would anyway."""
PEERS = ("rclone", "s3ql")
"""What stores elsewhere, as we do; the passthroughs store nothing."""


def unmount(mountpoint: Path) -> None:
    """Unmount, lazily where somebody still holds it."""
    for flags in (["-u"], ["-u", "-z"]):
        if not os.path.ismount(mountpoint):
            return
        subprocess.run(["fusermount3", *flags, mountpoint], check=False, capture_output=True)
        if flags == ["-u"] and os.path.ismount(mountpoint):
            time.sleep(0.5)


def close(target: Target) -> None:
    """End everything of a target, whatever state it is in."""
    with contextlib.suppress(OSError, Failed, subprocess.SubprocessError):
        target.stop()
    if isinstance(target, Rclone):
        target.close()


def settle(target: Target) -> None:
    """Nothing of what was written before may be paid for by what comes next."""
    target.sync()
    os.sync()


def prepare(target: Target, what: str) -> None:
    """Empty what a step wants empty before it; see workloads."""
    settle(target)
    if what == "cold":
        target.empty()
    elif what == "remount":
        target.remount()
        time.sleep(_HELPERS_START)
    if what != "nothing":
        drop_kernel_caches()
