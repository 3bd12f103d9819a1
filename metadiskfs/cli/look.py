"""``metadiskfs status``, ``sync`` and ``cache``: looking at a mount, and waiting for it."""

import argparse
import json
from typing import Any

from metadiskfs import control
from metadiskfs.cli.common import add_mountpoint_argument, find_mounts, show_size, wait_for_uploads


def register(commands: Any) -> None:
    status = commands.add_parser("status", help="node, pending and stored data, cache, errors")
    add_mountpoint_argument(status)
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=run_status)
    sync = commands.add_parser("sync", help="return when everything written so far is on the node")
    add_mountpoint_argument(sync)
    sync.set_defaults(run=run_sync)
    cache = commands.add_parser("cache", help="local copies")
    clear = cache.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "clear", help="drop local copies of what is stored; keep what is pending"
    )
    add_mountpoint_argument(clear)
    clear.set_defaults(run=run_clear)


def run_status(arguments: argparse.Namespace) -> int:
    answers = [control.ask_once(folder, "status") for folder in find_mounts(arguments)]
    if arguments.json:
        print(json.dumps(answers[0] if len(answers) == 1 else answers, indent=2))
        return 0
    for answer in answers:
        _print_status(answer)
    return 0


def _print_status(status: dict[str, Any]) -> None:
    kind = " (embedded)" if status["embedded"] else ""
    lines = [
        ("volume", f"{status['volume']}, mounted at {status['mountpoint']}"),
        ("node", status["node"] + kind + (", away" if status["node_away"] else "")),
        ("pending", f"{status['pending_chunks']} chunks, {show_size(status['pending_bytes'])}"),
        ("stored", f"{status['stored_chunks']} chunks, {show_size(status['stored_bytes'])}"),
        ("cache", f"{show_size(status['cache_bytes'])} of {show_size(status['cache_limit'])}"),
    ]
    if status["left_behind_chunks"]:
        left = (
            f"{status['left_behind_chunks']} chunks, {show_size(status['left_behind_bytes'])} no file needs any more"
        )
        lines.append(("left", left))
    if status["recovery_link"]:
        lines.append(("recovery", status["recovery_link"]))
    if status["lost_chunks"]:
        lines.append(("LOST", f"{status['lost_chunks']} chunks, {show_size(status['lost_bytes'])}"))
    if status["last_error"]:
        due = status["next_try_seconds"]
        lines.append(("error", status["last_error"] + (f"; next try in {due:.0f} s" if due is not None else "")))
    for label, text in lines:
        print(f"{label:>8}  {text}")


def run_sync(arguments: argparse.Namespace) -> int:
    for folder in find_mounts(arguments):
        wait_for_uploads(control.ask(folder, "sync"), "uploading")
    return 0


def run_clear(arguments: argparse.Namespace) -> int:
    for folder in find_mounts(arguments):
        freed = control.ask_once(folder, "clear_cache")["freed_bytes"]
        print(f"freed {show_size(freed)}")
    return 0
