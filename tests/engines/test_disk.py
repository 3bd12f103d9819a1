"""What only the disk engine promises: durability at a known price, healing, sweeping, safety against a delete."""

import fcntl
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metadiskfs.errors import ContentMismatch, ObjectMissing
from metadiskfs.node import disk
from metadiskfs.node.disk import DiskEngine
from metadiskfs.node.engine import Facts, prove
from metadiskfs.node.spool import SpoolFolder, flocked

FACTS = Facts("name.txt", 1_700_000_000)


def sample(size: int) -> tuple[str, bytes]:
    content = random.Random(size).randbytes(size)
    return hashlib.sha256(content).hexdigest(), content


def path_of(root: Path, filehash: str) -> Path:
    return root / "objects" / filehash[:2] / filehash


def test_two_fsyncs_and_in_that_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DiskEngine(tmp_path)
    filehash, content = sample(5000)
    synced: list[str] = []
    really = os.fsync

    def fsync(fd: int) -> None:
        named = path_of(tmp_path, filehash).exists()
        synced.append(f"{Path(os.readlink(f'/proc/self/fd/{fd}')).parent.name} {'named' if named else 'unnamed'}")
        really(fd)

    monkeypatch.setattr(disk.os, "fsync", fsync)
    engine.put(filehash, content, FACTS)
    assert synced == [f"{engine.spools.path.name} unnamed", "objects named"]
    engine.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty"])
def test_an_upload_heals_a_damaged_object(tmp_path: Path, damage: str) -> None:
    engine = DiskEngine(tmp_path)
    filehash, content = sample(50_000)
    engine.put(filehash, content, FACTS)
    path = path_of(tmp_path, filehash)
    harmed = {
        "flip": content[:100] + bytes([content[100] ^ 1]) + content[101:],
        "cut": content[:-1],
        "grow": content + b"x",
        "empty": b"",
    }[damage]
    path.write_bytes(harmed)
    with engine.open(filehash) as stored, pytest.raises(ContentMismatch):
        prove(stored, filehash)
    assert engine.put(filehash, content, FACTS) is False
    assert path.read_bytes() == content
    assert path.stat().st_nlink == 1
    engine.close()


def test_an_object_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    engine = DiskEngine(tmp_path)
    filehash, content = sample(50_000)
    engine.put(filehash, content, FACTS)
    with engine.open(filehash) as stored:
        os.truncate(path_of(tmp_path, filehash), 100)
        with pytest.raises(ContentMismatch):
            list(stored.pieces(0, stored.size))
    engine.close()


def test_a_sweep_never_takes_what_is_put_again(tmp_path: Path) -> None:
    """Deleting with a time and putting again, over and over at once: what a put returned for is there."""
    engine = DiskEngine(tmp_path)
    filehash, content = sample(1000)
    stop = threading.Event()
    deleted = 0

    def sweep() -> None:
        nonlocal deleted
        while not stop.is_set():
            deleted += engine.delete(filehash, not_newer_than_ns=time.time_ns() - 1)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    lost = 0
    try:
        for _ in range(300):
            looked = time.time_ns()
            engine.put(filehash, content, FACTS)
            # Whoever looked before this put may not delete after it.
            assert not engine.delete(filehash, not_newer_than_ns=looked)
            lost += not path_of(tmp_path, filehash).exists()
    finally:
        stop.set()
        sweeper.join()
    assert deleted > 10  # or the test has tested nothing
    assert lost <= deleted
    engine.close()


def test_delete_waits_for_a_put_that_has_decided(tmp_path: Path) -> None:
    engine = DiskEngine(tmp_path)
    filehash, content = sample(10)
    engine.put(filehash, content, FACTS)
    done = threading.Event()

    def delete() -> None:
        engine.delete(filehash, not_newer_than_ns=1 << 62)
        done.set()

    with flocked(tmp_path / "lock", fcntl.LOCK_SH):
        thread = threading.Thread(target=delete)
        thread.start()
        assert not done.wait(0.1)
    thread.join()
    with pytest.raises(ObjectMissing):
        engine.open(filehash)
    engine.close()


def test_spools_of_the_living_stay_those_of_the_dead_go(tmp_path: Path) -> None:
    script = (
        "import sys, time, os; from pathlib import Path; from metadiskfs.node.spool import SpoolFolder\n"
        "folder = SpoolFolder(Path(sys.argv[1])); folder.create().append(b'x'); print(folder.path, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout
            theirs = Path(other.stdout.readline().strip())
            ours = SpoolFolder(tmp_path)
            assert (theirs / "0").exists()
            other.kill()
            other.wait()
            assert (theirs / "0").exists()
            SpoolFolder(tmp_path).close()
            assert not theirs.exists()
            assert ours.path.exists()
            ours.close()
        finally:
            other.kill()


def test_facts_survive_where_there_are_attributes_and_are_not_missed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DiskEngine(tmp_path)
    filehash, content = sample(10)
    engine.put(filehash, content, FACTS)
    os.removexattr(path_of(tmp_path, filehash), disk._FACTS)
    with engine.open(filehash) as stored:
        assert stored.facts().name == ""
        assert abs(stored.facts().stored_at - time.time()) < 10

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(disk.os, "setxattr", refuse)
    other, content = sample(11)
    engine.put(other, content, FACTS)
    assert path_of(tmp_path, other).read_bytes() == content
    engine.close()


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DiskEngine(tmp_path)
    filehash, content = sample(1000)

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(disk.os, "link", refuse)
    assert engine.put(filehash, content, FACTS) is True
    assert engine.put(filehash, content, FACTS) is False
    assert path_of(tmp_path, filehash).read_bytes() == content
    assert [file.name for file in engine.spools.path.iterdir()] == ["lock"]
    engine.close()


def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DiskEngine(tmp_path)
    filehash, content = sample(10)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "link", full)
    with pytest.raises(OSError, match="No space"):
        engine.put(filehash, content, FACTS)
    assert [file.name for file in engine.spools.path.iterdir()] == ["lock"]
    assert not list(engine.list())
    engine.close()
