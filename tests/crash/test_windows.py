"""Each crash window of docs/CRASH.md, hit on purpose in a real mount: the next one finds all that was promised."""

import os
import re
import threading
from pathlib import Path

import pytest

from metadiskfs.store.fsck import check_index
from tests.conftest import PROJECT, eventually, metadiskfs
from tests.crash.conftest import CHUNK, Bench, verify
from tests.fs.drivers import VolumeDriver

NEW = os.urandom(2 * CHUNK + 100)


def write_unsynced(path: Path, content: bytes) -> int:
    """Returns the descriptor, still open."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    assert os.write(fd, content) == len(content)
    return fd


def close(fd: int) -> None:
    """Close whatever is at the other end."""
    try:
        os.close(fd)
    except OSError as error:
        print(f"close said: {error}")


def windows_in(text: str) -> set[str]:
    return set(re.findall(r'crash_point\("([a-z-]+)"\)', text))


def test_every_window_has_its_row_and_its_test() -> None:
    source = "".join(path.read_text() for path in (PROJECT / "metadiskfs").rglob("*.py"))
    documented = set(re.findall(r"^\| `([a-z-]+)`", (PROJECT / "docs/CRASH.md").read_text(), re.MULTILINE))
    tests = Path(__file__).read_text()
    assert windows_in(source) == documented
    assert {name for name in documented if f'"{name}"' not in tests} == set()


# -- closing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["placed-before-row", "content-before-commit"])
def test_close_before_its_commit(bench: Bench, window: str) -> None:
    """close() has not returned: the file is as it was before, what was written is in lost+found."""
    bench.start(crash_at=window)
    bench.crash(lambda: close(write_unsynced(bench / "new", NEW)))
    bench.closed["new"] = b""
    bench.again()
    assert bench.lost_and_found() == [NEW]


@pytest.mark.parametrize("window", ["content-after-commit", "files-before-following"])
def test_close_after_its_commit(bench: Bench, window: str) -> None:
    """The content is there, once: its work files are not taken for something unclosed."""
    bench.start(crash_at=window)
    bench.crash(lambda: close(write_unsynced(bench / "new", NEW)))
    bench.closed["new"] = NEW
    bench.again()
    assert bench.lost_and_found() == []


def test_closing_content_that_is_stored_already(bench: Bench) -> None:
    bench.start(crash_at="files-before-following")
    bench.crash(lambda: close(write_unsynced(bench / "copy", bench.closed["large"])))
    bench.closed["copy"] = bench.closed["large"]
    bench.again()
    assert bench.lost_and_found() == []


def test_overwriting_part_of_a_closed_file(bench: Bench) -> None:
    bench.start(crash_at="content-before-commit")
    fd = os.open(bench / "large", os.O_RDWR)
    os.pwrite(fd, b"changed", CHUNK)
    bench.crash(lambda: close(fd))
    bench.again()
    changed = bytearray(bench.closed["large"][CHUNK : 2 * CHUNK])
    changed[:7] = b"changed"
    assert bench.lost_and_found() == [bytes(CHUNK) + changed]


def test_a_deleted_file_does_not_leave_its_chunks(bench: Bench) -> None:
    bench.start(crash_at="files-before-following")
    bench.crash(lambda: os.unlink(bench / "large"))
    del bench.closed["large"]
    bench.again()
    assert not (bench / "large").exists()
    assert bench.lost_and_found() == []


# -- fsync ------------------------------------------------------------------------------------------------------


def test_fsync_before_its_row(bench: Bench) -> None:
    """fsync() has not returned, so nothing is promised but that nothing is thrown away."""
    bench.start(crash_at="fsync-before-row")
    fd = write_unsynced(bench / "new", NEW)
    bench.crash(lambda: os.fsync(fd))
    close(fd)
    bench.closed["new"] = b""
    bench.again()
    assert bench.lost_and_found() == [NEW]


def test_fsync_after_its_row(bench: Bench) -> None:
    bench.start(crash_at="fsync-after-row")
    fd = write_unsynced(bench / "new", NEW)
    bench.crash(lambda: os.fsync(fd))
    close(fd)
    bench.closed["new"] = NEW
    bench.again()
    assert bench.lost_and_found() == []


def test_fsync_of_what_is_closed(bench: Bench) -> None:
    bench.start(crash_at="durable-before-commit")
    bench.write("new", NEW)
    fd = os.open(bench / "new", os.O_RDONLY)
    bench.crash(lambda: os.fsync(fd))
    close(fd)
    bench.again()


@pytest.mark.parametrize("window", ["content-before-commit", "files-before-following", "content-before-replaced"])
def test_closing_what_was_synced_and_cut_since(bench: Bench, window: str) -> None:
    """The durable work file may go only after no row names it: before the commit all is as fsync left it."""
    bench.start()
    fd = write_unsynced(bench / "new", NEW)
    os.fsync(fd)
    bench.kill()
    close(fd)
    bench.start()
    assert (bench / "new").read_bytes() == NEW
    bench.mount.unmount("--no-wait")
    bench.start(crash_at=window)
    fd = os.open(bench / "new", os.O_RDWR)
    os.pwrite(fd, b"X" * 100, 0)

    def sync_cut_and_close() -> None:
        os.fsync(fd)
        os.ftruncate(fd, 50)
        os.close(fd)

    bench.crash(sync_cut_and_close)
    synced = b"X" * 100 + NEW[100:]
    found = synced if window == "content-before-commit" else synced[:50]
    # Any of these windows may be passed by fsync first: then it is fsync that has not returned.
    bench.mount.start()
    now = (bench / "new").read_bytes()
    assert now in {found, NEW, synced}
    bench.closed["new"] = now
    bench.mount.unmount("--no-wait")
    bench.again()


def test_cut_after_fsync_and_killed_before_close(bench: Bench) -> None:
    bench.start()
    fd = write_unsynced(bench / "new", NEW)
    os.fsync(fd)
    os.ftruncate(fd, 50)
    bench.kill()
    close(fd)
    bench.closed["new"] = NEW
    bench.again()


# -- names ------------------------------------------------------------------------------------------------------


def test_replacing_an_open_file(bench: Bench) -> None:
    """libfuse takes the old name away first; neither may be missing."""
    bench.start(crash_at="joined-before-commit")
    (bench / "new").write_bytes(NEW)
    fd = os.open(bench / "large", os.O_RDONLY)
    bench.crash(lambda: os.replace(bench / "new", bench / "large"))
    close(fd)
    bench.closed["new"] = NEW
    bench.again()
    assert bench.lost_and_found() == []


def test_another_thread_takes_over_the_name_of_an_open_file(tmp_path: Path) -> None:
    """Unlinked by one thread, not committed yet, renamed onto by another: the old file must not stay nameless."""
    fs = VolumeDriver(tmp_path)
    fs.write("/old", b"old")
    fs.write("/new", b"new")
    tree = fs.volume.tree
    handle = fs.volume.open(tree.resolve(b"/old"), os.O_RDONLY)
    unlink = threading.Thread(target=tree.unlink_later, args=tree.resolve_parent(b"/old"))
    unlink.start()  # as FUSE's callback does, but for waking the maintenance thread
    unlink.join()
    with fs.index.lock:
        fs.rename("/new", "/old")
        assert [finding.kind for finding in check_index(fs.index.db)] == []
    fs.volume.release(handle)
    assert fs.read("/old") == b"new"
    fs.close()


def test_replacing_a_closed_file(bench: Bench) -> None:
    bench.start()
    bench.write("new", NEW)
    bench.mount.unmount("--no-wait")
    bench.start(crash_at="files-before-following")
    bench.crash(lambda: os.replace(bench / "new", bench / "large"))
    bench.closed["large"] = bench.closed.pop("new")
    bench.again()


def test_an_open_file_that_was_unlinked_is_gone(bench: Bench) -> None:
    bench.start()
    fd = os.open(bench / "large", os.O_RDWR)
    os.unlink(bench / "large")
    os.pwrite(fd, b"more", 0)
    eventually(lambda: bench.ask("mount") and not (bench / "large").exists())
    os.listdir(bench.mount.path)  # the volume has it in its index now
    bench.kill()
    close(fd)
    del bench.closed["large"]
    bench.again()
    assert not (bench / "large").exists()
    assert bench.lost_and_found() == []


# -- uploads, downloads, eviction -------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["stored-before-row", "stored-before-move"])
def test_upload_recorded_or_not(bench: Bench, window: str) -> None:
    bench.start(crash_at=window)
    bench.crash(lambda: bench.write("new", NEW))
    bench.closed["new"] = NEW
    bench.again()


def test_download_before_it_has_its_name(bench: Bench) -> None:
    bench.start()
    bench.forget()
    bench.mount.unmount("--no-wait")
    bench.start(crash_at="fetched-before-rename")
    bench.crash(lambda: (bench / "large").read_bytes())
    bench.again()


def test_eviction(bench: Bench) -> None:
    bench.start(crash_at="evict-before-unlink")
    bench.crash(lambda: bench.ask("clear_cache"))
    bench.again()


@pytest.mark.parametrize("window", ["taken-back-before-rename", "taken-back-before-row"])
def test_healing_what_the_node_lost(bench: Bench, window: str) -> None:
    bench.node.objects.clear()
    bench.start(crash_at=window)
    bench.crash(lambda: metadiskfs("verify", str(bench.mount.path), "--repair", check=False))
    bench.start()
    bench.check_files()
    assert verify(bench.mount, "--repair", "--restart")[0] == 0
    bench.sync()
    bench.mount.unmount("--no-wait")
    bench.again()


def test_backup_before_its_manifest(bench: Bench) -> None:
    bench.start(crash_at="backup-before-manifest")
    bench.write("new", NEW)
    bench.crash(lambda: bench.ask("backup"))
    bench.again()
    assert bench.ask("backup")[-1]["link"]
    assert {path.name for path in (bench.mount.volume_dir / "backup").iterdir()} == {"last"}


# -- recovery itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window",
    [
        "recovery-before-unlinked",
        "recovery-after-unlinked",
        "recovery-after-chunks",
        "recovery-after-adopting",
        "recovery-before-kept",
        "recovered-before-session",
        "placed-before-row",
        "files-before-following",
    ],
)
def test_recovery_interrupted(bench: Bench, window: str) -> None:
    """Everything a crash can leave at once, and the mount that tidies it up dies as well, twice."""
    bench.slowly(pause=5)
    bench.start()
    bench.write("pending", os.urandom(1000))
    synced = write_unsynced(bench / "synced", NEW)
    os.fsync(synced)
    unclosed = write_unsynced(bench / "unclosed", NEW[::-1])
    unlinked = os.open(bench / "small", os.O_RDWR)
    os.unlink(bench / "small")
    os.pwrite(unlinked, b"more", 0)
    os.listdir(bench.mount.path)
    bench.kill()
    for fd in (synced, unclosed, unlinked):
        close(fd)
    bench.node.heal()
    bench.crash_while_mounting(window)
    bench.crash_while_mounting(window) if window in AGAIN else None
    del bench.closed["small"]
    bench.closed |= {"synced": NEW, "unclosed": b""}
    bench.again()
    assert bench.lost_and_found() == [NEW[::-1]]
    assert not (bench / "small").exists()


AGAIN = {"recovery-after-unlinked", "recovery-after-chunks", "recovery-after-adopting", "recovery-before-kept"}
"""Windows passed by every recovery, whatever there is to do."""
