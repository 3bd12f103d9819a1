"""What several commands share: options, finding the mount that is meant, progress on a terminal."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from metadiskfs import config, control
from metadiskfs.config import Config
from metadiskfs.errors import MountError

PendingAnswers = Iterator[dict[str, Any]]


def add_volume_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--volume", metavar="NAME", help="the volume (default: default)")


def add_node_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--node", metavar="URL", help="the node to talk to (default: METADISKFS_NODE, else embedded)")


def add_mountpoint_argument(parser: argparse.ArgumentParser, *, optional: bool = True) -> None:
    parser.add_argument(
        "mountpoint", metavar="MOUNTPOINT", type=Path, nargs="?" if optional else None, help="where it is mounted"
    )


def load_config(arguments: argparse.Namespace) -> Config:
    return config.load(vars(arguments))


def real(path: Path) -> Path:
    """The absolute path without symlinks, its last name untouched: that may be a dead mount."""
    absolute = Path(os.path.abspath(path.expanduser()))
    return Path(os.path.realpath(absolute.parent)) / absolute.name


def find_mounts(arguments: argparse.Namespace) -> list[Path]:
    """The folders of the volumes meant: the one mounted at ``mountpoint``, or all mounted ones without it.

    Raises MountError where there is none.
    """
    mounted = control.mounted_volumes(load_config(arguments).data_dir)
    wanted = getattr(arguments, "mountpoint", None)
    if wanted is not None:
        mounted = [(folder, facts) for folder, facts in mounted if Path(facts["mountpoint"]) == real(wanted)]
        if not mounted:
            raise MountError(f"{wanted} is not a mounted volume of yours")
    elif not mounted:
        raise MountError("no volume is mounted")
    return [folder for folder, _ in mounted]


def find_containing(path: Path, arguments: argparse.Namespace) -> tuple[Path, str]:
    """The volume a path lies in, and the path inside it. Raises MountError."""
    absolute = real(path)
    for folder, facts in control.mounted_volumes(load_config(arguments).data_dir):
        mountpoint = Path(facts["mountpoint"])
        if absolute.is_relative_to(mountpoint):
            return folder, "/" + os.path.relpath(absolute, mountpoint)
    raise MountError(f"{path} does not lie in a mounted volume of yours")


def show_size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class Progress:
    """A bar on standard error where that is a terminal; silent in a pipe."""

    _WIDTH = 30

    def __init__(self, label: str) -> None:
        self._label = label
        self._shown = sys.stderr.isatty()
        self._last = 0.0
        self._drawn = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            print("\r" + " " * self._drawn + "\r", end="", file=sys.stderr, flush=True)

    def show(self, done: float, total: float, note: str = "") -> None:
        now = time.monotonic()
        if not self._shown or (now - self._last < 0.1 and done < total):
            return
        self._last = now
        share = min(1.0, done / total) if total else 1.0
        filled = round(self._WIDTH * share)
        line = f"{self._label} [{'#' * filled}{'.' * (self._WIDTH - filled)}] {share:4.0%} {note}"
        print("\r" + line.ljust(self._drawn), end="", file=sys.stderr, flush=True)
        self._drawn = len(line)


def wait_for_uploads(answers: PendingAnswers, label: str, *, timeout: float | None = None) -> bool:
    """Follow a 'sync' request with a progress bar. False when ``timeout`` (seconds) ran out first."""
    until = None if timeout is None else time.monotonic() + timeout
    most = 0
    with Progress(label) as progress:
        for answer in answers:
            left = answer["pending_bytes"]
            most = max(most, left)
            note = f"{answer['pending_chunks']} chunks, {show_size(left)} left"
            if answer["node_away"]:
                note += f"; the node is away, next try in {answer['next_try_seconds'] or 0:.0f} s"
            progress.show(most - left, most, note)
            if answer["pending_chunks"] and until is not None and time.monotonic() >= until:
                return False
    return True
