"""Limits that hold: of the cache in bytes on the disk, of disks, of open files, of memory."""

import errno
import os
import re
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Mount, eventually
from tests.crash.conftest import CHUNK, Bench, verify

LIMIT = 8 << 20
SLACK = 2 << 20
"""What may be under way on several threads when the limit is reached."""


class Gauge:
    """Measures what lies on the disk while something goes on."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._stop = threading.Event()
        self.most = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Gauge":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, self.measure())

    def measure(self) -> int:
        """Blocks on the disk, each file once however many names it has."""
        files: dict[int, int] = {}
        for folder in self._folders:
            for path, _, names in os.walk(folder):
                for name in names:
                    try:
                        found = os.stat(os.path.join(path, name))
                    except FileNotFoundError:
                        continue
                    files[found.st_ino] = found.st_blocks * 512
        return sum(files.values())


def gauge(bench: Bench) -> Gauge:
    return Gauge(bench.mount.volume_dir / "work", bench.mount.volume_dir / "sealed", bench.mount.cache_dir)


def test_the_cache_limit_holds_while_many_files_are_written(bench: Bench) -> None:
    bench.start("--cache-size", str(LIMIT))
    with gauge(bench) as measured:
        for number in range(40):
            bench.write(f"file{number}", os.urandom(1 << 20))
    assert LIMIT // 2 < measured.most < LIMIT + SLACK
    bench.sync()
    bench.mount.drop_kernel_caches()
    with gauge(bench) as measured:
        bench.check_files()
    assert measured.most < LIMIT + SLACK


def test_one_file_larger_than_the_cache(bench: Bench) -> None:
    bench.start("--cache-size", str(LIMIT))
    piece = os.urandom(1 << 20)
    with gauge(bench) as measured, open(bench / "big", "wb", buffering=0) as file:
        file.writelines(number.to_bytes(8, "big") + piece[8:] for number in range(32))
    assert measured.most < LIMIT + SLACK
    bench.sync()
    bench.mount.drop_kernel_caches()
    with gauge(bench) as measured, open(bench / "big", "rb") as file:
        for number in range(32):
            assert file.read(1 << 20) == number.to_bytes(8, "big") + piece[8:]
    assert measured.most < LIMIT + SLACK


# -- full disks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12M,mode=0700", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte free."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return filler


def test_the_disk_under_the_data_is_full(
    small_disk: Path, empty_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC for content and for names; all that was closed stays; with room again all goes on."""
    bench = empty_bench
    monkeypatch.setenv("METADISKFS_DATA_DIR", str(small_disk / "data"))
    monkeypatch.setattr(Mount, "data_dir", small_disk / "data")
    bench.node.fail("upload", "status:503", times=-1)
    bench.start()
    with pytest.raises(OSError, match="No space left"):
        for number in range(20):
            bench.write(f"file{number}", os.urandom(1 << 20))
    for number in range(300):  # there is room for what takes little
        (bench / f"folder{number}").mkdir()
    filler = fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        for number in range(2000):
            (bench / f"directory{number}").mkdir()
    bench.check_files()
    filler.unlink()
    for path in bench.mount.path.glob("file*"):
        if path.name not in bench.closed:
            path.unlink()
    bench.node.heal()
    bench.sync()
    bench.write("afterwards", os.urandom(CHUNK))
    bench.sync()
    bench.check_files()
    bench.kill()
    bench.start()
    bench.check_files()
    code, report = verify(bench.mount)
    assert (code, report["findings"]) == (0, [])
    bench.mount.unmount()


def test_the_disk_under_the_cache_is_full(
    small_disk: Path, empty_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another disk than the data's: uploads go on, and what cannot be kept there is read from the node or fails."""
    bench = empty_bench
    monkeypatch.setenv("METADISKFS_CACHE_DIR", str(small_disk / "cache"))
    bench.start()
    filler = fill(small_disk)
    for number in range(10):
        bench.write(f"file{number}", os.urandom(3 * CHUNK))
    bench.sync()
    bench.mount.drop_kernel_caches()
    before = time.monotonic()
    for name, content in bench.closed.items():
        try:
            assert (bench / name).read_bytes() == content
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.EIO)
    assert time.monotonic() - before < 30
    filler.unlink()
    bench.check_files()
    assert not list((bench.mount.volume_dir / "work").iterdir())
    bench.mount.unmount()


def test_the_cache_folder_is_emptied_under_a_mount(bench: Bench) -> None:
    bench.start()
    bench.check_files()
    subprocess.run(["rm", "-rf", str(bench.mount.home / ".cache")], check=True)
    bench.mount.drop_kernel_caches()
    bench.check_files()
    bench.write("new", os.urandom(3 * CHUNK))
    bench.sync()
    bench.forget()
    bench.check_files()


# -- open files -----------------------------------------------------------------------------------------------------


def test_two_thousand_open_files_with_few_descriptors(bench: Bench) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    pid_limit = 64
    bench.start()
    pid = bench.ask("mount")[0]["pid"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (pid_limit, pid_limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    files = []
    try:
        for number in range(2000):
            file = open(bench / f"file{number}", "w+b", buffering=0)  # noqa: SIM115 - all are open at once
            files.append(file)
            file.write(b"%d" % number)
        for number, file in enumerate(files):
            file.seek(0)
            assert file.read() == b"%d" % number
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    bench.closed |= {f"file{number}": b"%d" % number for number in range(2000)}
    bench.sync()
    bench.forget()
    bench.check_files()


def test_the_mount_takes_all_descriptors_it_may_have(bench: Bench) -> None:
    bench.start()
    limits = Path(f"/proc/{bench.ask('mount')[0]['pid']}/limits").read_text()
    soft, hard = re.findall(r"Max open files\s+(\d+)\s+(\d+)", limits)[0]
    assert soft == hard


# -- memory ---------------------------------------------------------------------------------------------------------


def peak_mib(pid: int) -> float:
    return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024


def test_memory_of_mount_and_transfer_process(mount: Mount) -> None:
    """600 MiB through a mount with chunks of the usual size; scripts/torture-memory copies as much as it is told."""
    piece = os.urandom(1 << 20)
    for number in range(6):
        with open(mount / f"file{number}", "wb", buffering=0) as file:
            file.writelines(bytes([number, part]) + piece[2:] for part in range(100))
    mount.sync()
    mount.clear_cache()
    mount.drop_kernel_caches()
    for number in range(6):
        with open(mount / f"file{number}", "rb", buffering=0) as file:
            for part in range(100):
                assert file.read(1 << 20)[:2] == bytes([number, part])
    status = mount.status()
    both = peak_mib(status["pid"]) + peak_mib(status["transfer_pid"])
    print(f"mount {peak_mib(status['pid']):.0f} MiB, transfer {peak_mib(status['transfer_pid']):.0f} MiB")
    assert both < 150
    eventually(lambda: mount.status()["pending_chunks"] == 0)
