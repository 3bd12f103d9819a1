"""What a file system does, on the volume in-process and through the kernel alike. Chunks have 64 KiB here."""

import errno
import os
import random
import stat

import pytest

from tests.fs.drivers import Driver

CHUNK = 64 << 10


def raises(number: int) -> "pytest.RaisesExc[OSError]":
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def pattern(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [0, 1, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 17])
def test_what_was_written_is_read(fs: Driver, size: int) -> None:
    data = pattern(size)
    fs.write("/f", data)
    assert fs.read("/f") == data
    assert fs.stat("/f").st_size == size


def test_content_comes_back_from_the_node(fs: Driver) -> None:
    data = pattern(10 * CHUNK + 5)
    fs.write("/f", data)
    fs.sync()
    fs.evict()
    assert fs.read("/f") == data
    fs.evict()
    assert fs.read("/f", 1000, 7 * CHUNK - 500) == data[7 * CHUNK - 500 :][:1000]


def test_everything_is_there_after_a_remount(fs: Driver) -> None:
    data = pattern(2 * CHUNK)
    fs.mkdir("/d")
    fs.write("/d/f", data)
    fs.symlink("d/f", "/s")
    fs.link("/d/f", "/h")
    fs.chmod("/d/f", 0o640)
    fs.utime("/d/f", 1_000_000_007, 2_000_000_009)
    before = fs.stat("/d/f")
    fs.remount()
    after = fs.stat("/d/f")
    assert fs.read("/d/f") == fs.read("/h") == data
    assert fs.readlink("/s") == "d/f"
    assert after.st_mtime_ns == before.st_mtime_ns == 2_000_000_009
    assert (after.st_mode, after.st_size, after.st_nlink, after.st_ino) == (
        stat.S_IFREG | 0o640, 2 * CHUNK, 2, before.st_ino,
    )  # fmt: skip


def test_writing_anywhere_in_a_stored_file(fs: Driver) -> None:
    data = bytearray(pattern(4 * CHUNK))
    fs.write("/f", bytes(data))
    fs.sync()
    fs.evict()
    for offset, size in ((CHUNK - 3, 7), (2 * CHUNK, CHUNK), (10, 1), (4 * CHUNK - 1, 10)):
        piece = pattern(size, offset)
        fs.write("/f", piece, offset)
        data[offset : offset + size] = piece
        assert fs.read("/f") == bytes(data)
    fs.sync()
    fs.evict()
    assert fs.read("/f") == bytes(data)


def test_append(fs: Driver) -> None:
    for n in range(5):
        fs.write("/log", b"line %d\n" % n, flags=os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    assert fs.read("/log") == b"".join(b"line %d\n" % n for n in range(5))


def test_truncation_cuts_and_what_returns_is_zero(fs: Driver) -> None:
    data = pattern(3 * CHUNK)
    fs.write("/f", data)
    fs.truncate("/f", CHUNK + 100)
    assert fs.read("/f") == data[: CHUNK + 100]
    fs.truncate("/f", 2 * CHUNK)
    assert fs.read("/f") == data[: CHUNK + 100] + bytes(CHUNK - 100)
    fs.sync()
    fs.evict()
    fs.remount()
    assert fs.read("/f") == data[: CHUNK + 100] + bytes(CHUNK - 100)
    fs.truncate("/f", 0)
    assert fs.read("/f") == b""
    assert fs.stat("/f").st_blocks == 0


def test_holes_read_as_zeros_and_take_no_space(fs: Driver) -> None:
    fs.write("/sparse", b"end", offset=1000 * CHUNK)
    assert fs.stat("/sparse").st_size == 1000 * CHUNK + 3
    assert fs.stat("/sparse").st_blocks <= 2 * CHUNK // 512
    assert fs.read("/sparse", 100, 500 * CHUNK) == bytes(100)
    fs.truncate("/sparse", 1 << 40)
    assert fs.stat("/sparse").st_size == 1 << 40
    assert fs.read("/sparse", 3, 1000 * CHUNK) == b"end"


def test_rename_replaces_and_moves_folders(fs: Driver) -> None:
    fs.mkdir("/a")
    fs.mkdir("/b")
    fs.write("/a/one", b"one")
    fs.write("/b/two", b"two")
    fs.rename("/a/one", "/b/two")
    assert fs.listdir("/a") == []
    assert fs.read("/b/two") == b"one"
    fs.rename("/b", "/a")
    assert fs.listdir("/") == ["a"]
    assert fs.read("/a/two") == b"one"
    assert fs.stat("/").st_nlink == 3


def test_refusals(fs: Driver) -> None:
    fs.mkdir("/d")
    fs.write("/d/f", b"")
    with raises(errno.ENOTEMPTY):
        fs.rmdir("/d")
    with raises(errno.EEXIST):
        fs.mkdir("/d")
    with raises(errno.ENOENT):
        fs.read("/nothing")
    with raises(errno.ENOENT):
        fs.unlink("/nothing")
    with raises(errno.ENOTDIR):
        fs.rmdir("/d/f")
    with raises(errno.ENAMETOOLONG):
        fs.write("/" + "x" * 256, b"")
    fs.mkdir("/e")
    with raises(errno.ENOTEMPTY):
        fs.rename("/e", "/d")


@pytest.mark.parametrize(
    "name", ["ä" * 127, "日本語", "with space", "new\nline", "\udcff\udcfe not utf-8", "x" * 255]
)
def test_any_name(fs: Driver, name: str) -> None:
    fs.write(f"/{name}", b"content")
    assert fs.listdir("/") == [name]
    assert fs.read(f"/{name}") == b"content"
    fs.unlink(f"/{name}")
    assert fs.listdir("/") == []


def test_ten_thousand_names(fs: Driver) -> None:
    fs.mkdir("/many")
    names = {f"file-{n:05}" for n in range(10_000)}
    for name in names:
        fs.symlink("x", f"/many/{name}")
    listed = fs.listdir("/many")
    assert len(listed) == 10_000
    assert set(listed) == names


def test_hard_links_share_content(fs: Driver) -> None:
    fs.write("/one", b"first")
    fs.link("/one", "/two")
    fs.write("/two", b"SECOND")
    assert fs.read("/one") == b"SECOND"
    assert fs.stat("/one").st_ino == fs.stat("/two").st_ino
    assert fs.stat("/one").st_size == 6
    fs.unlink("/one")
    assert fs.read("/two") == b"SECOND"
    assert fs.stat("/two").st_nlink == 1


def test_the_same_content_is_one_object(fs: Driver) -> None:
    data = pattern(CHUNK)
    for n in range(5):
        fs.write(f"/copy{n}", data)
    fs.sync()
    fs.unlink("/copy0")
    fs.evict()
    assert fs.read("/copy4") == data
