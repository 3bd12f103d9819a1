"""What a power cut may leave: rows without their bytes. Nothing wrong is read or uploaded, nothing synced is lost."""

import contextlib
import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.crash.conftest import CHUNK, Bench, files_below, verify
from tests.fs.drivers import VolumeDriver

CONTENT = os.urandom(3000)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def power_cut(bench: Bench, damage: Callable[[Path], None], *paths: Path) -> None:
    """Kill the mount, forget that it was in this boot, and do to files what a file system may after a power cut."""
    bench.kill()
    with contextlib.closing(sqlite3.connect(bench.mount.volume_dir / "index.db")) as db:
        db.execute("UPDATE meta SET value = 'another-boot' WHERE key = 'session'")
        db.commit()
    for path in paths:
        before = path.stat()
        damage(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.02)  # the kernel's clock for files ticks slower than ours


def sealed(bench: Bench) -> list[Path]:
    return files_below(bench.mount.volume_dir / "sealed")


def cached(bench: Bench) -> list[Path]:
    return files_below(bench.mount.cache_dir)


@pytest.mark.parametrize("damage", [zero, cut, empty, flip])
def test_the_only_copy_is_damaged(bench: Bench, damage: Callable[[Path], None]) -> None:
    """EIO, never uploaded, and nothing else waits for it; writing the same content again heals it."""
    bench.node.fail("upload", "status:503", times=-1)
    bench.start()
    bench.write("other", os.urandom(1000))
    (other,) = sealed(bench)
    (bench / "damaged").write_bytes(CONTENT)
    (victim,) = set(sealed(bench)) - {other}
    stored = len(bench.node.objects)
    power_cut(bench, damage, victim)
    bench.node.heal()
    bench.start()
    eventually(lambda: bench.status()["pending_chunks"] == 1)
    assert "ChunkDamaged" in bench.status()["last_error"]
    with pytest.raises(OSError, match="Input/output"):
        (bench / "damaged").read_bytes()
    assert len(bench.node.objects) == stored + 1
    bench.check_files()
    bench.write("again", CONTENT)
    bench.sync()
    bench.closed["damaged"] = CONTENT
    bench.forget()
    bench.check_files()


@pytest.mark.parametrize("damage", [zero, cut, flip])
def test_a_cached_copy_is_damaged(bench: Bench, damage: Callable[[Path], None]) -> None:
    bench.start()
    bench.check_files()
    power_cut(bench, damage, *cached(bench))
    bench.again()


def test_a_damaged_copy_is_still_doubted_by_a_later_session(bench: Bench) -> None:
    bench.start()
    bench.check_files()
    power_cut(bench, flip, *cached(bench))
    bench.start()
    bench.mount.unmount()
    bench.start()
    bench.kill()
    bench.again()


def test_stored_chunks_that_had_not_moved_yet_are_damaged(bench: Bench) -> None:
    """Recovery moves them to the cache; that must not make them look new. Many: it takes a tick of the clock."""
    bench.start()
    for number in range(300):
        bench.write(f"file{number}", os.urandom(500))
    bench.sync()
    bench.leftovers()
    victims = cached(bench)
    power_cut(bench, flip, *victims)
    for victim in victims:
        victim.rename(bench.mount.volume_dir / "sealed" / victim.name[:2] / victim.name)
    bench.again()


def test_a_proven_copy_is_not_doubted_again(tmp_path: Path) -> None:
    fs = VolumeDriver(tmp_path)
    fs.write("/f", CONTENT)
    fs.sync()
    fs.close()
    fs.start()
    fs.volume.cache.doubt_older_than(time.time_ns() + 10**9)
    assert fs.read("/f") == CONTENT
    fs.close()
    (copy,) = files_below(tmp_path / "cache")
    assert time.time_ns() - copy.stat().st_ctime_ns < 5 * 10**9
    fs.start()
    fs.close()


def test_what_was_synced_is_whole(bench: Bench) -> None:
    """Synced open, synced and closed, closed and synced later: all that was not is damaged as badly as may be."""
    bench.node.fail("upload", "status:503", times=-1)
    bench.start()
    kept: set[Path] = set()
    for name, size in (("open", CHUNK + 10), ("closed", 500)):
        fd = os.open(bench / name, os.O_CREAT | os.O_RDWR)
        bench.closed[name] = os.urandom(size)
        os.write(fd, bench.closed[name])
        os.fsync(fd)
        if name == "closed":
            os.close(fd)
            kept |= set(sealed(bench))
    bench.write("later", os.urandom(700))
    again = os.open(bench / "later", os.O_RDONLY)
    os.fsync(again)
    os.close(again)
    kept |= set(sealed(bench))
    (bench / "unsynced").write_bytes(CONTENT)
    power_cut(bench, zero, *(set(sealed(bench)) - kept))
    bench.node.heal()
    bench.start()
    bench.check_files()
    with pytest.raises(OSError, match="Input/output"):
        (bench / "unsynced").read_bytes()
    (bench / "unsynced").unlink()
    bench.sync()
    bench.forget()
    bench.check_files()
    assert verify(bench.mount)[0] == 0


def test_nothing_is_evicted_before_its_row_is_durable(tmp_path: Path) -> None:
    """Or a power cut could make it pending again, with its file gone."""
    fs = VolumeDriver(tmp_path)
    asked: list[bool] = []
    fs.volume.cache.before_eviction = lambda: asked.append(bool(files_below(tmp_path / "cache")))
    fs.write("/f", CONTENT)
    fs.sync()
    fs.evict()
    assert asked == [True]
    fs.close()


def test_a_mount_makes_its_index_durable_before_it_evicts(bench: Bench) -> None:
    bench.start()
    bench.write("new", CONTENT)
    bench.sync()
    calls = traced(bench, lambda: bench.ask("clear_cache"), "fsync,fdatasync,unlink,unlinkat")
    names = [name for name, _ in calls]
    synced = next(i for i, (name, path) in enumerate(calls) if path.endswith("index.db-wal") and "sync" in name)
    assert "unlink" in names
    assert synced < names.index("unlink")


# -- what fsync does, as the kernel sees it -----------------------------------------------------------------------


def traced(bench: Bench, act: Callable[[], object], calls: str) -> list[tuple[str, str]]:
    """(call, path) of the mount's system calls while ``act`` runs, in the order in which they came back."""
    out = bench.mount.home / "trace"
    pid = bench.ask("mount")[0]["pid"]
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-qq", "-e", f"trace={calls}", "-o", str(out), "-p", str(pid)],
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: int(re.findall(r"TracerPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]))
        time.sleep(0.3)  # its threads as well
        act()
    finally:
        tracer.terminate()
        tracer.wait(10)
    found = []
    for line in out.read_text().splitlines():
        match = re.search(r"(\w+)\((?:\d+<(.*?)>|\"(.*?)\"|AT_FDCWD\S*, \"(.*?)\")", line)
        if match and "resumed" not in line:
            found.append((match[1], match[2] or match[3] or match[4] or ""))
    return found


def order(calls: list[tuple[str, str]], *patterns: str) -> list[int]:
    """Where the first call whose path matches each pattern stands."""
    print(calls)
    return [next(i for i, (_, path) in enumerate(calls) if re.search(pattern, path)) for pattern in patterns]


def test_fsync_of_an_open_file(bench: Bench) -> None:
    """Work file, its folder, then the index's log; the next one need not sync the folder."""
    bench.start()

    def write_and_sync_twice() -> None:
        with open(bench / "new", "xb", buffering=0) as file:
            file.write(CONTENT)
            os.fsync(file.fileno())
            file.write(CONTENT)
            os.fsync(file.fileno())

    calls = traced(bench, write_and_sync_twice, "fsync,fdatasync")
    work, folder, log = r"/work/\d+-0-\d+$", r"/work$", r"index\.db-wal$"
    places = order(calls, work, folder, log)
    assert places == sorted(places)
    places = order(calls[places[-1] + 1 :], work, log)
    assert places == sorted(places)


def test_fsync_of_a_closed_file(bench: Bench) -> None:
    """Its chunk, the folder of that, then the index's log; also when an earlier session sealed it."""
    bench.node.fail("upload", "status:503", times=-1)
    bench.start()
    bench.write("new", CONTENT)
    bench.write("newer", CONTENT[::-1])
    chunk = r"/sealed/[0-9a-f]{2}/[0-9a-f]{64}$"
    for name in ("new", "newer"):
        fd = os.open(bench / name, os.O_RDONLY)
        places = order(traced(bench, lambda fd=fd: os.fsync(fd), "fsync,fdatasync"), chunk, r"/sealed/[0-9a-f]{2}$")
        assert places == sorted(places)
        os.close(fd)
        bench.kill()
        bench.start()


def test_fsync_of_content_that_an_unsynced_chunk_has(bench: Bench) -> None:
    """The work file goes; what stays in its place must be as durable."""
    bench.node.fail("upload", "status:503", times=-1)
    bench.start()
    bench.write("one", CONTENT)

    def write_sync_and_close() -> None:
        with open(bench / "two", "xb", buffering=0) as file:
            file.write(CONTENT)
            os.fsync(file.fileno())

    calls = traced(bench, write_sync_and_close, "fsync,fdatasync,unlink")
    (unlinked,) = [place for place, (name, path) in enumerate(calls) if name == "unlink" and "/work/" in path]
    places = order(calls[:unlinked], r"/sealed/[0-9a-f]{2}/[0-9a-f]{64}$", r"index\.db-wal$")
    assert len([path for _, path in calls[:unlinked] if path.endswith("-wal")]) == 2
    assert places


def test_fsync_of_a_folder(bench: Bench) -> None:
    bench.start()
    (bench / "folder").mkdir()
    fd = os.open(bench / "folder", os.O_RDONLY)
    calls = traced(bench, lambda: os.fsync(fd), "fsync,fdatasync")
    assert order(calls, r"index\.db-wal$")
    os.close(fd)
