"""Processes of a benchmark: started so that they end with it, and their CPU time and memory read from /proc."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
_TICK = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """Something a benchmark needs did not work; the message says what."""


def say(text: str = "") -> None:
    """A line for whoever watches; results go to standard output, this does not."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def start(
    command: Sequence[str | Path], log: Path, *, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Run a server in the background; it gets SIGTERM should this process die, however it dies."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            cwd="/",
            preexec_fn=end_with_parent,
        )


def end(process: subprocess.Popen[bytes], *, timeout: float = 30.0, signal_number: int = signal.SIGTERM) -> None:
    """Ask a process to end, then make it."""
    if process.poll() is None:
        process.send_signal(signal_number)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], what: str, *, timeout: float = 60.0, pause: float = 0.01) -> None:
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until:
            raise Failed(f"waited in vain for {what}")
        time.sleep(pause)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


# -- /proc ----------------------------------------------------------------------------------------------------------


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name; field n of proc(5) is at n - 3."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                found.setdefault(int(_stat(int(name))[1]), []).append(int(name))
    return found


def groups(roots: Mapping[str, int]) -> dict[str, list[int]]:
    """Each root with its descendants, without those that are roots themselves and what is below them."""
    children, named = _children(), set(roots.values())

    def below(pid: int) -> list[int]:
        found = [pid]
        for child in children.get(pid, ()):
            if child not in named:
                found += below(child)
        return found

    return {name: below(pid) for name, pid in roots.items()}


def cpu_seconds(roots: Mapping[str, int]) -> dict[str, float]:
    """CPU time each group has used so far: user and system, its living and its reaped children included."""
    used = {}
    for name, pids in groups(roots).items():
        ticks = 0
        for pid in pids:
            with contextlib.suppress(OSError):
                ticks += sum(int(value) for value in _stat(pid)[11:15])
        used[name] = ticks / _TICK
    return used


def memory(pid: int, field: str = "VmHWM") -> int:
    """Bytes: VmHWM is the most a process had resident so far, VmRSS what it has now. 0 when it has gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def group_memory(roots: Mapping[str, int], field: str = "VmHWM") -> dict[str, int]:
    return {name: sum(memory(pid, field) for pid in pids) for name, pids in groups(roots).items()}


# -- the machine ----------------------------------------------------------------------------------------------------


def drop_kernel_caches() -> None:
    """Write everything out and forget it: pages, names, inodes. Needs root; without it caches stay warm."""
    os.sync()
    with contextlib.suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def sync_filesystem(folder: Path) -> None:
    """syncfs(2) of the file system a folder lies on."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _libc.syncfs(fd)
    finally:
        os.close(fd)


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    with contextlib.suppress(OSError, IndexError):
        model = next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {
        "cores": os.cpu_count(),
        "cpu": locals().get("model", ""),
        "memory_gib": round(total / 2**30, 1),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "load_before": os.getloadavg()[0],
        "caches_dropped": os.geteuid() == 0,
    }
