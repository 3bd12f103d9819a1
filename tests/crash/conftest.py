"""A mount over a node of the test's own, made to die where a test wants it, and looked at closely afterwards."""

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from metadiskfs import control
from metadiskfs.cli.main import main
from tests.conftest import PROJECT, Mount, eventually, is_running
from tests.metadisk.bad_node import BadNode

CHUNK = 64 << 10


class Bench:
    """One volume with 64 KiB chunks, some closed and uploaded files in it, and a node in this process."""

    def __init__(self, mount: Mount, node: BadNode) -> None:
        self.mount = mount
        self.node = node
        self.closed: dict[str, bytes] = {}
        """What was closed, or must be there for another reason: compared after each crash."""

    def __truediv__(self, name: str) -> Path:
        return self.mount / name

    def start(self, *options: str, crash_at: str = "", **variables: str) -> None:
        with environment(METADISKFS_CRASH_AT=crash_at, **variables):
            self.mount.start(*options)

    def write(self, name: str, content: bytes) -> None:
        (self / name).write_bytes(content)
        self.closed[name] = content

    def ask(self, op: str, **values: Any) -> list[dict[str, Any]]:
        return list(control.ask(self.mount.volume_dir, op, **values))

    def sync(self) -> None:
        self.ask("sync")

    def status(self) -> dict[str, Any]:
        return self.ask("status")[0]

    def forget(self) -> None:
        """Let the next read ask the node."""
        self.ask("clear_cache")
        self.mount.drop_kernel_caches()

    def crash(self, act: Callable[[], object]) -> None:
        """Do what makes the mount die at its crash point; fails when it lives."""
        pid = self.ask("mount")[0]["pid"]
        with contextlib.suppress(OSError, control.MountError):
            act()
        eventually(lambda: not is_running(pid))

    def kill(self) -> None:
        """At once: what is open is sealed when it was quiet for seconds."""
        pid = self.ask("mount")[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not is_running(pid))

    def end(self) -> None:
        """After a test nothing is to be saved any more."""
        with contextlib.suppress(control.MountError, ProcessLookupError):
            self.kill()

    def crash_while_mounting(self, crash_at: str) -> None:
        with environment(METADISKFS_CRASH_AT=crash_at):
            assert self.mount.start(check=False).returncode

    def again(self, *options: str) -> None:
        """Mount as after any end, and find everything as promised: files, uploads, the index, no leftovers."""
        self.mount.start(*options)
        self.check_files()
        self.sync()
        code, report = verify(self.mount)
        assert (code, report["findings"]) == (0, [])
        assert self.leftovers() == []
        self.forget()
        self.check_files()

    def check_files(self) -> None:
        for name, content in self.closed.items():
            assert (self / name).read_bytes() == content, name

    def leftovers(self) -> list[str]:
        """Files that should not be where nothing is open or pending."""
        eventually(lambda: not any(files_below(self.mount.volume_dir / "sealed")), 5)
        places = (self.mount.volume_dir / "work", self.mount.volume_dir / "sealed", self.mount.cache_dir / "part")
        return [str(path) for place in places for path in files_below(place)]

    def lost_and_found(self) -> list[bytes]:
        """The contents of what was found after a crash."""
        folder = self / "lost+found"
        return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.exists() else []

    def slowly(self, *, pause: float = 0.3) -> None:
        """Let uploads take their time."""
        self.node.fail("upload", f"slow:{pause}", times=-1)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: value for name, value in variables.items() if value})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def verify(mount: Mount, *options: str) -> tuple[int, dict[str, Any]]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["verify", str(mount.path), "--json", *options])
    return code, json.loads(out.getvalue())


@dataclass(frozen=True, slots=True)
class Template:
    """A volume with two closed and uploaded files, made once: tests work on copies of its home."""

    node: BadNode
    home: Path
    objects: dict[str, bytes]
    closed: dict[str, bytes]


def fill_and_end(bench: Bench) -> None:
    bench.start()
    bench.write("small", b"small and closed")
    bench.write("large", os.urandom(3 * CHUNK + 5))
    bench.sync()
    bench.mount.unmount("--no-wait")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    folder = tmp_path_factory.mktemp("template")
    home = folder / "home"
    home.mkdir()
    with BadNode() as node, environment(HOME=str(home), PYTHONPATH=str(PROJECT)):
        mount = Mount(home, folder / "m", "--chunk-size", "64K", "--node", node.url)
        bench = Bench(mount, node)
        try:
            fill_and_end(bench)
        finally:
            mount.end()
        yield Template(node, home, dict(node.objects), dict(bench.closed))


@pytest.fixture
def empty_bench(template: Template, make_mount: Callable[..., Mount]) -> Iterator[Bench]:
    """Not mounted yet, nothing in it."""
    node = template.node
    node.reset()
    bench = Bench(make_mount("--chunk-size", "64K", "--node", node.url), node)
    yield bench
    node.heal()  # or the end of the mount tries for long to save its index
    bench.end()


@pytest.fixture
def bench(template: Template, empty_bench: Bench) -> Bench:
    """Not mounted; two files are in it."""
    shutil.copytree(template.home, empty_bench.mount.home, dirs_exist_ok=True)
    empty_bench.node.objects.update(template.objects)
    empty_bench.closed |= template.closed
    return empty_bench
