"""Locks between processes: the kernel keeps them, as it does for a local disk."""

import fcntl
import os
from pathlib import Path

import pytest

from tests.posix.users import User


@pytest.fixture
def file(place: Path) -> Path:
    (place / "f").write_bytes(bytes(1000))
    return place / "f"


def test_fcntl_locks_of_ranges(file: Path, users: dict[str, User]) -> None:
    root, place = users["root"], file.parent
    with file.open("r+b") as mine:
        fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 100)
        fcntl.lockf(mine, fcntl.LOCK_SH | fcntl.LOCK_NB, 10, 200)

        def attempt(kind: str, start: int, length: int) -> object:
            how = f"fcntl.LOCK_{kind} | fcntl.LOCK_NB, {length}, {start}"
            return root.do(place, f"with_fd('f', os.O_RDWR, fcntl.lockf, {how})")

        assert attempt("EX", 105, 1) == "EAGAIN"
        assert attempt("SH", 105, 1) == "EAGAIN"
        assert attempt("EX", 110, 90) is None
        assert attempt("SH", 200, 10) is None
        assert attempt("EX", 200, 10) == "EAGAIN"
        assert attempt("EX", 0, 0) == "EAGAIN"
        fcntl.lockf(mine, fcntl.LOCK_UN)
        assert attempt("EX", 0, 0) is None


def test_fcntl_locks_go_with_any_close(file: Path, users: dict[str, User]) -> None:
    with file.open("r+b") as mine:
        fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        attempt = "with_fd('f', os.O_RDWR, fcntl.lockf, fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert users["root"].do(file.parent, attempt) == "EAGAIN"
        file.read_bytes()
        assert users["root"].do(file.parent, attempt) is None


def test_waiting_for_a_lock(file: Path, users: dict[str, User]) -> None:
    root = users["root"]
    with file.open("r+b") as mine:
        fcntl.lockf(mine, fcntl.LOCK_EX)
        root.start(file.parent, "with_fd('f', os.O_RDWR, fcntl.lockf, fcntl.LOCK_EX)")
        mine.write(b"x")
    assert root.finish() is None


def test_flock(file: Path, users: dict[str, User]) -> None:
    attempt = "with_fd('f', os.O_RDONLY, fcntl.flock, fcntl.LOCK_{} | fcntl.LOCK_NB)"
    with file.open("rb") as mine:
        fcntl.flock(mine, fcntl.LOCK_SH)
        assert users["root"].do(file.parent, attempt.format("SH")) is None
        assert users["root"].do(file.parent, attempt.format("EX")) == "EAGAIN"
        fcntl.flock(mine, fcntl.LOCK_EX)
        assert users["root"].do(file.parent, attempt.format("SH")) == "EAGAIN"
        with file.open("rb"):
            pass  # another descriptor's close leaves it
        assert users["root"].do(file.parent, attempt.format("SH")) == "EAGAIN"
    assert users["root"].do(file.parent, attempt.format("EX")) is None


def test_a_lock_dies_with_its_process(file: Path) -> None:
    holder, asker = User(), User()
    try:
        assert holder.do(file.parent, "kept = os.open('f', os.O_RDWR); globals().update(kept=kept); kept > 0") is True
        assert holder.do(file.parent, "fcntl.flock(kept, fcntl.LOCK_EX)") is None
        assert holder.do(file.parent, "fcntl.lockf(kept, fcntl.LOCK_EX)") is None
        for kind in ("flock", "lockf"):
            attempt = f"with_fd('f', os.O_RDWR, fcntl.{kind}, fcntl.LOCK_EX | fcntl.LOCK_NB)"
            assert asker.do(file.parent, attempt) == "EAGAIN"
        holder.kill()
        for kind in ("flock", "lockf"):
            attempt = f"with_fd('f', os.O_RDWR, fcntl.{kind}, fcntl.LOCK_EX | fcntl.LOCK_NB)"
            assert asker.do(file.parent, attempt) is None
    finally:
        asker.end()


def test_locks_of_the_open_file(file: Path, users: dict[str, User]) -> None:
    """F_OFD_SETLK: SQLite's alternative to locks that any close drops."""
    import struct

    lock = struct.pack("hhqqhxxxxxx", fcntl.F_WRLCK, 0, 0, 0, 0)
    with file.open("r+b") as mine:
        fcntl.fcntl(mine, 37, lock)
        file.read_bytes()
        attempt = "with_fd('f', os.O_RDWR, fcntl.lockf, fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert users["root"].do(file.parent, attempt) == "EAGAIN"
    assert os.path.exists(file)
