"""``scripts/bench --scale``: what grows, and whether its cost does. Curves of one mount of ours, no peers."""

import argparse
import dataclasses
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench import generator, picture, processes, targets
from bench.contents import content, small_content
from bench.picture import Chart
from bench.processes import PROJECT, drop_kernel_caches, say
from bench.report import markdown, show
from bench.targets import Metadiskfs
from bench.workloads import MIB, Wrong
from metadiskfs.config import parse_size

Report = Callable[[argparse.Namespace, str, dict[str, object], str], None]
_FOLDERS = 160
_GIB = 1 << 30


@contextmanager
def mounted(base: Path, name: str) -> Iterator[Metadiskfs]:
    """A fresh volume; gone with its files at the end."""
    target = Metadiskfs(base / name)
    try:
        target.start()
        yield target
    finally:
        targets.close(target)
        shutil.rmtree(base / name, ignore_errors=True)


@dataclasses.dataclass(slots=True)
class Part:
    """What one part found: lines for the table, charts, raw figures."""

    lines: list[list[str]] = dataclasses.field(default_factory=list)
    charts: list[Chart] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, what: str, value: float, unit: str, asked: str = "") -> None:
        self.lines.append([what, show(value), unit, asked])
        say(f"  {what}: {show(value)} {unit}")


# -- the index ------------------------------------------------------------------------------------------------------


def large_index(arguments: argparse.Namespace, base: Path) -> Part:
    """The same acts on indexes of growing size: with the kernel's caches empty, and once more when warm."""
    part = Part()
    sizes = [size for size in (10_000, 100_000, 1_000_000, 10_000_000) if size < arguments.files] + [arguments.files]
    found = {size: _one_index(base, size) for size in sizes}
    part.facts = {str(size): figures for size, figures in found.items()}
    small, large = found[sizes[0]], found[sizes[-1]]
    part.add(f"mount of {sizes[-1]:,} files", large["mount"], "s", "under 2")
    part.add(f"first stat of a path, warm, {sizes[-1]:,} files", large["walk warm"], "µs")
    part.add(f"first stat of a path, cold, {sizes[-1]:,} files", large["walk cold"], "µs")
    for act in ("stat", "lookup", "readdir", "create"):
        for state in ("warm", "cold"):
            name = f"{act} {state}"
            part.add(f"{name}, {sizes[-1]:,} files", large[name], "µs")
            part.add(f"{name}, beside {sizes[0]:,} files", large[name] / small[name], "times", "at most 1.5")
    part.add(f"memory of the mount, {sizes[-1]:,} files", large["memory"], "MiB", "under 150")
    for state in ("warm", "cold"):
        curves = {
            act: [(size, found[size][f"{act} {state}"]) for size in sizes]
            for act in ("stat", "lookup", "readdir", "create")
        }
        part.charts.append(
            Chart(f"Median of one act, caches {state}", "files in the index", "µs", curves, log_x=True)
        )
    curve = {"mount": [(size, found[size]["mount"]) for size in sizes]}
    part.charts.append(Chart("Mount time", "files in the index", "s", curve, log_x=True, limit=2))
    curve = {"mount": [(size, found[size]["memory"]) for size in sizes]}
    part.charts.append(Chart("Memory of the mount, peak", "files in the index", "MiB", curve, log_x=True, limit=150))
    return part


def _one_index(base: Path, files: int) -> dict[str, float]:
    target = Metadiskfs(base / f"index{files}")
    try:
        took = generator.generate(target.folder / "index.db", files)
        size = (target.folder / "index.db").stat().st_size
        say(f"  index of {files:,} files: {size / MIB:.0f} MiB, generated in {took:.0f} s")
        drop_kernel_caches()
        subprocess.run(
            [sys.executable, "-c", "import metadiskfs.mount, metadiskfs.cli.main"], check=True, cwd=PROJECT
        )
        started = time.monotonic()  # the interpreter's own files are in memory again, the index is not
        target.start()
        figures = {"mount": target.usable_since - started, "index_mib": size / MIB, "generated": took}
        for state in ("cold", "warm"):
            figures |= {f"{act} {state}": value for act, value in _acts(target, files, state).items()}
        target.note_memory()
        return {**figures, "memory": target.peaks["mount"] / MIB}
    finally:
        targets.close(target)
        shutil.rmtree(target.base, ignore_errors=True)


def _acts(target: Metadiskfs, files: int, state: str) -> dict[str, float]:
    """Medians in microseconds of stat, lookup (of names that are not there), readdir and create, in folders the
    kernel knows, so that each is one request in an index of any size; and of a first stat with its whole path.

    Cold: the disk's pages are not in memory. Warm: they are; what the mount itself remembers is forgotten in both.
    """
    rng, leaves, root = random.Random(files), generator.leaves_of(files), str(target.mountpoint)
    chosen = rng.sample(range(leaves), min(leaves, 3 * _FOLDERS))
    walked, known, listed = ([f"{root}/{generator.leaf_path(leaf)}" for leaf in chosen[part::3]] for part in range(3))
    if state == "warm":
        _read_whole(target.folder / "index.db")
    target.remount()
    if state == "cold":
        drop_kernel_caches()
    acts: dict[str, list[Callable[[], object]]] = {
        "walk": [partial(os.stat, f"{folder}/file07.txt") for folder in walked],
        "enter": [partial(os.stat, folder) for folder in (*known, *listed)],
        "stat": [partial(os.stat, f"{folder}/file{number:02d}.txt") for number in range(4) for folder in known],
        "lookup": [partial(os.path.exists, f"{folder}/no{number}") for number in range(4) for folder in known],
        "create": [partial(_touch, f"{folder}/new-{state}") for folder in known],
        "readdir": [partial(os.listdir, folder) for folder in listed],
    }
    return {act: statistics.median(_timed(one) for one in calls) * 1e6 for act, calls in acts.items()}


def _timed(act: Callable[[], object]) -> float:
    start = time.monotonic()
    act()
    return time.monotonic() - start


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))


def _read_whole(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(8 * MIB):
            pass


# -- large files ----------------------------------------------------------------------------------------------------


def sparse_file(arguments: argparse.Namespace, base: Path) -> Part:
    """A few MiB here and there in a file of 100 GiB; the same after the caches were emptied and a new mount."""
    part, size = Part(), parse_size(arguments.sparse_file)
    with mounted(base, "sparse") as target:
        path = target.mountpoint / "sparse"
        spots = [0, size // 3 + 5, size // 2 + 4097, size - MIB]
        started = time.monotonic()
        with path.open("wb") as file:
            file.truncate(size)
            for number, spot in enumerate(spots):
                file.seek(spot)
                file.write(content(number, MIB))
        part.add(f"sparse file of {size / _GIB:.0f} GiB written", time.monotonic() - started, "s")
        part.add("until stored", target.sync() - started, "s")
        targets.prepare(target, "cold")
        target.remount()
        started = time.monotonic()
        found = path.stat()
        if found.st_size != size or found.st_blocks * 512 > 64 * MIB:
            raise Wrong(f"the sparse file has size {found.st_size}, {found.st_blocks} blocks")
        with path.open("rb") as file:
            for number, spot in enumerate(spots):
                file.seek(spot)
                if file.read(MIB) != content(number, MIB):
                    raise Wrong(f"the sparse file differs at {spot}")
            file.seek(size // 4)
            if file.read(MIB).strip(b"\0"):
                raise Wrong("a hole is not empty")
        part.add("four places and a hole read again, cold", time.monotonic() - started, "s")
        part.add("held by it", found.st_blocks * 512 / MIB, "MiB")
    return part


def _in_step(done: int, total: int, act: Callable[[int], None], piece: int) -> list[tuple[float, float]]:
    """Do something piece by piece; (GiB done, MiB/s of the last stretch), a point for each 32nd of the whole."""
    points, last, moved = [], time.monotonic(), 0
    while done < total:
        act(done)
        done += piece
        moved += piece
        if moved >= max(piece, total // 32) or done >= total:
            now = time.monotonic()
            points.append((done / _GIB, moved / MIB / (now - last)))
            last, moved = now, 0
    return points


class MemoryWatch:
    """Resident memory of each process of a mount while something goes on."""

    def __init__(self, target: Metadiskfs) -> None:
        self._target = target
        self._stop = threading.Event()
        self._started = time.monotonic()
        self.curves: dict[str, list[tuple[float, float]]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        pause = 0.05
        while not self._stop.wait(pause):
            pause = min(2.0, pause * 1.05)
            now = time.monotonic() - self._started
            for role, size in processes.group_memory(self._target.roots(), "VmRSS").items():
                self.curves.setdefault(role, []).append((now, size / MIB))


def big_file(arguments: argparse.Namespace, base: Path) -> Part:
    """A large file written, read cold, compared: whether its speed holds to the end, and what memory it takes."""
    part, size = Part(), parse_size(arguments.big_file)
    with mounted(base, "big") as target, MemoryWatch(target) as watch:
        path = target.mountpoint / "big"
        started = time.monotonic()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        blocks = _blocks()
        wrote = _in_step(0, size, lambda at: _write_all(fd, blocks(at), at), MIB)
        last = time.monotonic()
        os.close(fd)
        part.add(f"last close() of {size / _GIB:.2g} GiB", time.monotonic() - last, "s")
        part.add("written at", size / MIB / (time.monotonic() - started), "MiB/s")
        part.add("until stored", target.sync() - started, "s")
        targets.prepare(target, "cold")
        fd = os.open(path, os.O_RDONLY)
        started = time.monotonic()
        read = _in_step(0, size, lambda at: _compare(os.pread(fd, MIB, at), blocks(at), at), MIB)
        part.add("read cold and compared at", size / MIB / (time.monotonic() - started), "MiB/s")
        os.close(fd)
    part.charts.append(Chart("Speed along one file", "GiB", "MiB/s", {"write": wrote, "cold read": read}))
    _memory(part, watch, f"Memory while {size / _GIB:.2g} GiB go through")
    return part


def _memory(part: Part, watch: MemoryWatch, title: str) -> None:
    for role, points in watch.curves.items():
        part.add(f"{title}: {role}, most", max(size for _, size in points), "MiB")
    part.charts.append(Chart(title, "s", "MiB", watch.curves))


def _blocks() -> Callable[[int], bytes]:
    """1 MiB for each offset, cheap to make and never the same."""
    base = bytes(content(99, MIB))

    def block(offset: int) -> bytes:
        return offset.to_bytes(16, "big") + base[16:]

    return block


def _write_all(fd: int, data: bytes, offset: int) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise Wrong("a short write")


def _compare(found: bytes, wanted: bytes, offset: int) -> None:
    if found != wanted:
        raise Wrong(f"wrong bytes at {offset}")


# -- many at once ---------------------------------------------------------------------------------------------------


def open_files(arguments: argparse.Namespace, base: Path) -> Part:
    """64 files open for writing at once, written in turn, then closed; and 1, 4, 16 of them, with as many bytes."""
    part, total = Part(), 256 * MIB
    blocks = _blocks()
    curve, closing = [], []
    with mounted(base, "open") as target:
        for count in (1, 4, 16, 64):
            folder = target.mountpoint / f"open{count}"
            folder.mkdir()
            started = time.monotonic()
            fds = [os.open(folder / str(number), os.O_WRONLY | os.O_CREAT, 0o644) for number in range(count)]
            for step in range(total // MIB):
                position, file = divmod(step, count)
                _write_all(fds[file], blocks(step * MIB + count), position * MIB)
            written = time.monotonic()
            for fd in fds:
                os.close(fd)
            ended = time.monotonic()
            curve.append((float(count), total / MIB / (ended - started)))
            closing.append((float(count), ended - written))
            target.sync()
            targets.prepare(target, "cold")
            for step in range(total // MIB):
                position, file = divmod(step, count)
                with (folder / str(file)).open("rb") as opened:
                    _compare(os.pread(opened.fileno(), MIB, position * MIB), blocks(step * MIB + count), step)
            shutil.rmtree(folder)
        target.note_memory()
        part.add("64 files written at once, close included", curve[-1][1], "MiB/s")
        part.add("closing all 64", closing[-1][1], "s")
        part.add("memory of mount and transfer then, peak", target.mount_memory() / MIB, "MiB")
    part.charts.append(Chart("Files open for writing at once", "files", "MiB/s", {"all together": curve}, log_x=True))
    return part


_COPIER = """
import os, sys
source, target, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for number in range(first, last):
    with open(f"{source}/{number:06d}", "rb") as a, open(f"{target}/{number:06d}", "wb") as b:
        b.write(a.read())
"""


def copiers(arguments: argparse.Namespace, base: Path) -> Part:
    """Small files copied in by 1, 2, 4 and 8 processes at once."""
    part, count = Part(), arguments.copies
    closed, stored = [], []
    with mounted(base, "copies") as target:
        for writers in (1, 2, 4, 8):
            source, folder = base / "small", target.mountpoint / f"by{writers}"
            source.mkdir(exist_ok=True)
            folder.mkdir()
            for number in range(count):
                (source / f"{number:06d}").write_bytes(small_content(writers, number, 4096))
            os.sync()
            started = time.monotonic()
            _copy_by(writers, source, folder, count)
            closed.append((float(writers), count / (time.monotonic() - started)))
            stored.append((float(writers), count / (target.sync() - started)))
            for number in range(count):
                _compare((folder / f"{number:06d}").read_bytes(), small_content(writers, number, 4096), number)
            say(f"  {writers} processes: {closed[-1][1]:.0f} /s, to stored {stored[-1][1]:.0f} /s")
        target.note_memory()
        part.add(f"{count} small files by 8 processes, to close", closed[-1][1], "/s")
        part.add("the same to stored", stored[-1][1], "/s")
        part.add("memory of mount and transfer then, peak", target.mount_memory() / MIB, "MiB")
    part.charts.append(
        Chart("Small files by processes at once", "processes", "files/s", {"to close": closed, "to stored": stored})
    )
    return part


def _copy_by(writers: int, source: Path, folder: Path, count: int) -> None:
    share = -(-count // writers)

    def one(number: int) -> None:
        edges = [str(number * share), str(min(count, (number + 1) * share))]
        subprocess.run([sys.executable, "-c", _COPIER, source, folder, *edges], check=True, cwd=PROJECT)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(one, range(writers)))


def through(arguments: argparse.Namespace, base: Path) -> Part:
    """Memory while many files of 64 MiB are copied in, and read again with the cache emptied."""
    part, total, size = Part(), parse_size(arguments.through), 64 * MIB
    blocks = _blocks()
    with mounted(base, "through") as target, MemoryWatch(target) as watch:
        count = max(1, total // size)
        started = time.monotonic()
        for number in range(count):
            with (target.mountpoint / f"file{number:05d}").open("wb") as file:
                for position in range(0, size, MIB):
                    file.write(blocks(number * size + position))
        part.add(
            f"{total / _GIB:.2g} GiB in files of 64 MiB, written at",
            total / MIB / (time.monotonic() - started),
            "MiB/s",
        )
        part.add("until stored", target.sync() - started, "s")
        targets.prepare(target, "cold")
        for number in range(count):
            with (target.mountpoint / f"file{number:05d}").open("rb") as file:
                for position in range(0, size, MIB):
                    _compare(file.read(MIB), blocks(number * size + position), position)
    _memory(part, watch, f"Memory while {total / _GIB:.2g} GiB are copied")
    return part


PARTS: dict[str, Callable[[argparse.Namespace, Path], Part]] = {
    "index": large_index,
    "sparse": sparse_file,
    "big": big_file,
    "open": open_files,
    "copies": copiers,
    "through": through,
}


def run(arguments: argparse.Namespace, base: Path, report: Report) -> None:
    """Run the parts asked for (--only), all by default; report what there is even when one fails."""
    names = arguments.only.split(",") if arguments.only else list(PARTS)
    lines, charts = [["what", "measured", "unit", "asked"]], []
    facts: dict[str, object] = {"machine": processes.machine(), "when": time.strftime("%Y-%m-%d %H:%M:%S")}
    for name in names:
        say(name)
        try:
            part = PARTS[name](arguments, base)
        except (OSError, Wrong, subprocess.SubprocessError, processes.Failed) as error:
            lines.append([name, "failed", "", f"{type(error).__name__}: {error}"])
            continue
        lines += part.lines
        charts += part.charts
        facts[name] = {
            "figures": part.facts,
            "lines": part.lines,
            "charts": [dataclasses.asdict(c) for c in part.charts],
        }
    report(arguments, markdown(lines), facts, picture.charts("metadiskfs: costs that grow with the work", charts))
