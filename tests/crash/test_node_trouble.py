"""A bad node or network under a real mount: retried for ever, nothing wrong is handed out, nobody waits for ever."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Mount, eventually, is_running, metadiskfs
from tests.crash.conftest import CHUNK, Bench, files_below, fill_and_end
from tests.metadisk.bad_node import BadNode

IMPATIENT = {"METADISKFS_READ_TIMEOUT": "1", "METADISKFS_READ_DEADLINE": "1", "METADISKFS_CONNECT_TIMEOUT": "1"}
READ_SECONDS = 1 + 5 + 3
"""The deadline, the margin for a restart of the transfer process, and a loaded machine."""


@pytest.fixture
def impatient(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    for name, value in IMPATIENT.items():
        monkeypatch.setenv(name, value)
    bench.start()
    yield bench


@pytest.mark.parametrize(
    "faults",
    [
        ("status:503", "html:502", "reset:1000"),
        ("reset", "hang", "truncated-answer"),
        ("receipt:filehash", "receipt:key", "receipt:html", "receipt:words"),
        ("status:429:1", "early:500", "close", "ack-early"),
        ("status:402", "status:400", "status:413", "redirect:http://127.0.0.1:1/"),
    ],
)
def test_every_upload_arrives_in_the_end(impatient: Bench, faults: tuple[str, ...]) -> None:
    """Each fault several times, more often than one attempt would try; then the node is good."""
    for fault in faults:
        impatient.node.fail("upload", "drip" if fault == "truncated-answer" else fault, times=4)
    for number in range(8):
        impatient.write(f"file{number}", os.urandom(2000 + number))
    eventually(lambda: impatient.status()["pending_chunks"] == 0, 60)
    impatient.forget()
    impatient.check_files()


def test_retries_back_off_and_never_stop(impatient: Bench) -> None:
    impatient.node.fail("upload", "status:500", times=-1)
    impatient.node.requests.clear()
    for number in range(20):
        impatient.write(f"file{number}", os.urandom(1000))
    time.sleep(3)
    first = len(impatient.node.requests)
    time.sleep(3)
    second = len(impatient.node.requests) - first
    assert 0 < second < first < 200
    status = impatient.status()
    assert status["node_away"] and status["failing_chunks"] and "500" in status["last_error"]
    assert status["pending_chunks"] == 20
    impatient.node.heal()
    eventually(lambda: impatient.status()["pending_chunks"] == 0, 30)
    assert not impatient.status()["last_error"]


def test_retry_after_is_heeded(impatient: Bench) -> None:
    impatient.node.requests.clear()
    impatient.node.fail("upload", "status:429:3", times=1)
    before = time.monotonic()
    impatient.write("file", os.urandom(1000))
    eventually(lambda: impatient.status()["pending_chunks"] == 0, 30)
    assert time.monotonic() - before >= 3
    assert len([one for one in impatient.node.requests if one.route == "upload"]) == 2


WRONG_READS = [
    "alter:2",
    "truncate:10",
    "short:10",
    "status:500",
    "status:404",
    "html:200",
    "html:404",
    "reset:10",
    "hang:10",
    "hang",
    "endless",
    "drip",
    "drip-body",
    "redirect:http://127.0.0.1:1/",
    "wrong-range",
]


def test_a_read_gets_the_right_bytes_or_an_error_in_time(impatient: Bench) -> None:
    """Every fault lasts; all files at once, or it would take as long as there are faults."""
    names = ["small", "large"]
    for fault in WRONG_READS:
        impatient.forget()
        impatient.node.fail("download", fault, times=-1)
        results: dict[str, bytes | OSError] = {}
        before = time.monotonic()
        readers = [threading.Thread(target=_read, args=(impatient / name, results)) for name in names]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert time.monotonic() - before < READ_SECONDS, fault
        for name in names:
            result = results[name]
            if isinstance(result, OSError):
                assert result.errno == errno.EIO, fault
            else:
                assert result == impatient.closed[name], fault
        assert isinstance(results["large"], OSError) or fault == "wrong-range", fault
        impatient.node.heal()
    impatient.check_files()
    assert "large at" in impatient.mount.log


def _read(path: Path, results: dict[str, bytes | OSError]) -> None:
    try:
        results[path.name] = path.read_bytes()
    except OSError as error:
        results[path.name] = error


def test_an_object_the_node_forgot(impatient: Bench) -> None:
    """EIO, not ENOENT and not zeros; counted as lost; there again, it reads again."""
    kept = dict(impatient.node.objects)
    impatient.node.objects.clear()
    impatient.forget()
    with pytest.raises(OSError, match="Input/output"):
        (impatient / "large").read_bytes()
    assert (impatient / "large").stat().st_size == len(impatient.closed["large"])
    assert impatient.status()["lost_chunks"]
    impatient.node.objects.update(kept)
    impatient.check_files()
    assert not impatient.status()["lost_chunks"]


def test_a_node_that_acknowledges_and_keeps_nothing(impatient: Bench) -> None:
    impatient.node.fail("upload", "forget", times=1)
    impatient.write("file", os.urandom(1000))
    impatient.sync()
    impatient.check_files()
    impatient.forget()
    with pytest.raises(OSError, match="Input/output"):
        (impatient / "file").read_bytes()


def test_writing_into_a_file_that_is_not_here(impatient: Bench) -> None:
    impatient.forget()
    impatient.node.fail("download", "hang", times=-1)
    before = time.monotonic()
    with open(impatient / "large", "r+b") as file, pytest.raises(OSError, match="Input/output"):
        os.pwrite(file.fileno(), b"x", 10)
    assert time.monotonic() - before < READ_SECONDS
    impatient.node.heal()
    impatient.check_files()


def test_the_cache_fills_and_drains(impatient: Bench) -> None:
    """While the node is away writing goes on until there is no room, then ENOSPC; nothing closed is lost."""
    impatient.mount.unmount()
    impatient.start("--cache-size", "1M")
    impatient.node.fail("upload", "status:503", times=-1)
    with pytest.raises(OSError, match="No space left") as caught:
        for number in range(40):
            impatient.write(f"file{number}", os.urandom(CHUNK))
    assert caught.value.errno == errno.ENOSPC
    impatient.check_files()
    assert 10 <= len(impatient.closed) <= 20
    impatient.node.heal()
    eventually(lambda: impatient.status()["pending_chunks"] == 0, 30)
    for number in range(40, 60):
        impatient.write(f"file{number}", os.urandom(CHUNK))
    impatient.sync()
    impatient.check_files()


def test_mounting_while_the_node_is_away(make_mount: Callable[..., Mount], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here reads, writing goes on; what is not here is EIO in time; the queue drains by itself."""
    for name, value in IMPATIENT.items():
        monkeypatch.setenv(name, value)
    node = BadNode()
    bench = Bench(make_mount("--chunk-size", "64K", "--node", node.url), node)
    fill_and_end(bench)
    for path in files_below(bench.mount.cache_dir):
        if path.stat().st_size == CHUNK:
            path.unlink()
    node.stop()
    bench.start()
    assert (bench / "small").read_bytes() == bench.closed["small"]
    bench.write("new", os.urandom(3 * CHUNK))
    before = time.monotonic()
    with pytest.raises(OSError, match="Input/output"):
        (bench / "large").read_bytes()
    assert time.monotonic() - before < READ_SECONDS
    eventually(lambda: bench.status()["last_error"])
    with BadNode(port=node.port) as back:
        back.objects.update(node.objects)
        eventually(lambda: bench.status()["pending_chunks"] == 0, 60)
        bench.check_files()
        bench.forget()
        bench.check_files()
        bench.end()


def test_unmount_with_a_timeout(impatient: Bench) -> None:
    impatient.node.fail("upload", "status:503", times=-1)
    impatient.write("file", os.urandom(1000))
    done = metadiskfs("unmount", str(impatient.mount.path), "--timeout", "1", check=False)
    assert done.returncode == 8
    assert "stays mounted" in done.stderr
    assert os.path.ismount(impatient.mount.path)
    impatient.check_files()
    impatient.node.heal()
    impatient.mount.unmount()
    assert not os.path.ismount(impatient.mount.path)


def test_sync_returns_when_nothing_is_pending(impatient: Bench) -> None:
    impatient.node.fail("upload", "status:503", times=-1)
    impatient.write("file", os.urandom(1000))
    fd = os.open(impatient / "open", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"not closed")
    command = [sys.executable, "-m", "metadiskfs", "sync", str(impatient.mount.path)]
    sync = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    time.sleep(2)
    assert is_running(sync.pid)
    impatient.node.heal()
    assert sync.wait(30) == 0
    assert impatient.status()["pending_chunks"] == 0
    impatient.kill()
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.close(fd)
    assert metadiskfs("sync", str(impatient.mount.path), check=False).returncode != 0
    impatient.closed["open"] = b"not closed"
    impatient.again()


def test_sync_fails_when_the_mount_dies(impatient: Bench) -> None:
    impatient.node.fail("upload", "status:503", times=-1)
    impatient.write("file", os.urandom(1000))
    command = [sys.executable, "-m", "metadiskfs", "sync", str(impatient.mount.path)]
    sync = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)
    impatient.kill()
    said = sync.communicate(timeout=30)[1]
    assert sync.returncode == 7
    assert "Traceback" not in said


def test_close_reports_what_the_node_said_with_sync(impatient: Bench) -> None:
    impatient.mount.unmount()
    impatient.start("--sync")
    impatient.write("good", b"acknowledged")
    assert impatient.status()["pending_chunks"] == 0
    impatient.node.fail("upload", "status:402", times=-1)
    fd = os.open(impatient / "dear", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"costs too much")
    before = time.monotonic()
    with pytest.raises(OSError, match="quota") as caught:
        os.close(fd)
    assert caught.value.errno == errno.EDQUOT
    assert time.monotonic() - before < 15
    impatient.node.heal()
    impatient.closed["dear"] = b"costs too much"
    impatient.sync()
    impatient.forget()
    impatient.check_files()
