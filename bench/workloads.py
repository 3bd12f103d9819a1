"""The workloads: plain functions over a directory, whatever file system that lies on.

Each returns when its timed part began and ended (CLOCK_MONOTONIC, which all processes share) and its figures. What
prepares it happens before the clock starts, what checks its outcome is a function of its own. Run by child.py, each
in a fresh process.
"""

import os
import resource
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.contents import BLOCK, content, random_offsets, random_writes, small_content

MIB = 1 << 20
NOTHING, KERNEL, COLD, REMOUNT = "nothing", "kernel", "cold", "remount"
"""What is emptied before a step: nothing / the kernel's caches / the program's disk cache too / by mounting anew."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each workload does. Sizes in bytes, the rest are counts."""

    file: int = 128 * MIB
    random_reads: int = 2000
    cold_reads: int = 200
    random_writes: int = 10_000
    small: int = 2000
    small_size: int = BLOCK
    entries: int = 3000
    tree: int = 2000

    def scaled(self, factor: float) -> "Sizes":
        if factor == 1:
            return self

        def some(count: int) -> int:
            return max(10, int(count * factor))

        return Sizes(
            file=max(MIB, int(self.file * factor) // MIB * MIB),
            random_reads=some(self.random_reads),
            cold_reads=some(self.cold_reads),
            random_writes=some(self.random_writes),
            small=some(self.small),
            small_size=self.small_size,
            entries=some(self.entries),
            tree=some(self.tree),
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step works. ``done``: the steps that changed the scenario's files before, in order."""

    directory: Path
    tarball: Path
    sizes: Sizes
    seed: int
    done: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        return self.directory / "large"

    @property
    def copied(self) -> Path:
        return self.directory / "copy"

    @property
    def tree(self) -> Path:
        return self.directory / "tree"


@dataclass(frozen=True, slots=True)
class Timed:
    start: float
    end: float
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Step:
    """One timed act. ``stored``: the time until the node has all of it counts too.

    ``makes``: later steps of the scenario need what it leaves. ``check`` compares contents, after ``check_after``.
    """

    name: str
    run: Callable[[Place], Timed]
    before: str = NOTHING
    stored: bool = False
    makes: bool = False
    check: Callable[[Place], None] | None = None
    check_after: str = NOTHING


class Wrong(Exception):
    """What was read is not what was written."""


cpu_marks: list[float] = []
"""CPU seconds of this process and its children at every look at the clock: first to last is the timed part."""


def _clock() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_marks.append(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime)
    return time.monotonic()


# -- one large file -------------------------------------------------------------------------------------------------


def write(place: Place) -> Timed:
    data = memoryview(content(place.seed, place.sizes.file))
    start = _clock()
    fd = os.open(place.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for position in range(0, len(data), MIB):
        os.write(fd, data[position : position + MIB])
    os.close(fd)
    end = _clock()
    return Timed(start, end, {"rate": len(data) / MIB / (end - start)})


def read(place: Place) -> Timed:
    buffer = memoryview(bytearray(MIB))
    start = _clock()
    fd = os.open(place.file, os.O_RDONLY)
    size = os.readv(fd, [buffer[:BLOCK]])
    first = _clock()
    while count := os.readv(fd, [buffer]):
        size += count
    os.close(fd)
    end = _clock()
    return Timed(start, end, {"rate": size / MIB / (end - start), "first": (first - start) * 1000})


def random_read(place: Place) -> Timed:
    offsets = random_offsets(place.seed, place.sizes.file, place.sizes.random_reads)
    fd = os.open(place.file, os.O_RDONLY)
    start = _clock()
    for offset in offsets:
        os.pread(fd, BLOCK, offset)
    end = _clock()
    os.close(fd)
    return Timed(start, end, {"rate": len(offsets) / (end - start)})


def cold_random_read(place: Place) -> Timed:
    offsets = random_offsets(place.seed + 7, place.sizes.file, place.sizes.cold_reads)
    took = []
    start = last = _clock()
    fd = os.open(place.file, os.O_RDONLY)
    for offset in offsets:
        os.pread(fd, BLOCK, offset)
        now = time.monotonic()
        took.append((now - last) * 1000)
        last = now
    os.close(fd)
    _clock()
    p99 = sorted(took)[min(len(took) - 1, int(len(took) * 0.99))]
    return Timed(start, last, {"mean": statistics.fmean(took), "p99": p99})


def random_write(place: Place) -> Timed:
    blocks = random_writes(place.seed, place.sizes.file, place.sizes.random_writes)
    start = _clock()
    fd = os.open(place.file, os.O_WRONLY)
    for offset, block in blocks:
        os.pwrite(fd, block, offset)
    written = _clock()
    os.close(fd)
    end = _clock()
    return Timed(start, end, {"rate": len(blocks) / (end - start), "before_close": len(blocks) / (written - start)})


def change_byte(place: Place) -> Timed:
    middle = place.sizes.file // 2
    byte = bytes([content(place.seed, place.sizes.file)[middle] ^ 0xFF])
    start = _clock()
    fd = os.open(place.file, os.O_WRONLY)
    os.pwrite(fd, byte, middle)
    os.close(fd)
    return Timed(start, _clock())


def copy(place: Place) -> Timed:
    start = _clock()
    subprocess.run(["cp", place.file, place.copied], check=True)
    return Timed(start, _clock())


def expected(place: Place) -> bytearray:
    """The large file's bytes after the steps that were done."""
    data = content(place.seed, place.sizes.file)
    if "onebyte" in place.done:
        data[place.sizes.file // 2] ^= 0xFF
    if "randwrite" in place.done:
        for offset, block in random_writes(place.seed, place.sizes.file, place.sizes.random_writes):
            data[offset : offset + len(block)] = block
    return data


def _compare(path: Path, data: bytes | bytearray | memoryview) -> None:
    view, position = memoryview(data), 0
    with path.open("rb") as file:
        while piece := file.read(MIB):
            if piece != view[position : position + len(piece)]:
                raise Wrong(f"{path.name} differs between {position} and {position + len(piece)}")
            position += len(piece)
    if position != len(view):
        raise Wrong(f"{path.name} has {position} bytes instead of {len(view)}")


def check_file(place: Place) -> None:
    _compare(place.file, expected(place))


def check_copy(place: Place) -> None:
    _compare(place.copied, expected(place))


# -- many small files -----------------------------------------------------------------------------------------------


def create(place: Place) -> Timed:
    data = [small_content(place.seed, number, place.sizes.small_size) for number in range(place.sizes.small)]
    names = [str(place.directory / f"{number:06d}") for number in range(place.sizes.small)]
    start = _clock()
    for name, piece in zip(names, data, strict=True):
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, piece)
        os.close(fd)
    end = _clock()
    return Timed(start, end, {"rate": len(names) / (end - start)})


def read_small(place: Place) -> Timed:
    size = place.sizes.small_size
    start = _clock()
    names = sorted(os.listdir(place.directory))
    for name in names:
        fd = os.open(f"{place.directory}/{name}", os.O_RDONLY)
        os.read(fd, size + 1)
        os.close(fd)
    end = _clock()
    return Timed(start, end, {"rate": len(names) / (end - start)})


def check_small(place: Place) -> None:
    for number in range(place.sizes.small):
        _compare(place.directory / f"{number:06d}", small_content(place.seed, number, place.sizes.small_size))


def rename(place: Place) -> Timed:
    names = sorted(os.listdir(place.directory))
    start = _clock()
    for name in names:
        os.rename(f"{place.directory}/{name}", f"{place.directory}/renamed-{name}")
    end = _clock()
    return Timed(start, end, {"rate": len(names) / (end - start)})


def unlink(place: Place) -> Timed:
    names = sorted(os.listdir(place.directory))
    start = _clock()
    for name in names:
        os.unlink(f"{place.directory}/{name}")
    end = _clock()
    return Timed(start, end, {"rate": len(names) / (end - start)})


# -- listings -------------------------------------------------------------------------------------------------------

_PER_FOLDER = 60


def make_entries(place: Place) -> Timed:
    """Folders of 59 short files each, made once and listed in every round."""
    start = _clock()
    for number in range(place.sizes.entries):
        folder = place.directory / f"folder{number // _PER_FOLDER:04d}"
        if number % _PER_FOLDER == 0:
            folder.mkdir()
        else:
            (folder / f"file{number:06d}").write_bytes(b"the same in all of them")
    return Timed(start, _clock())


def _list(place: Place, command: list[str], rest: Sequence[str] = ()) -> Timed:
    start = _clock()
    done = subprocess.run([*command, place.directory, *rest], check=True, stdout=subprocess.PIPE)
    end = _clock()
    if done.stdout.count(b"file") < place.sizes.entries - -(-place.sizes.entries // _PER_FOLDER):
        raise Wrong(f"{command[0]} lists too few entries")
    return Timed(start, end, {"rate": place.sizes.entries / (end - start)})


def find(place: Place) -> Timed:
    return _list(place, ["find"], ["-printf", "%s %T@ %m %p\\n"])


def list_long(place: Place) -> Timed:
    return _list(place, ["ls", "-lR"])


# -- a source tree --------------------------------------------------------------------------------------------------


def untar(place: Place) -> Timed:
    place.tree.mkdir()
    start = _clock()
    subprocess.run(["tar", "-xf", place.tarball, "-C", place.tree], check=True)
    end = _clock()
    return Timed(start, end, {"rate": place.sizes.tree / (end - start)})


def check_tree(place: Place) -> None:
    with tarfile.open(place.tarball) as tar:
        for member in tar:
            if member.isfile():
                stored = tar.extractfile(member)
                assert stored is not None
                _compare(place.tree / member.name, stored.read())


_GIT = {
    "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_AUTHOR_NAME": "bench",
    "GIT_AUTHOR_EMAIL": "bench@localhost", "GIT_COMMITTER_NAME": "bench", "GIT_COMMITTER_EMAIL": "bench@localhost",
}  # fmt: skip


def _git(place: Place, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-c", "gc.auto=0", "-C", place.tree, *arguments],
        check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **_GIT},
    )  # fmt: skip
    return done.stdout


def git_commit(place: Place) -> Timed:
    _git(place, "init", "-q", ".")
    start = _clock()
    _git(place, "add", "-A")
    _git(place, "commit", "-q", "-m", "all")
    end = _clock()
    return Timed(start, end, {"seconds": end - start})


def check_git(place: Place) -> None:
    if _git(place, "status", "--porcelain"):
        raise Wrong("git sees changes after the commit")
    _git(place, "fsck", "--strict")


def remove_tree(place: Place) -> Timed:
    entries = sum(len(folders) + len(files) for _, folders, files in os.walk(place.tree)) + 1
    start = _clock()
    subprocess.run(["rm", "-rf", place.tree], check=True)
    end = _clock()
    if place.tree.exists():
        raise Wrong("rm -rf left something")
    return Timed(start, end, {"rate": entries / (end - start)})


SCENARIOS: dict[str, tuple[Step, ...]] = {
    "file": (
        Step("write", write, stored=True, makes=True, check=check_file, check_after=COLD),
        Step("coldread", read, before=COLD),
        Step("cacheread", read, before=KERNEL),
        Step("reread", read),
        Step("randread", random_read, before=KERNEL),
        Step("coldrandom", cold_random_read, before=COLD),
        Step("onebyte", change_byte, stored=True, makes=True, check=check_file),
        Step("copy", copy, stored=True, check=check_copy),
        Step("randwrite", random_write, makes=True, check=check_file, check_after=COLD),
    ),
    "small": (
        Step("create", create, stored=True, makes=True, check=check_small),
        Step("smallread", read_small, before=COLD),
        Step("rename", rename),
        Step("unlink", unlink),
    ),
    "listing": (
        Step("entries", make_entries, makes=True),
        Step("find", find, before=REMOUNT),
        Step("lslr", list_long, before=REMOUNT),
    ),
    "tree": (
        Step("untar", untar, makes=True, check=check_tree),
        Step("git", git_commit, makes=True, check=check_git),
        Step("rm", remove_tree),
    ),
}
KEPT = ("listing",)
"""Scenarios whose files stay for the next round: their steps only read."""

STEPS = {step.name: step for steps in SCENARIOS.values() for step in steps}


def discard(place: Place) -> Timed:
    """Remove what a scenario left."""
    start = _clock()
    subprocess.run(["rm", "-rf", place.directory], check=True)
    return Timed(start, _clock())
