"""Random operations on one file in the mount and on one on the disk: the same bytes and sizes after each.

In the habit of fsx. Prints its seed; METADISKFS_SEED repeats a run, METADISKFS_OPERATIONS makes it longer.
"""

import ctypes
import errno
import mmap
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Mount
from tests.posix.agent import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE

SIZE_MAX = 400_000
"""Six chunks."""
LIBC = ctypes.CDLL(None, use_errno=True)


def allocate(file: int, mode: int, start: int, length: int) -> str:
    failed = LIBC.fallocate(file, mode, ctypes.c_long(start), ctypes.c_long(length))
    return errno.errorcode[ctypes.get_errno()] if failed else "ok"


class Twin:
    """The same file twice: ``disk`` is the truth. In the mount it has two names and two descriptors."""

    def __init__(self, disk: Path, mounted: Path, choose: random.Random) -> None:
        self.disk = disk
        self.names = (mounted, mounted.with_name("other"))
        self.choose = choose
        self.truth = os.open(disk, os.O_RDWR | os.O_CREAT)
        os.close(os.open(mounted, os.O_RDWR | os.O_CREAT))
        os.link(*self.names)
        self.files: list[int] = []
        self.open()

    def open(self) -> None:
        self.files = [os.open(name, os.O_RDWR) for name in self.names]

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files = []

    def each(self, act: Callable[[int], object]) -> None:
        """Do the same to both, in the mount through one of the names."""
        assert act(self.choose.choice(self.files)) == act(self.truth)

    def check(self) -> None:
        data = os.pread(self.truth, SIZE_MAX * 2, 0)
        for file, name in zip(self.files, self.names, strict=True):
            assert os.fstat(file).st_size == os.stat(name).st_size == len(data)
            found = os.pread(file, SIZE_MAX * 2, 0)
            if found != data:
                first = next(n for n in range(len(data)) if found[n : n + 1] != data[n : n + 1])
                raise AssertionError(f"{name.name} differs at {first} of {len(data)}")

    # -- operations -----------------------------------------------------------------------------------------------

    def range(self) -> tuple[int, int]:
        """Mostly near chunks' borders, of any length."""
        start = self.choose.choice((self.choose.randrange(SIZE_MAX), 65536 * self.choose.randrange(6)))
        start = max(0, start + self.choose.choice((0, 0, -1, 1, -100)))
        return start, self.choose.choice((1, 100, 4096, 65536, self.choose.randrange(1, 150_000)))

    def write(self) -> str:
        start, length = self.range()
        data = self.choose.randbytes(length)
        self.each(lambda file: os.pwrite(file, data, start))
        return f"write {start} {length}"

    def append(self) -> str:
        data = self.choose.randbytes(self.choose.randrange(1, 5000))
        if os.fstat(self.truth).st_size > SIZE_MAX:
            return self.truncate()
        paths = {self.choose.choice(self.names), self.disk}
        for path in paths:
            with open(path, "ab") as file:
                file.write(data)
        return f"append {len(data)}"

    def read(self) -> str:
        start, length = self.range()
        self.each(lambda file: os.pread(file, length, start))
        return f"read {start} {length}"

    def truncate(self) -> str:
        size = self.range()[0]
        self.each(lambda file: os.ftruncate(file, size))
        return f"truncate {size}"

    def empty(self) -> str:
        for path in (self.choose.choice(self.names), self.disk):
            os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
        return "empty"

    def store(self) -> str:
        size = os.fstat(self.truth).st_size
        if not size:
            return "nothing to map"
        start = self.choose.randrange(size)
        data = self.choose.randbytes(min(size - start, self.choose.randrange(1, 20_000)))

        def through_mapping(file: int) -> None:
            with mmap.mmap(file, size) as mapped:
                mapped[start : start + len(data)] = data
                mapped.flush()

        self.each(through_mapping)
        return f"store {start} {len(data)}"

    def allocate(self) -> str:
        mode = self.choose.choice((0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE))
        start, length = self.range()
        self.each(lambda file: allocate(file, mode, start, length))
        return f"fallocate {mode} {start} {length}"

    def copy(self) -> str:
        source, target = 65536 * self.choose.randrange(6), 65536 * self.choose.randrange(6)
        length = self.choose.choice((65536, 131072, 70_000))

        def by_range(file: int) -> int:
            try:
                return os.copy_file_range(file, file, length, source, target)
            except OSError as error:
                assert error.errno == errno.EINVAL, error  # overlapping
                return -1

        self.each(by_range)
        return f"copy {source} {target} {length}"

    def sync(self) -> str:
        os.fsync(self.choose.choice(self.files))
        return "fsync"

    def reopen(self) -> str:
        self.close()
        self.open()
        return "reopen"


def test_random_operations_agree_with_the_disk(make_mount: Callable[..., Mount], tmp_path: Path) -> None:
    seed = int(os.environ.get("METADISKFS_SEED") or time.time_ns() % 10**9)
    operations = int(os.environ.get("METADISKFS_OPERATIONS") or 400)
    print(f"METADISKFS_SEED={seed}")
    choose = random.Random(seed)
    mount = make_mount("--chunk-size", "64K")
    mount.start()
    twin = Twin(tmp_path / "truth", mount / "f", choose)
    acts = (twin.write,) * 5 + (twin.read,) * 3 + (twin.truncate, twin.append, twin.store, twin.allocate) * 2
    acts += (twin.copy, twin.sync, twin.reopen, twin.empty)
    for number in range(operations):
        did = choose.choice(acts)()
        print(number, did)
        twin.check()
        if number % 200 == 199:
            twin.close()
            mount.remount()
            mount.clear_cache()
            mount.drop_kernel_caches()
            twin.open()
            print("remounted")
            twin.check()
    twin.close()
    os.close(twin.truth)
