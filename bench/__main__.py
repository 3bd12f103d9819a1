"""``scripts/bench``: the comparison, --scale, --node. Results on standard output, progress on standard error."""

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from bench import comparison, picture, report, targets
from bench.processes import Failed, say
from bench.workloads import STEPS, Sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure metadiskfs beside its peers; nothing fails on a time. See docs/PERFORMANCE.md.",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--scale", action="store_true", help="what grows: index, files, writers, memory")
    mode.add_argument("--node", action="store_true", help="the node alone, beside a plain file server")
    parser.add_argument("--only", metavar="NAME,...", help=f"workloads: {', '.join(STEPS)}; or parts of --scale")
    parser.add_argument(
        "--targets", metavar="NAME,...", help=f"default: all that can run of {', '.join(targets.ALL)}"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default %(default)s; medians are shown")
    parser.add_argument("--size-factor", type=float, default=1.0, metavar="F", help="scale sizes and counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the result")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables there as well (Markdown)")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="on the disk to be measured (default /var/tmp)")
    parser.add_argument("--keep", action="store_true", help="leave the work folder, with its logs")
    scale = parser.add_argument_group("--scale")
    scale.add_argument("--files", type=int, default=10_000_000, metavar="N", help="largest index (%(default)s)")
    scale.add_argument("--big-file", default="256M", metavar="SIZE", help="of the real file (20G for the full run)")
    scale.add_argument("--sparse-file", default="100G", metavar="SIZE", help="of the sparse one")
    scale.add_argument("--through", default="512M", metavar="SIZE", help="copied through in all (10G)")
    scale.add_argument("--copies", type=int, default=10_000, metavar="N", help="small files by 8 processes")
    return parser


def _chosen(text: str | None, known: list[str], what: str) -> list[str]:
    if text is None:
        return known
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"unknown {what}: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def _targets(text: str | None) -> list[str]:
    names = _chosen(text, list(targets.ALL), "target")
    able = []
    for name in names:
        if missing := targets.ALL[name].missing():
            say(f"{name} is left out: {', '.join(missing)} not found")
        else:
            able.append(name)
    return able


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def compare(arguments: argparse.Namespace, base: Path) -> None:
    """Mount every target, run the rounds, report, unmount."""
    steps = _chosen(arguments.only, list(STEPS), "workload")
    sizes = Sizes().scaled(arguments.size_factor)
    made: list[targets.Target] = []
    try:
        for name in _targets(arguments.targets):
            target = targets.ALL[name](base / name)
            made.append(target)
            target.start()
        run = comparison.Comparison(made, steps, sizes, base)
        try:
            run.run(arguments.rounds)
        finally:
            _report(arguments, run.results, sizes, [target.name for target in made])
    finally:
        for target in made:
            targets.close(target)


def _report(arguments: argparse.Namespace, results: comparison.Results, sizes: Sizes, names: list[str]) -> None:
    if not results.measurements:
        return
    facts = comparison.as_json(results, sizes, arguments.rounds)
    medians = report.Medians(results)
    machine = facts["machine"]
    note = f"{machine['cores']} cores, kernel {machine['kernel']}, Python {machine['python']}, {facts['when']}"
    note += (
        f"; medians of {arguments.rounds} rounds; a file of {facts['file_mib']:.0f} MiB, {sizes.small} small files"
    )
    parts = [note + ".", report.table(medians, names), report.cpu_table(medians, names, STEPS)]
    parts += [report.memory_table(results), *[f"failed: {line}" for line in results.failures]]
    write(arguments, "\n\n".join(parts), facts, picture.comparison(medians, names, note))


def write(arguments: argparse.Namespace, text: str, facts: dict[str, object], svg: str) -> None:
    """Hand out a result: on standard output, and in the files asked for."""
    sys.stdout.write(text + "\n")
    if arguments.table:
        arguments.table.write_text(text + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    if arguments.svg:
        arguments.svg.write_text(svg)


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    parent = arguments.workdir or Path("/var/tmp")
    parent.mkdir(parents=True, exist_ok=True)
    base = Path(tempfile.mkdtemp(prefix="metadiskfs-bench.", dir=parent))
    try:
        if arguments.scale:
            from bench import scale

            scale.run(arguments, base, write)
        elif arguments.node:
            from bench import node

            node.run(arguments, base, write)
        else:
            compare(arguments, base)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Failed as error:
        say(f"scripts/bench: {error}")
        return 1
    finally:
        if arguments.keep:
            say(f"left: {base}")
        else:
            shutil.rmtree(base, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
