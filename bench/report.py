"""The table: medians, ratios to the best peer and to bare, what issue 5 asks for, CPU seconds, memory."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.comparison import Results
from bench.targets import PEERS
from bench.workloads import MIB

OURS = "metadiskfs"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``peer``, ``bare``, ``ours``: what the aims were derived from, on a machine of 2 cores.

    ``of``: the target that counts as ours in this row.
    """

    title: str
    step: str
    figure: str
    unit: str
    more_is_better: bool
    bare: float
    peer: float
    ours: float
    of: str = OURS

    def ratio(self, mine: float, other: float) -> float:
        """How many times as good as the other; above 1 is better."""
        if not mine or not other:
            return float("nan")
        return mine / other if self.more_is_better else other / mine


_MORE, _LESS = True, False
ROWS = (
    Row("sequential write, close included", "write", "rate", "MiB/s", _MORE, 540, 384, 550),
    Row("the same until stored", "write", "stored", "s", _LESS, 0.3, 1.8, 0.9),
    Row("sequential read, caches empty", "coldread", "rate", "MiB/s", _MORE, 290, 203, 300),
    Row("time to the first byte then", "coldread", "first", "ms", _LESS, 1, 12, 8),
    Row("read from the disk cache", "cacheread", "rate", "MiB/s", _MORE, 340, 325, 600),
    Row("read again", "reread", "rate", "MiB/s", _MORE, 700, 4500, 4500),
    Row("4 KiB random reads, cached file", "randread", "rate", "/s", _MORE, 5400, 3600, 4500),
    Row("4 KiB reads, not cached, mean", "coldrandom", "mean", "ms", _LESS, 0.35, 2.7, 1.5),
    Row("4 KiB reads, not cached, p99", "coldrandom", "p99", "ms", _LESS, 0, 16, 15),
    Row("4 KiB random writes, close included", "randwrite", "rate", "/s", _MORE, 4000, 4000, 6000),
    Row("4 KiB random writes, before close", "randwrite", "before_close", "/s", _MORE, 4000, 4000, 6000),
    Row("the same with writeback", "randwrite", "before_close", "/s", _MORE, 4000, 4000, 30000, "metadiskfs-wb"),
    Row("1 byte changed, until stored", "onebyte", "stored", "s", _LESS, 0.03, 1.2, 0.15),
    Row("copy of the file, until stored", "copy", "stored", "s", _LESS, 0.4, 0.6, 0.5),
    Row("new bytes on the node for it", "copy", "new_bytes", "bytes", _LESS, 0, 80_000, 0),
    Row("4 KiB files created, to close", "create", "rate", "/s", _MORE, 950, 380, 700),
    Row("4 KiB files created, to stored", "create", "stored_rate", "/s", _MORE, 0, 139, 350),
    Row("4 KiB files read, caches empty", "smallread", "rate", "/s", _MORE, 1200, 195, 500),
    Row("find with stat, just mounted", "find", "rate", "/s", _MORE, 5300, 8700, 18000),
    Row("ls -lR, just mounted", "lslr", "rate", "/s", _MORE, 2100, 3700, 10000),
    Row("rename", "rename", "rate", "/s", _MORE, 4100, 850, 2000),
    Row("unlink", "unlink", "rate", "/s", _MORE, 2700, 560, 1500),
    Row("untar of a source tree, files", "untar", "rate", "/s", _MORE, 390, 245, 370),
    Row("git add and commit of it", "git", "seconds", "s", _LESS, 2.9, 4.0, 2.7),
    Row("rm -rf of it, entries", "rm", "rate", "/s", _MORE, 1400, 960, 1300),
    Row("memory of mount and transfer, peak", "memory", "mib", "MiB", _LESS, 26, 90, 80),
)


class Medians:
    """The median over the rounds of every figure, and of CPU seconds."""

    def __init__(self, results: Results) -> None:
        self._figures: dict[tuple[str, str, str], list[float]] = {}
        self._cpu: dict[tuple[str, str, str], list[float]] = {}
        for one in results.measurements:
            for name, value in one.figures.items():
                self._figures.setdefault((one.target, one.step, name), []).append(value)
            for role, value in one.cpu.items():
                self._cpu.setdefault((one.target, one.step, role), []).append(value)
        for target, peaks in results.memory.items():
            if peaks["mount+transfer"]:
                self._figures[target, "memory", "mib"] = [peaks["mount+transfer"] / MIB]

    def figure(self, target: str, row: Row) -> float | None:
        values = self._figures.get((target, row.step, row.figure))
        return statistics.median(values) if values else None

    def cpu(self, target: str, step: str) -> dict[str, float]:
        return {
            role: statistics.median(values)
            for (of, name, role), values in self._cpu.items()
            if of == target and name == step
        }

    def best_peer(self, row: Row) -> float | None:
        found = [value for peer in PEERS if (value := self.figure(peer, row)) is not None]
        return (max(found) if row.more_is_better else min(found)) if found else None


def show(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"


def table(medians: Medians, targets: Sequence[str]) -> str:
    """Markdown: a row a figure; ratios above 1 mean that ours is better. ``asked``: the aim's own ratios."""
    shown = [name for name in targets if name != "metadiskfs-wb"]
    head = ["what", "unit", *shown, "ours / best peer", "(asked)", "ours / bare", "(asked)"]
    lines = [head]
    for row in ROWS:
        ours = medians.figure(row.of, row)
        values = [ours if name == OURS else medians.figure(name, row) for name in shown]
        if all(value is None for value in values):
            continue
        peer, bare = medians.best_peer(row), medians.figure("bare", row)
        lines.append(
            [
                row.title,
                row.unit,
                *[show(value) for value in values],
                _times(row.ratio(ours, peer) if ours is not None and peer is not None else None),
                _times(row.ratio(row.ours, row.peer)),
                _times(row.ratio(ours, bare) if ours is not None and bare is not None else None),
                _times(row.ratio(row.ours, row.bare)),
            ]
        )
    return markdown(lines)


def cpu_table(medians: Medians, targets: Sequence[str], steps: Iterable[str]) -> str:
    """Markdown: CPU seconds of each process of each target until all of a step was stored."""
    lines = [["CPU seconds", *targets]]
    for step in steps:
        cells = []
        for target in targets:
            used = medians.cpu(target, step)
            cells.append(" + ".join(f"{role} {value:.2f}" for role, value in used.items()) or "-")
        if any(cell != "-" for cell in cells):
            lines.append([step, *cells])
    return markdown(lines)


def memory_table(results: Results) -> str:
    lines = [["peak memory, MiB", "by process"]]
    for target, peaks in results.memory.items():
        roles = ", ".join(f"{role} {size / MIB:.0f}" for role, size in peaks.items() if role != "mount+transfer")
        if roles:
            lines.append([target, roles])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    drawn = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(drawn)
