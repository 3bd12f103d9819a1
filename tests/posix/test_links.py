"""Several names of one file, and files without a name, on the disk first and then in the mount."""

import contextlib
import errno
import itertools
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Mount
from tests.posix.test_files import CHUNK, pattern
from tests.posix.test_limits import raises
from tests.posix.users import User


def same(one: Path, two: Path) -> bool:
    """Whether stat says the same of both names, twice: what the kernel keeps, too."""
    first, second = os.lstat(one), os.lstat(two)
    fields = [name for name in dir(first) if name.startswith("st_")]
    return {name: getattr(first, name) for name in fields} == {name: getattr(second, name) for name in fields}


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": lambda path: path.write_bytes(b"new content"),
    "append": lambda path: append(path),
    "write far behind": lambda path: write_at(path, CHUNK * 3),
    "truncate": lambda path: os.truncate(path, 2),
    "extend": lambda path: os.truncate(path, 3 * CHUNK),
    "empty": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 5, 6),
    "utime": lambda path: os.utime(path, ns=(5, 6)),
    "touch": lambda path: os.utime(path),
    "setxattr": lambda path: os.setxattr(path, "user.a", b"1"),
    "link": lambda path: os.link(path, path.with_name("third")),
    "unlink third": lambda path: (os.link(path, path.with_name("third")), os.unlink(path.with_name("third"))),
    "rename": lambda path: (os.rename(path, path.with_name("x")), os.rename(path.with_name("x"), path)),
    "map": lambda path: store(path),
    "read": lambda path: (os.utime(path, ns=(5, 6)), path.read_bytes()),
    "copy_file_range": lambda path: copy_into(path),
}


def write_at(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"far", offset)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def store(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] = 65
        mapped.flush()


def copy_into(path: Path) -> None:
    source = path.with_name("source")
    source.write_bytes(pattern(2 * CHUNK))
    with source.open("rb") as one, path.open("r+b") as two:
        os.copy_file_range(one.fileno(), two.fileno(), 2 * CHUNK)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_through_one_name_is_seen_through_the_other_at_once(place: Path, change: str) -> None:
    """Also where the kernel has just been told attributes and content of the other name."""
    one, two = place / "one", place / "two"
    one.write_bytes(b"content of the file")
    os.link(one, two)
    assert (two.read_bytes(), one.read_bytes()) == (b"content of the file",) * 2
    assert same(one, two)
    CHANGES[change](one)
    assert same(one, two)
    assert one.read_bytes() == two.read_bytes()
    if change != "link":
        CHANGES[change](two)
    assert same(one, two)
    assert one.read_bytes() == two.read_bytes()


def test_writers_through_two_names_see_each_other(place: Path) -> None:
    one, two = place / "one", place / "two"
    one.write_bytes(b"")
    os.link(one, two)
    with one.open("r+b", buffering=0) as first, two.open("r+b", buffering=0) as second:
        for turn in range(20):
            first.seek(0, os.SEEK_END)
            first.write(b"1" * 1000)
            assert os.fstat(second.fileno()).st_size == (2 * turn + 1) * 1000
            second.seek(0, os.SEEK_END)
            second.write(b"2" * 1000)
            assert os.pread(first.fileno(), 1000, (2 * turn + 1) * 1000) == b"2" * 1000


def test_links_count_down_to_the_last_name(place: Path) -> None:
    names = [place / f"n{number}" for number in range(5)]
    names[0].write_bytes(b"x")
    for name in names[1:]:
        os.link(names[0], name)
    with names[0].open("rb") as held:
        for left, name in zip(range(4, -1, -1), names, strict=True):
            os.unlink(name)
            assert os.fstat(held.fileno()).st_nlink == left
            assert [other.stat().st_nlink for other in names[5 - left :]] == [left] * left
        assert held.read() == b"x"


def test_renaming_over_a_name_of_the_same_file_does_nothing(place: Path) -> None:
    (place / "one").write_bytes(b"x")
    os.link(place / "one", place / "two")
    os.rename(place / "one", place / "two")
    assert sorted(os.listdir(place)) == ["one", "two"]
    assert (place / "one").stat().st_nlink == (place / "two").stat().st_nlink == 2


def test_links_across_renamed_folders(place: Path) -> None:
    """The names that must be told of a change move with their folders."""
    (place / "a/b").mkdir(parents=True)
    (place / "a/b/one").write_bytes(b"old")
    os.link(place / "a/b/one", place / "two")
    os.rename(place / "a", place / "moved")
    one, two = place / "moved/b/one", place / "two"
    assert same(one, two)
    one.chmod(0o600)
    assert same(one, two)
    two.write_bytes(b"longer content")
    assert same(one, two)
    assert one.read_bytes() == b"longer content"
    os.mkdir(place / "other")
    os.unlink(two)
    assert one.stat().st_nlink == 1


def test_links_of_a_symlink_and_of_special_files(place: Path) -> None:
    os.symlink("target", place / "link")
    os.mkfifo(place / "fifo")
    for name in ("link", "fifo"):
        os.link(place / name, place / f"{name}2", follow_symlinks=False)
        assert same(place / name, place / f"{name}2")
        os.chown(place / name, 5, 6, follow_symlinks=False)
        assert same(place / name, place / f"{name}2")
        os.unlink(place / name)
        assert os.lstat(place / f"{name}2").st_nlink == 1


def test_exchanged_names_carry_their_files(place: Path) -> None:
    root = User()
    try:
        (place / "one").write_bytes(b"1")
        (place / "two").write_bytes(b"22")
        os.link(place / "one", place / "one again")
        with (place / "one").open("r+b", buffering=0) as first:
            assert root.do(place, "rename2('one', 'two', EXCHANGE)") is None
            assert (place / "one").read_bytes() == b"22"
            assert (place / "two").stat().st_nlink == 2
            first.write(b"111")
            assert (place / "two").read_bytes() == (place / "one again").read_bytes() == b"111"
            assert (place / "one").stat().st_nlink == 1
        (place / "d/e").mkdir(parents=True)
        assert root.do(place, "rename2('d/e', 'one', EXCHANGE)") is None
        assert (place / "d/e").read_bytes() == b"22"
        assert (place / "one").is_dir()
        assert ((place / "d").stat().st_nlink, place.stat().st_nlink) == (2, 4)
        assert root.do(place, "rename2('one', 'two', NOREPLACE)") == "EEXIST"
    finally:
        root.end()


# -- without a name -----------------------------------------------------------------------------------------------


def test_an_unlinked_file_lives_until_its_last_close(place: Path) -> None:
    path, data = place / "f", pattern(3 * CHUNK)
    path.write_bytes(data)
    file = os.open(path, os.O_RDWR)
    other = os.open(path, os.O_RDONLY)
    os.unlink(path)
    assert os.listdir(place) == []
    status = os.fstat(file)
    assert (status.st_nlink, status.st_size) == (0, 3 * CHUNK)
    os.pwrite(file, b"written after", CHUNK - 5)
    data = data[: CHUNK - 5] + b"written after" + data[CHUNK + 8 :]
    assert os.pread(other, 9 * CHUNK, 0) == data
    os.fchmod(file, 0o600)
    os.fchown(file, 7, 8)
    os.utime(file, ns=(11, 12))
    status = os.fstat(other)
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o600, 7, 8)
    assert (status.st_atime_ns, status.st_mtime_ns) == (11, 12)
    os.ftruncate(file, 10)
    os.ftruncate(file, 20)
    assert os.pread(other, 99, 0) == data[:10] + bytes(10)
    os.fsync(file)
    os.close(file)
    assert os.pread(other, 99, 0) == data[:10] + bytes(10)
    assert os.listdir(place) == []
    os.rmdir(place)
    os.close(other)
    assert not place.exists()


def test_a_name_may_be_taken_again_while_the_old_file_is_open(place: Path) -> None:
    path = place / "f"
    files = []
    for number in range(5):
        path.write_bytes(b"%d" % number)
        files.append(os.open(path, os.O_RDWR))
        os.unlink(path)
    path.write_bytes(b"present")
    assert [os.pread(file, 9, 0) for file in files] == [b"0", b"1", b"2", b"3", b"4"]
    assert os.listdir(place) == ["f"]
    for file in files:
        os.close(file)
    assert path.read_bytes() == b"present"


def test_rename_over_an_open_file(place: Path) -> None:
    (place / "f").write_bytes(b"old")
    (place / "g").write_bytes(b"new one")
    with (place / "f").open("r+b", buffering=0) as old:
        os.rename(place / "g", place / "f")
        assert (place / "f").read_bytes() == b"new one"
        assert old.read() == b"old"
        old.write(b" and more")
        assert os.pread(old.fileno(), 99, 0) == b"old and more"
        assert os.fstat(old.fileno()).st_nlink == 0
        assert os.listdir(place) == ["f"]
    assert (place / "f").read_bytes() == b"new one"


def test_renaming_an_open_file(place: Path) -> None:
    (place / "a").mkdir()
    (place / "b").mkdir()
    with (place / "a/f").open("w+b", buffering=0) as file:
        file.write(b"one")
        os.rename(place / "a/f", place / "b/g")
        file.write(b"two")
        os.rename(place / "b", place / "c")
        file.write(b"three")
        assert (place / "c/g").read_bytes() == b"onetwothree"
        assert os.fstat(file.fileno()).st_size == 11
    os.rmdir(place / "a")


def test_two_names_written_at_once(place: Path, user: Callable[..., User]) -> None:
    """Each writer makes the kernel forget the other's pages while that one's request holds them."""
    (place / "one").write_bytes(bytes(4 * CHUNK))
    os.link(place / "one", place / "two")
    workers = [user() for _ in range(4)]
    for number, worker in enumerate(workers):
        name = ("one", "two")[number % 2]
        worker.start(
            place,
            f"f = os.open('{name}', os.O_RDWR); [(os.pwrite(f, bytes([n]) * 8192, {number} * 8192),"
            f" os.pread(f, 32768, 0)) for n in range(60)]; os.close(f)",
        )
    assert [worker.finish() for worker in workers] == [None] * 4
    expected = bytes([59]) * 4 * 8192
    assert (place / "one").read_bytes()[: 4 * 8192] == (place / "two").read_bytes()[: 4 * 8192] == expected


def test_writing_on_after_the_name_moved(place: Path) -> None:
    """The kernel must not be told to forget pages of the very request it waits for."""
    (place / "d").mkdir()
    (place / "d/one").write_bytes(b"x")
    os.link(place / "d/one", place / "two")
    with (place / "d/one").open("r+b", buffering=0) as file:
        os.rename(place / "d/one", place / "d/moved")
        started = time.monotonic()
        for turn in range(100):
            os.pwrite(file.fileno(), b"%d" % turn * 1000, 0)
        os.rename(place / "d", place / "e")
        for turn in range(100):
            os.pwrite(file.fileno(), b"%d" % turn * 1000, 0)
        assert time.monotonic() - started < 5
        assert (place / "two").read_bytes() == (place / "e/moved").read_bytes()


def test_unlinking_one_of_two_names_of_an_open_file(place: Path) -> None:
    (place / "one").write_bytes(b"x")
    os.link(place / "one", place / "two")
    with (place / "one").open("r+b", buffering=0) as file:
        os.unlink(place / "one")
        assert os.fstat(file.fileno()).st_nlink == 1
        file.write(b"changed")
        assert (place / "two").read_bytes() == b"changed"
        (place / "two").write_bytes(b"through the other")
        assert os.fstat(file.fileno()).st_size == 17
        assert os.pread(file.fileno(), 99, 0) == b"through the other"
        os.fchmod(file.fileno(), 0o600)
        assert (place / "two").stat().st_mode & 0o777 == 0o600
    assert os.listdir(place) == ["two"]


def test_mapping_an_unlinked_file(place: Path) -> None:
    (place / "f").write_bytes(pattern(CHUNK))
    file = os.open(place / "f", os.O_RDWR)
    with mmap.mmap(file, 0) as mapped:
        os.unlink(place / "f")
        os.close(file)
        assert mapped[:] == pattern(CHUNK)
        mapped[5] = 1
        mapped.flush()
        assert mapped[5] == 1
    assert os.listdir(place) == []


def test_a_file_made_without_a_name(place: Path) -> None:
    """O_TMPFILE is not in FUSE's high-level interface: EOPNOTSUPP, and tempfile then takes a name and drops it."""
    try:
        file = os.open(place, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        return
    os.write(file, b"x")
    os.close(file)


def test_unlinked_files_are_gone_after_a_crash(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount("--chunk-size", "64K")
    mount.start()
    (mount / "kept").write_bytes(b"kept")
    path = mount / "f"
    path.write_bytes(pattern(4 * CHUNK))
    file = os.open(path, os.O_RDWR)
    os.unlink(path)
    os.pwrite(file, b"unsealed", 0)
    mount.kill()
    for act in (lambda: os.pread(file, 1, 0), lambda: os.close(file)):
        with raises(errno.ENOTCONN):
            act()
    mount.start()
    assert os.listdir(mount.path) == ["kept"]
    assert (mount / "kept").read_bytes() == b"kept"
    held = os.statvfs(mount.path)
    assert held.f_files > 0
    status = mount.status()
    assert status["stored_bytes"] + status["pending_bytes"] <= 4 * CHUNK + 4
    assert os.listdir(mount.volume_dir / "work") == []


def test_a_file_unlinked_while_others_close_it_leaves_no_litter(place: Path, user: Callable[..., User]) -> None:
    """libfuse counts a file as open a little longer than it lets us know."""
    workers = [user() for _ in range(4)]
    for worker in workers:
        worker.start(place, "[opened('f', os.O_RDWR | os.O_CREAT) for n in range(300)] and 'ok'")
    for _ in range(300):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place / "f")
    assert [worker.finish() for worker in workers] == ["ok"] * 4
    assert [name for name in os.listdir(place) if name != "f"] == []


def test_names_like_libfuses_own_are_ordinary(place: Path) -> None:
    """A file called .fuse_hidden... by its user is listed like any other."""
    name = ".fuse_hidden00000012fffffff1"  # libfuse's own are numbered from 1 on
    (place / name).write_bytes(b"mine")
    assert os.listdir(place) == [name]
    os.rename(place / name, place / "other")
    os.rename(place / "other", place / name)
    assert (place / name).read_bytes() == b"mine"
    os.unlink(place / name)
    assert os.listdir(place) == []


def test_the_same_through_many_turns(place: Path) -> None:
    """Editors' and mailers' habit: write a new file, rename it over the old one that somebody reads."""
    path = place / "f"
    path.write_bytes(b"0")
    for turn in itertools.count(1):
        if turn > 50:
            break
        with path.open("rb") as reader:
            (place / "tmp").write_bytes(b"%d" % turn)
            os.rename(place / "tmp", path)
            assert reader.read() == b"%d" % (turn - 1)
    assert os.listdir(place) == ["f"]
    time.sleep(0.05)
    assert os.listdir(place) == ["f"]
