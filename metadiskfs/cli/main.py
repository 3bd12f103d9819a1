"""The command line: one parser, one module a group of commands, one place where errors become exit codes.

A command module has ``register(commands)``, which adds its parsers and sets ``run``: a function from the parsed
arguments to the exit code. Imports that only one command needs stand inside its ``run``: the rest starts faster.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from metadiskfs import __version__
from metadiskfs.cli import care, look, mount, node, torture, transfers
from metadiskfs.errors import MetadiskfsError

Commands = Any  # argparse's own type for add_subparsers() is private


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="metadiskfs", description="The MetaDisk network as a directory.")
    parser.add_argument("--version", action="version", version=f"metadiskfs {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (mount, look, transfers, care, node, torture):
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or the one that errors.py gives what went wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    arguments = build_parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.run(arguments))
    except MetadiskfsError as error:
        print(f"metadiskfs: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 141
    except KeyboardInterrupt:
        return 130
