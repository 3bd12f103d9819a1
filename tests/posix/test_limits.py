"""Limits and refusals, on the disk first and then in the mount."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.users import User

NAME_MAX, PATH_MAX = 255, 4096


def raises(number: int) -> "pytest.RaisesExc[OSError]":
    return pytest.raises(OSError, check=lambda error: error.errno == number)


MAKERS: dict[str, Callable[[str], object]] = {
    "open": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
    "mkdir": os.mkdir,
    "mkfifo": os.mkfifo,
    "symlink": lambda path: os.symlink("x", path),
    "link": lambda path: os.link("there", path),
    "rename": lambda path: os.rename("there", path),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_names_of_255_bytes_and_not_of_256(place: Path, maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("there").touch()
    MAKERS[maker]("n" * NAME_MAX)
    assert "n" * NAME_MAX in os.listdir()
    Path("there").touch()
    with raises(errno.ENAMETOOLONG):
        MAKERS[maker]("n" * (NAME_MAX + 1))
    with raises(errno.ENAMETOOLONG):
        os.stat("n" * (NAME_MAX + 1))


def test_paths_of_4095_bytes_and_not_of_4096(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    folder = "/".join(["d" * 200] * 20)
    os.makedirs(folder)
    exact = f"./{folder}/".ljust(PATH_MAX - 1, "f")
    with open(exact, "w") as file:
        file.write("deep")
    assert Path(exact).read_text() == "deep"
    for act in (os.stat, os.unlink, os.mkdir, os.listdir):
        with raises(errno.ENAMETOOLONG):
            act(exact + "f")
    os.unlink(exact)


def test_a_tree_deeper_than_any_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for _ in range(30):
        os.mkdir("x" * 200)
        os.chdir("x" * 200)
    Path("bottom").write_text("here")
    assert Path("bottom").read_text() == "here"
    assert os.stat("bottom").st_size == 4
    os.rename("bottom", "../up")
    os.unlink("../up")
    for _ in range(30):
        os.chdir("..")
        os.rmdir("x" * 200)
    assert os.listdir() == []


def test_symlinks_of_4095_bytes_and_not_of_4096(place: Path) -> None:
    os.symlink("t" * (PATH_MAX - 1), place / "link")
    assert os.readlink(place / "link") == "t" * (PATH_MAX - 1)
    assert os.lstat(place / "link").st_size == PATH_MAX - 1
    with raises(errno.ENAMETOOLONG):
        os.symlink("t" * PATH_MAX, place / "longer")
    with raises(errno.ENOENT):
        os.symlink("", place / "empty")


def test_40_symlinks_in_a_row_and_not_41(place: Path) -> None:
    (place / "l0").write_text("end")
    for number in range(1, 42):
        os.symlink(f"l{number - 1}", place / f"l{number}")
    assert (place / "l40").read_text() == "end"
    with raises(errno.ELOOP):
        (place / "l41").read_text()


def test_a_running_program_is_not_written_to(place: Path) -> None:
    program = place / "program"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    running = subprocess.Popen([str(program), "60"])
    try:
        with raises(errno.ETXTBSY):
            os.open(program, os.O_WRONLY)
        os.rename(program, place / "moved")
        os.unlink(place / "moved")
    finally:
        running.kill()
        running.wait()


def test_a_program_being_written_does_not_run(place: Path) -> None:
    program = place / "program"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    with open(program, "ab"), raises(errno.ETXTBSY):
        subprocess.run([str(program)], check=True)
    subprocess.run([str(program)], check=True)


def test_nothing_is_moved_or_linked_to_another_file_system(inside: Path, disk: Path) -> None:
    (inside / "f").touch()
    with raises(errno.EXDEV):
        os.rename(inside / "f", disk / "f")
    with raises(errno.EXDEV):
        os.link(inside / "f", disk / "f")


def test_names_that_are_not_utf_8(place: Path) -> None:
    raw = os.fsencode(place)
    names = [b"\xff\xfe", b"\xc3", b"back\\slash", b"line\nbreak", b"\x01\x7f", b" ", b"...", b"-rf", b"\xe4" * 255]
    for name in names:
        with open(raw + b"/" + name, "wb") as file:
            file.write(name)
    os.symlink(b"\xff target", raw + b"/link")
    assert sorted(os.listdir(raw)) == sorted([*names, b"link"])
    assert os.readlink(raw + b"/link") == b"\xff target"
    for name in names:
        with open(raw + b"/" + name, "rb") as file:
            assert file.read() == name
        os.rename(raw + b"/" + name, raw + b"/" + name[:-1] + b"\xfd")


def test_a_folder_that_was_removed_takes_nothing_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "d").mkdir()
    held = os.open(place / "d", os.O_RDONLY)
    try:
        monkeypatch.chdir(place / "d")
        os.rmdir(place / "d")
        for act in (os.mkdir, os.mkfifo, lambda name: os.symlink("x", name)):
            with raises(errno.ENOENT):
                act("new")
        with raises(errno.ENOENT):
            os.open("new", os.O_CREAT | os.O_WRONLY)
        os.mkdir(place / "d")
        assert os.listdir(place / "d") == []
    finally:
        monkeypatch.undo()
        os.close(held)


def test_folders_count_their_subfolders(place: Path) -> None:
    (place / "a").mkdir()
    (place / "b").mkdir()
    for number in range(3):
        (place / f"a/{number}").mkdir()
    (place / "a/file").touch()
    assert (place.stat().st_nlink, (place / "a").stat().st_nlink) == (4, 5)
    os.rename(place / "a/0", place / "b/0")
    assert ((place / "a").stat().st_nlink, (place / "b").stat().st_nlink) == (4, 3)
    os.mkdir(place / "b/1")
    os.rename(place / "b/1", place / "a/1")
    assert ((place / "a").stat().st_nlink, (place / "b").stat().st_nlink) == (4, 3)
    os.rmdir(place / "a/1")
    assert (place / "a").stat().st_nlink == 3


def test_device_numbers_of_any_size(place: Path) -> None:
    for major, minor in ((1, 3), (4095, 255), (259, 1048575)):
        path = place / f"{major}-{minor}"
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(major, minor))
        status = path.stat()
        assert stat.S_ISBLK(status.st_mode)
        assert (os.major(status.st_rdev), os.minor(status.st_rdev)) == (major, minor)


def test_fifos_and_sockets_work(place: Path, user: Callable[..., User], monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(place / "fifo")
    other = user()
    other.start(place, "with_fd('fifo', os.O_WRONLY, os.write, b'through')")
    assert (place / "fifo").read_bytes() == b"through"
    assert other.finish() == 7
    other.start(
        place,
        "s = socket.socket(socket.AF_UNIX); s.bind('socket'); s.listen(); c, _ = s.accept(); c.sendall(X); c.close()",
    )
    while not (place / "socket").exists():
        pass
    code = (
        "import socket, time\ns = socket.socket(socket.AF_UNIX)\n"
        "while s.connect_ex('socket'): time.sleep(.01)\nprint(s.recv(9))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, check=True, timeout=20).stdout
    assert said == b"b'x'\n"
    assert other.finish() is None


def test_sizes_up_to_a_tebibyte_and_beyond(place: Path) -> None:
    path = place / "big"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek((1 << 40) - 3)
        file.write(b"end")
        os.pwrite(file.fileno(), b"middle", 1 << 39)
    assert path.stat().st_size == 1 << 40
    assert path.stat().st_blocks * 512 <= 1 << 20
    with open(path, "rb") as file:
        assert os.pread(file.fileno(), 8, (1 << 39) - 1) == b"\0middle\0"
        assert os.pread(file.fileno(), 10, (1 << 40) - 3) == b"end"
    with open(path, "r+b") as file:
        for size in (-1, 1 << 63):
            with pytest.raises((OSError, OverflowError)):
                os.ftruncate(file.fileno(), size)
