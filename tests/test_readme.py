"""The README's session, typed in an empty HOME: every command works and prints what the README says."""

import fnmatch
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import PROJECT, Mount

BLOCKS = re.findall(r"```console\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)


def steps(block: str) -> list[tuple[str, str]]:
    """(command, expected output) of each prompt in a block."""
    found = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    assert found
    return found


@pytest.mark.timeout(400)
def test_the_session_is_true(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    mark = "-- next --"
    script = "set -e\n"
    expected = []
    for command, output in (step for block in BLOCKS for step in steps(block)):
        script += f"{command}\necho '{mark}'\n"
        expected.append((command, output))
    mount = Mount(home, home / "storj")
    try:
        done = subprocess.run(
            ["bash"], input=script, cwd=PROJECT, capture_output=True, text=True, timeout=380, check=False,
            env={**os.environ, "HOME": str(home)},
        )  # fmt: skip
    finally:
        mount.end()
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = done.stdout.split(f"{mark}\n")[:-1]
    assert len(outputs) == len(expected)
    for (command, pattern), output in zip(expected, outputs, strict=True):
        wanted = pattern.replace("[", "[[]").replace("?", "[?]").replace("...", "*")
        assert fnmatch.fnmatchcase(output, wanted), (command, pattern, output)


def test_every_command_of_the_table_exists(home: Path) -> None:
    table = (PROJECT / "README.md").read_text()
    for command in sorted(set(re.findall(r"`metadiskfs ([a-z]+)", table)) - {"cache"}):
        done = subprocess.run(
            [str(PROJECT / ".venv/bin/metadiskfs"), command, "--help"], capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, command
