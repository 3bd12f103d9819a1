"""The kernel keeps attributes and names for an hour: nothing it keeps may be out of date."""

import fcntl
import mmap
import os
import threading
import time
from pathlib import Path

from tests.conftest import eventually
from tests.posix.conftest import SharedMount
from tests.posix.test_files import CHUNK, pattern
from tests.posix.users import User


def test_nothing_changes_when_a_quiet_file_is_sealed(inside: Path, shared: SharedMount) -> None:
    """A file that stays open is sealed in the background; its size, times and blocks are what they were."""
    with (inside / "f").open("wb", buffering=0) as file:
        file.write(pattern(2 * CHUNK + 5))
        before = os.fstat(file.fileno())
        shared.sync()
        os.setxattr(inside / "f", "user.a", b"1")  # makes the kernel ask anew
        after = os.stat(inside / "f")
        assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
        assert after.st_mtime_ns == before.st_mtime_ns
    assert (inside / "f").stat().st_mtime_ns == before.st_mtime_ns


def test_attributes_after_each_way_to_write(place: Path) -> None:
    path = place / "f"
    path.write_bytes(b"")
    seen = path.stat()
    for size, write in (
        (CHUNK, lambda: path.write_bytes(pattern(CHUNK))),
        (CHUNK + 3, lambda: _append(path)),
        (5, lambda: os.truncate(path, 5)),
        (3 * CHUNK, lambda: os.truncate(path, 3 * CHUNK)),
        (3 * CHUNK, lambda: _store(path)),
        (0, lambda: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))),
    ):
        time.sleep(0.01)
        write()
        now = path.stat()
        assert now.st_size == size
        assert now.st_mtime_ns > seen.st_mtime_ns
        assert now.st_ctime_ns > seen.st_ctime_ns
        seen = now


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"end")


def _store(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] = 1
        mapped.flush()


def test_blocks_of_a_file_being_written(inside: Path) -> None:
    with (inside / "f").open("wb", buffering=0) as file:
        for turn in range(1, 5):
            file.write(pattern(CHUNK))
            assert (inside / "f").stat().st_blocks == os.fstat(file.fileno()).st_blocks == turn * CHUNK // 512


def test_listings_show_files_being_written_as_they_are(place: Path) -> None:
    """scandir's stat comes from readdirplus in the mount."""
    with (place / "f").open("wb", buffering=0) as file:
        for turn in range(1, 5):
            file.write(b"x" * 1000)
            with os.scandir(place) as entries:
                assert [entry.stat().st_size for entry in entries] == [turn * 1000]
            assert os.stat(place / "f").st_size == turn * 1000


def test_listings_and_second_names(place: Path) -> None:
    """A name that a listing showed must learn of changes through another one."""
    (place / "d").mkdir()
    (place / "d/one").write_bytes(b"1")
    os.link(place / "d/one", place / "two")
    with os.scandir(place / "d") as entries:
        assert [entry.stat().st_nlink for entry in entries] == [2]
    (place / "two").write_bytes(b"22222")
    assert (place / "d/one").stat().st_size == 5
    os.unlink(place / "two")
    assert (place / "d/one").stat().st_nlink == 1


def test_moving_across_folders_tells_both(place: Path) -> None:
    for name in ("a", "b"):
        (place / name).mkdir()
    (place / "a/f").write_bytes(b"x")
    (place / "a/sub").mkdir()
    for what in ("f", "sub"):
        before = [(place / name).stat() for name in ("a", "b")]
        inner = (place / "a" / what).stat()
        time.sleep(0.01)
        os.rename(place / "a" / what, place / "b" / what)
        after = [(place / name).stat() for name in ("a", "b")]
        assert all(new.st_mtime_ns > old.st_mtime_ns for new, old in zip(after, before, strict=True))
        assert [new.st_nlink - old.st_nlink for new, old in zip(after, before, strict=True)] == (
            [-1, 1] if what == "sub" else [0, 0]
        )
        assert (place / "b" / what).stat().st_ctime_ns > inner.st_ctime_ns
        assert not (place / "a" / what).exists()


def test_a_name_that_was_missing_appears(place: Path, users: dict[str, User]) -> None:
    for make in ("os.mkdir('x')", "opened('x', os.O_CREAT)", "os.symlink('y', 'x')", "os.rename('z', 'x')"):
        (place / "z").touch()
        assert not os.path.lexists(place / "x")
        assert users["root"].do(place, make) in (None, "ok")
        assert os.path.lexists(place / "x")
        remove = "os.rmdir('x')" if make.startswith("os.mkdir") else "os.unlink('x')"
        assert users["root"].do(place, remove) is None
        assert not os.path.lexists(place / "x")


def test_a_listing_while_names_come_and_go(place: Path) -> None:
    """What stays is listed exactly once; what comes or goes is listed at most once."""
    staying = {f"stays-{number:04}" for number in range(2500)}
    for name in staying:
        os.symlink("x", place / name)
    ended = threading.Event()

    def change() -> None:
        number = 0
        while not ended.is_set():
            os.symlink("x", place / f"s{number}")
            os.unlink(place / f"s{number}")
            number += 1

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(5):
            listed = os.listdir(place)
            assert len(listed) == len(set(listed))
            assert staying <= set(listed)
    finally:
        ended.set()
        changer.join()


def test_removing_while_listing(place: Path) -> None:
    for number in range(3000):
        os.symlink("x", place / f"{number}")
    with os.scandir(place) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(place) == []
    os.rmdir(place)


def test_going_back_in_a_listing(place: Path, users: dict[str, User]) -> None:
    """rewinddir(3) and seekdir(3): the same names again, and new ones after a rewind."""
    for number in range(300):
        os.symlink("x", place / f"{number}")
    call = (
        "libc = ctypes.CDLL(None); libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p; "
        "d = ctypes.c_void_p(libc.opendir(b'.')); "
        "one = sum(1 for _ in iter(lambda: libc.readdir(d), None)); os.symlink('x', 'new'); libc.rewinddir(d); "
        "two = sum(1 for _ in iter(lambda: libc.readdir(d), None)); libc.closedir(d); (one, two)"
    )
    assert users["root"].do(place, f"exec({call.rpartition('; ')[0]!r}, globals()); (one, two)") == (302, 303)


def test_the_upload_state_is_not_kept(inside: Path, shared: SharedMount) -> None:
    (inside / "f").write_bytes(os.urandom(CHUNK))
    eventually(lambda: os.getxattr(inside / "f", "user.metadisk.state") == b"stored")


def test_append_through_a_descriptor_whose_flags_changed(place: Path) -> None:
    with (place / "f").open("w+b", buffering=0) as file:
        file.write(b"12345")
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_RDWR | os.O_APPEND)
        file.seek(0)
        file.write(b"6")
        file.seek(0)
        assert file.read() == b"123456"
