"""Processes end in every way there is; the next mount, or the same one, goes on as if nothing had been."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiskfs.fs.content import WorkFile
from metadiskfs.store.files import Digest
from metadiskfs.store.fsck import check_index
from metadiskfs.torture.world import children_of
from tests.conftest import PROJECT, Mount, eventually, is_running
from tests.crash.conftest import CHUNK, Bench
from tests.fs.drivers import VolumeDriver


def processes(mount: Mount) -> dict[str, int]:
    """Mount, transfer, node and the node's worker."""
    status = mount.status()
    found = {name: int(status[f"{name}_pid"]) for name in ("transfer", "node") if status[f"{name}_pid"]}
    found["mount"] = int(status["pid"])
    if "node" in found:
        found["worker"] = children_of(found["node"])[0]
    return found


def fill(mount: Mount, count: int) -> dict[str, bytes]:
    files = {f"file{n}": os.urandom(20_000) for n in range(count)}
    for name, content in files.items():
        (mount / name).write_bytes(content)
    return files


def check(mount: Mount, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        assert (mount / name).read_bytes() == content


def test_all_at_once_again_and_again(mount: Mount) -> None:
    files: dict[str, bytes] = {}
    for number in range(3):
        files |= {f"{number}-{name}": content for name, content in fill(mount, 30).items()}
        for name, content in files.items():
            (mount / name).write_bytes(content)
        pids = processes(mount)
        assert pids.keys() == {"mount", "transfer", "node", "worker"}
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda pids=pids: not any(map(is_running, pids.values())))
        mount.start()
        check(mount, files)
    mount.sync()
    mount.clear_cache()
    mount.drop_kernel_caches()
    check(mount, files)


def test_nothing_survives_the_mount(mount: Mount) -> None:
    pids = processes(mount)
    os.kill(pids["mount"], signal.SIGKILL)
    eventually(lambda: not any(map(is_running, pids.values())), 10)


def test_helpers_hold_neither_fuse_nor_the_lock(mount: Mount) -> None:
    pids = processes(mount)
    held = {name: {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()} for name, pid in pids.items()}
    lock = str(mount.volume_dir / "lock")
    assert "/dev/fuse" in held["mount"] and lock in held["mount"]
    for name in ("transfer", "node", "worker"):
        assert not held[name] & {"/dev/fuse", lock}, name
        assert not [path for path in held[name] if path.endswith(("index.db", "index.db-wal"))], name


@pytest.mark.parametrize("victims", [["transfer"], ["node"], ["worker"], ["transfer", "node", "worker"]])
def test_a_helper_dies_during_uploads(mount: Mount, victims: list[str]) -> None:
    files = fill(mount, 60)
    pids = processes(mount)
    for name in victims:
        os.kill(pids[name], signal.SIGKILL)
    files |= fill(mount, 80)
    mount.sync()
    mount.clear_cache()
    mount.drop_kernel_caches()
    check(mount, files)
    now = processes(mount)
    assert now["mount"] == pids["mount"]
    assert all(now[name] != pids[name] for name in victims)


def test_sigterm_ends_in_order(bench: Bench) -> None:
    """What is open is sealed, the directory is free again, and nothing needs recovery."""
    bench.start()
    fd = os.open(bench / "open", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"not closed yet")
    pid = bench.ask("mount")[0]["pid"]
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not is_running(pid))
    assert not os.path.ismount(bench.mount.path)
    bench.closed["open"] = b"not closed yet"
    bench.again()
    assert bench.lost_and_found() == []


def test_plain_umount_then_mount_at_once(bench: Bench) -> None:
    bench.slowly(pause=0.3)
    bench.start()
    for number in range(40):
        bench.write(f"pending{number}", os.urandom(500))
    subprocess.run(["fusermount3", "-u", str(bench.mount.path)], check=True)
    bench.node.heal()
    bench.again()


def test_killed_while_uploading(bench: Bench) -> None:
    bench.slowly(pause=0.2)
    bench.start()
    for number in range(60):
        bench.write(f"pending{number}", os.urandom(500 + number))
    eventually(lambda: bench.status()["stored_chunks"] > 10)
    bench.kill()
    bench.node.heal()
    bench.start()
    assert bench.status()["pending_chunks"] <= 60
    bench.mount.unmount()
    bench.again()


def test_what_was_written_and_not_closed_is_found(bench: Bench) -> None:
    bench.start()
    (bench / "folder").mkdir()
    content = os.urandom(3 * CHUNK)
    fd = os.open(bench / "folder" / "draft", os.O_CREAT | os.O_WRONLY)
    os.write(fd, content)
    bench.kill()
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.close(fd)
    bench.again()
    (found,) = (bench / "lost+found").iterdir()
    assert found.name.endswith("-draft")
    assert found.read_bytes() == content
    assert found.name in bench.mount.log


def test_a_read_only_mount_recovers_too(bench: Bench) -> None:
    bench.start()
    fd = os.open(bench / "log", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"synced")
    os.fsync(fd)
    bench.kill()
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.close(fd)
    bench.start("--read-only")
    assert (bench / "log").read_bytes() == b"synced"


def committed(fs: VolumeDriver) -> list[bytes]:
    """What a crash now would leave of /shared: the visible part of each chunk its rows name."""
    inode = fs.volume.tree.resolve(b"/shared")
    contents = []
    for slot in fs.volume.chunks.slots_of(inode.number).values():
        opened = fs.volume.cache.open_chunk(slot.sha256)
        assert opened is not None
        with opened as fd:
            contents.append(os.pread(fd, slot.length, 0))
    return contents


def test_closing_while_another_handle_writes(tmp_path: Path) -> None:
    """close() promises what was written through it, whatever another descriptor does to the same piece meanwhile."""
    fs = VolumeDriver(tmp_path)
    tree, volume = fs.volume.tree, fs.volume
    parent, name = tree.resolve_parent(b"/shared")
    inode = tree.make(parent, name, 0o100644, uid=0, gid=0)
    one, two = (volume.open(inode, os.O_RDWR) for _ in range(2))
    volume.write(one, memoryview(b"first"), 0)
    hash_work = volume.hasher.hash

    def hash_while_somebody_writes(work: WorkFile) -> Digest:
        digest = hash_work(work)
        volume.write(two, memoryview(b"SECOND"), 3)
        return digest

    volume.hasher.hash = hash_while_somebody_writes  # type: ignore[method-assign]
    volume.flush(one)
    volume.hasher.hash = hash_work  # type: ignore[method-assign]
    assert committed(fs) == [b"first"]
    assert list(check_index(fs.index.db)) == []
    volume.flush(two)
    assert committed(fs) == [b"firSECOND"]
    assert list(check_index(fs.index.db)) == []
    for number in (one, two):
        volume.release(number)
    fs.close()


def test_a_closed_terminal_does_not_end_the_mount(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    command = [sys.executable, "-m", "metadiskfs", "mount", str(mount.path)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    time.sleep(0.2)
    (mount / "file").write_bytes(b"still here")
    for name, process in processes(mount).items():
        assert os.getsid(process) != os.getsid(0), name
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        assert fields[4] == "0", f"{name} has a terminal"


def test_sighup_ends_a_mount_in_the_foreground(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount()
    command = [sys.executable, "-m", "metadiskfs", "mount", str(mount.path), "--foreground"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, cwd=PROJECT)
    eventually(lambda: os.path.ismount(mount.path) and (mount.volume_dir / "control.sock").exists())
    (mount / "file").write_bytes(b"closed")
    process.send_signal(signal.SIGHUP)
    process.wait(30)
    assert not os.path.ismount(mount.path)
    mount.start()
    assert (mount / "file").read_bytes() == b"closed"


def test_unmount_clears_a_dead_mountpoint(bench: Bench) -> None:
    bench.start()
    os.stat(bench.mount.path)  # the kernel remembers it, and goes on telling
    bench.kill()
    bench.mount.run("unmount", str(bench.mount.path))
    assert not os.path.ismount(bench.mount.path)
    assert json.loads(bench.mount.run("verify", "--volume", "default", "--json").stdout)["ok"]
