"""``metadiskfs torture``: the random test of the promises, for whoever wants to see them kept on this machine."""

import argparse
import json
import logging
import secrets
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from metadiskfs.errors import DamageFound

if TYPE_CHECKING:
    from metadiskfs.torture.run import Report


def register(commands: Any) -> None:
    torture = commands.add_parser(
        "torture",
        help="random file operations while processes are killed; nothing promised may be lost",
        description="Mounts a scratch volume on a node of its own, in a temporary home, runs random file operations"
        " while mount, transfer and node processes are killed, and compares everything after each kill. Volumes of"
        " yours are not touched.",
    )
    torture.add_argument("--minutes", type=float, default=2.0, metavar="N", help="how long (default %(default)s)")
    torture.add_argument("--seed", type=int, metavar="S", help="repeat the choices of an earlier run")
    torture.add_argument("--json", action="store_true", help="for programs")
    torture.set_defaults(run=run_torture)


def run_torture(arguments: argparse.Namespace) -> int:
    from metadiskfs.torture.run import Torture

    logging.getLogger("metadiskfs.torture").setLevel(logging.ERROR)
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    show = sys.stderr.isatty()
    report = Torture(seed, tell=_show if show else lambda _report: None).run(60 * arguments.minutes)
    if show:
        print(file=sys.stderr)
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print_report(report)
    return DamageFound.exit_code if report.differences else 0


def _show(report: "Report") -> None:
    line = f"{report.seconds:.0f} s, {report.rounds} rounds, {report.operations} operations"
    print(f"\r{line}, {len(report.differences)} differences", end="", file=sys.stderr, flush=True)


def _print_report(report: "Report") -> None:
    kinds = ", ".join(f"{name} {count}" for name, count in report.by_kind.items())
    kills = ", ".join(f"{name} {count}" for name, count in report.kills.items())
    print(f"{'seed':>12}  {report.seed}")
    print(f"{'time':>12}  {report.seconds:.0f} s, {report.rounds} rounds")
    print(f"{'operations':>12}  {report.operations}: {kinds}")
    print(f"{'ends':>12}  {kills}")
    print(f"{'compared':>12}  {report.compared_files} files")
    print(f"{'differences':>12}  {len(report.differences)}")
    for difference in report.differences:
        print(f"  {difference}")
    if report.folder:
        print(f"{'kept':>12}  {report.folder}")
