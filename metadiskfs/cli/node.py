"""``metadiskfs node``: run a node of one's own."""

from typing import Any


def register(commands: Any) -> None:
    commands.add_parser("node", help="run a MetaDisk node")
