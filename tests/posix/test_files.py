"""What files do while programs hold them, on the disk first and then in the mount. Chunks have 64 KiB here."""

import errno
import fcntl
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.posix.test_limits import raises
from tests.posix.users import User

CHUNK = 64 << 10


@pytest.fixture
def fd(place: Path) -> Iterator[Callable[..., int]]:
    """Open files of the place, closed with the test: fd(name, flags)."""
    opened: list[int] = []

    def open_(name: str, flags: int = os.O_RDWR | os.O_CREAT, mode: int = 0o644) -> int:
        opened.append(os.open(place / name, flags, mode))
        return opened[-1]

    yield open_
    for number in opened:
        os.close(number)


def pattern(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


# -- opening ------------------------------------------------------------------------------------------------------


def test_appends_of_several_processes_never_overlap(place: Path, user: Callable[..., User]) -> None:
    workers = [user() for _ in range(4)]
    for number, worker in enumerate(workers):
        line = f"bytes([65 + {number}]) * {99 + number} + bytes([10])"
        worker.start(
            place,
            f"f = os.open('log', os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644); "
            f"done = [os.write(f, {line}) for _ in range(300)]; os.close(f)",
        )
    assert [worker.finish() for worker in workers] == [None] * 4
    lines = (place / "log").read_bytes().splitlines()
    expected = [bytes([65 + number]) * (99 + number) for number in range(4)]
    assert {line: lines.count(line) for line in set(lines)} == dict.fromkeys(expected, 300)


def test_append_ignores_the_offset(fd: Callable[..., int]) -> None:
    one, two = fd("f", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd("f")
    os.write(one, b"one")
    os.write(two, b"XX")
    os.lseek(one, 0, os.SEEK_SET)
    os.write(one, b"two")
    assert os.lseek(one, 0, os.SEEK_CUR) == 6
    assert os.pread(two, 99, 0) == b"XXetwo"
    os.ftruncate(two, 1)
    os.write(one, b"three")
    assert os.pread(two, 99, 0) == b"Xthree"
    flags = fcntl.fcntl(two, fcntl.F_GETFL)
    fcntl.fcntl(two, fcntl.F_SETFL, flags | os.O_APPEND)  # nobody tells the file system
    os.lseek(two, 0, os.SEEK_SET)
    os.write(two, b"!")
    assert os.pread(two, 99, 0) == b"Xthree!"
    fcntl.fcntl(two, fcntl.F_SETFL, flags)
    os.pwrite(two, b"?", 0)
    assert os.pread(two, 99, 0) == b"?three!"


def test_append_can_be_switched_off(fd: Callable[..., int]) -> None:
    file = fd("f", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.write(file, b"abc")
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_RDWR)
    os.pwrite(file, b"X", 0)
    assert os.pread(file, 9, 0) == b"Xbc"


def test_exclusive_creation_has_one_winner(place: Path, user: Callable[..., User]) -> None:
    workers = [user() for _ in range(4)]
    for worker in workers:
        worker.start(place, "[number for number in range(50) if took(f'e{number}')]")
    won = [worker.finish() for worker in workers]
    assert sorted(number for numbers in won for number in numbers) == list(range(50))


def test_exclusive_creation_does_not_follow_symlinks(place: Path) -> None:
    os.symlink("nowhere", place / "link")
    with raises(errno.EEXIST):
        os.open(place / "link", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert not (place / "nowhere").exists()


def test_truncating_open_empties_the_file_for_everybody(fd: Callable[..., int], place: Path) -> None:
    one = fd("f")
    os.write(one, pattern(3 * CHUNK))
    two = fd("f", os.O_WRONLY | os.O_TRUNC)
    assert os.fstat(one).st_size == os.fstat(two).st_size == 0
    assert os.fstat(one).st_blocks == 0
    os.write(one, b"x")  # at its own offset: what is before reads as zeros
    assert (place / "f").read_bytes() == bytes(3 * CHUNK) + b"x"
    os.close(os.open(place / "f", os.O_RDONLY | os.O_TRUNC))
    assert os.fstat(one).st_size == 0


def test_direct_io(place: Path) -> None:
    data = pattern(2 * CHUNK)
    (place / "f").write_bytes(data)
    with mmap.mmap(-1, 8192) as buffer:
        direct = os.open(place / "f", os.O_RDWR | os.O_DIRECT)
        try:
            assert os.preadv(direct, [buffer], CHUNK - 4096) == 8192
            assert buffer[:] == data[CHUNK - 4096 : CHUNK + 4096]
            buffer[:] = b"\xab" * 8192
            assert os.pwritev(direct, [buffer], CHUNK - 4096) == 8192
        finally:
            os.close(direct)
    expected = data[: CHUNK - 4096] + b"\xab" * 8192 + data[CHUNK + 4096 :]
    assert (place / "f").read_bytes() == expected


def test_a_read_only_descriptor_does_not_write(fd: Callable[..., int]) -> None:
    fd("f")
    read, write = fd("f", os.O_RDONLY), fd("f", os.O_WRONLY)
    for act in (lambda: os.write(read, b"x"), lambda: os.read(write, 1)):
        with raises(errno.EBADF):
            act()
    with raises(errno.EINVAL):
        os.ftruncate(read, 0)


# -- size and holes -----------------------------------------------------------------------------------------------


def test_truncation_through_an_open_descriptor(fd: Callable[..., int], place: Path) -> None:
    file, data = fd("f"), pattern(2 * CHUNK + 99)
    os.write(file, data)
    for size in (2 * CHUNK, CHUNK + 1, CHUNK, CHUNK - 1, 1, 0):
        os.ftruncate(file, size)
        assert os.fstat(file).st_size == (place / "f").stat().st_size == size
        assert os.pread(file, 9 * CHUNK, 0) == data[:size]
    os.ftruncate(file, 3 * CHUNK)
    assert os.pread(file, 9 * CHUNK, 0) == bytes(3 * CHUNK)
    os.pwrite(file, b"x", CHUNK)
    os.truncate(place / "f", CHUNK + 1)
    os.truncate(place / "f", CHUNK + 9)
    assert os.pread(file, 99, CHUNK) == b"x" + bytes(8)


def test_what_was_cut_off_never_comes_back(place: Path) -> None:
    data = pattern(CHUNK)
    (place / "f").write_bytes(data)
    os.truncate(place / "f", 100)
    with open(place / "f", "r+b") as file:
        file.seek(CHUNK - 1)
        file.write(b"!")
    assert (place / "f").read_bytes() == data[:100] + bytes(CHUNK - 101) + b"!"


def test_holes_are_found_and_cost_nothing(fd: Callable[..., int]) -> None:
    file = fd("f")
    os.ftruncate(file, 64 * CHUNK)
    assert os.fstat(file).st_blocks == 0
    with raises(errno.ENXIO):
        os.lseek(file, 0, os.SEEK_DATA)
    assert os.lseek(file, 5, os.SEEK_HOLE) == 5
    os.pwrite(file, pattern(CHUNK), 10 * CHUNK)
    assert os.fstat(file).st_blocks * 512 == CHUNK
    assert os.lseek(file, 0, os.SEEK_DATA) == 10 * CHUNK
    assert os.lseek(file, 10 * CHUNK + 7, os.SEEK_DATA) == 10 * CHUNK + 7
    assert os.lseek(file, 10 * CHUNK, os.SEEK_HOLE) == 11 * CHUNK
    with raises(errno.ENXIO):
        os.lseek(file, 64 * CHUNK, os.SEEK_HOLE)
    os.pwrite(file, b"x", 64 * CHUNK - 1)
    assert os.lseek(file, 64 * CHUNK - 1, os.SEEK_HOLE) == 64 * CHUNK
    assert os.lseek(file, -1, os.SEEK_END) == 64 * CHUNK - 1


def test_fallocate(place: Path, users: dict[str, User]) -> None:
    data = pattern(4 * CHUNK)
    path = place / "f"
    path.write_bytes(data)

    def allocate(mode: str, offset: int, length: int) -> object:
        return users["root"].do(place, f"fallocate('f', {mode}, {offset}, {length})")

    assert allocate("KEEP_SIZE", 0, 9 * CHUNK) is None
    assert path.stat().st_size == 4 * CHUNK
    assert allocate("0", 2 * CHUNK, 3 * CHUNK) is None
    assert path.read_bytes() == data + bytes(CHUNK)
    assert allocate("KEEP_SIZE | PUNCH_HOLE", CHUNK - 10, CHUNK + 20) is None
    expected = data[: CHUNK - 10] + bytes(CHUNK + 20) + data[2 * CHUNK + 10 :] + bytes(CHUNK)
    assert path.read_bytes() == expected
    assert allocate("ZERO_RANGE", 3 * CHUNK + 5, 3 * CHUNK) is None
    expected = expected[: 3 * CHUNK + 5] + bytes(3 * CHUNK)
    assert path.read_bytes() == expected
    assert allocate("ZERO_RANGE | KEEP_SIZE", 0, 99 * CHUNK) is None
    assert path.read_bytes() == bytes(len(expected))
    assert allocate("KEEP_SIZE | PUNCH_HOLE", 100 * CHUNK, CHUNK) is None
    assert path.read_bytes() == bytes(len(expected))
    assert allocate("PUNCH_HOLE", 0, 1) == "ENOTSUP"
    assert allocate("0", 0, 0) == "EINVAL"
    assert allocate("0", -1, 1) == "EINVAL"


def test_punched_holes_free_their_space(fd: Callable[..., int], users: dict[str, User], place: Path) -> None:
    file = fd("f")
    os.write(file, pattern(8 * CHUNK))
    before = os.fstat(file).st_blocks
    assert users["root"].do(place, f"fallocate('f', KEEP_SIZE | PUNCH_HOLE, {CHUNK}, {4 * CHUNK})") is None
    assert os.fstat(file).st_blocks == before - 4 * CHUNK // 512
    assert os.lseek(file, 0, os.SEEK_HOLE) == CHUNK
    assert os.lseek(file, CHUNK, os.SEEK_DATA) == 5 * CHUNK


@pytest.mark.parametrize(
    ("source", "target", "length"),
    [(0, 0, 4 * CHUNK + 9), (0, CHUNK, 2 * CHUNK), (7, 99, 2 * CHUNK), (CHUNK, 0, 10), (3 * CHUNK, 0, 9 * CHUNK)],
)
def test_copy_file_range(place: Path, source: int, target: int, length: int) -> None:
    one, two = pattern(4 * CHUNK + 9, 1), pattern(3 * CHUNK, 2)
    (place / "one").write_bytes(one)
    (place / "two").write_bytes(two)
    with open(place / "one", "rb") as reader, open(place / "two", "r+b") as writer:
        done = 0
        while count := os.copy_file_range(
            reader.fileno(), writer.fileno(), length - done, source + done, target + done
        ):
            done += count
    piece = one[source : source + length]
    assert done == len(piece)
    assert (place / "two").read_bytes() == two[:target] + piece + two[target + len(piece) :]
    assert (place / "one").read_bytes() == one


def test_copy_file_range_within_one_file(place: Path) -> None:
    data = pattern(3 * CHUNK)
    (place / "f").write_bytes(data)
    with open(place / "f", "r+b") as file:
        number = file.fileno()
        assert os.copy_file_range(number, number, CHUNK, 0, 2 * CHUNK) == CHUNK
        with raises(errno.EINVAL):
            os.copy_file_range(number, number, CHUNK, 0, 5)
    assert (place / "f").read_bytes() == data[: 2 * CHUNK] + data[:CHUNK]


# -- mapping ------------------------------------------------------------------------------------------------------


def test_a_shared_mapping_is_the_file(place: Path) -> None:
    (place / "f").write_bytes(bytes(2 * CHUNK))
    with open(place / "f", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    mapped[CHUNK - 2 : CHUNK + 2] = b"over"  # the descriptor is closed
    with open(place / "f", "r+b") as other:
        assert os.pread(other.fileno(), 4, CHUNK - 2) == b"over"
        os.pwrite(other.fileno(), b"back", 0)
        assert mapped[:4] == b"back"
    mapped[10] = 7
    mapped.close()
    assert (place / "f").read_bytes()[:11] == b"back" + bytes(6) + b"\x07"


def test_a_mapping_shared_by_processes(place: Path, users: dict[str, User]) -> None:
    (place / "f").write_bytes(bytes(4096))
    with open(place / "f", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert users["root"].do(place, "store_mapped('f')") is None
        assert mapped[:1] == b"X"


def test_stores_after_close_change_the_times(place: Path) -> None:
    (place / "f").write_bytes(bytes(4096))
    with open(place / "f", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    before = (place / "f").stat().st_mtime_ns
    time.sleep(0.02)
    mapped[0] = 1
    mapped.flush()
    assert (place / "f").stat().st_mtime_ns > before
    mapped.close()


def test_stores_into_a_file_opened_for_appending_stay_in_place(place: Path) -> None:
    (place / "f").write_bytes(bytes(4096))
    file = os.open(place / "f", os.O_RDWR | os.O_APPEND)
    with mmap.mmap(file, 0) as mapped:
        mapped[10] = 7
        mapped.flush()
    os.write(file, b"end")
    os.close(file)
    assert (place / "f").read_bytes() == bytes(10) + b"\x07" + bytes(4085) + b"end"


def test_a_private_mapping_changes_nothing(place: Path) -> None:
    (place / "f").write_bytes(b"content")
    with open(place / "f", "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        mapped[:4] = b"mine"
    assert (place / "f").read_bytes() == b"content"


# -- times --------------------------------------------------------------------------------------------------------


def test_a_modification_time_set_before_close_stays(place: Path) -> None:
    with open(place / "f", "wb") as file:
        file.write(pattern(2 * CHUNK))
        file.flush()
        os.utime(file.fileno(), ns=(1_000_000_001, 1_234_567_890_123_456_789))
    assert (place / "f").stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert (place / "f").stat().st_atime_ns == 1_000_000_001


@pytest.mark.parametrize("when", [0, 1, 999_999_999, 2**31 * 10**9, 4_000_000_000_000_000_001, -1, -1_500_000_000])
def test_times_of_any_nanosecond(place: Path, when: int) -> None:
    (place / "f").touch()
    os.utime(place / "f", ns=(when, when))
    assert ((place / "f").stat().st_atime_ns, (place / "f").stat().st_mtime_ns) == (when, when)


def test_now_and_omit(place: Path, users: dict[str, User]) -> None:
    (place / "f").touch()
    os.utime(place / "f", ns=(1, 2))
    now, omit = (1 << 30) - 1, (1 << 30) - 2
    call = "_ = ctypes.CDLL(None).utimensat(-100, b'f', struct.pack('4q', 0, {}, 0, {}), 0); os.stat('f')"
    status = users["root"].do(place, call.format(omit, omit))
    assert (status.st_atime_ns, status.st_mtime_ns) == (1, 2)
    status = users["root"].do(place, call.format(now, omit))
    assert (status.st_atime_ns > 10**18, status.st_mtime_ns) == (True, 2)
    status = users["root"].do(place, call.format(omit, now))
    assert abs(time.time_ns() - status.st_mtime_ns) < 10**10


def test_reading_is_an_access_when_it_is_the_first_since_a_change(place: Path) -> None:
    path = place / "f"
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(1, 2))
    assert path.read_bytes()
    first = path.stat().st_atime_ns
    assert first > 10**18
    time.sleep(0.02)
    assert path.read_bytes()
    assert path.stat().st_atime_ns == first


def test_noatime_is_honoured(place: Path) -> None:
    path = place / "f"
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(1, 2))
    number = os.open(path, os.O_RDONLY | os.O_NOATIME)
    assert os.read(number, 10)
    os.close(number)
    assert path.stat().st_atime_ns == 1


def test_a_write_of_nothing_changes_no_time(fd: Callable[..., int]) -> None:
    file = fd("f")
    before = os.fstat(file).st_mtime_ns
    time.sleep(0.02)
    os.write(file, b"")
    assert os.fstat(file).st_mtime_ns == before


# -- space --------------------------------------------------------------------------------------------------------


def test_blocks_are_what_is_held(place: Path) -> None:
    (place / "f").write_bytes(pattern(CHUNK * 3))
    assert (place / "f").stat().st_blocks == CHUNK * 3 // 512
    with open(place / "f", "r+b") as file:
        file.truncate(CHUNK)
    assert (place / "f").stat().st_blocks == CHUNK // 512


def test_threads_reading_and_writing_one_file(fd: Callable[..., int]) -> None:
    """Each thread owns every eighth KiB; nobody loses a byte to another."""
    file = fd("f")
    failures: list[str] = []

    def work(owner: int) -> None:
        for turn in range(8):
            for place in range(owner, 256, 8):
                os.pwrite(file, bytes([owner * 16 + turn]) * 1024, place * 1024)
                if os.pread(file, 1024, place * 1024) != bytes([owner * 16 + turn]) * 1024:
                    failures.append(f"{owner} {turn} {place}")

    threads = [threading.Thread(target=work, args=(owner,)) for owner in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert os.pread(file, 1 << 20, 0) == b"".join(bytes([place % 8 * 16 + 7]) * 1024 for place in range(256))
