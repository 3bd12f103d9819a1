"""docs/NODE.md against the program: the flags it names exist, and the unit starts what there is."""

import re
from pathlib import Path

from tests.node.node_process import run_cli

PROJECT = Path(__file__).parent.parent.parent


def helps() -> str:
    return "".join(
        run_cli(*words, "--help").stdout for words in (["node"], ["node", "check"], ["node", "admin"], ["mount"])
    )


def test_every_flag_named_exists() -> None:
    known = helps()
    page = (PROJECT / "docs/NODE.md").read_text()
    unit = (PROJECT / "packaging/metadiskfs-node.service").read_text()
    elsewhere = {"--uid", "--display-name", "--preserve", "--now"}  # radosgw-admin's, cp's, systemctl's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page + unit)) - elsewhere
    assert len(named) > 15
    assert {flag for flag in named if flag not in known} == set()


def test_every_flag_of_the_node_is_described() -> None:
    page = (PROJECT / "docs/NODE.md").read_text()
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", run_cli("node", "--help").stdout)) - {"--help"}
    assert {flag for flag in flags if flag not in page} == set()
