"""docs/SEMANTICS.md: every example is typed into a shell in a real mount, and what comes back is compared."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PROJECT, Mount
from tests.posix.conftest import SharedMount, fresh_folder

PAGE = (PROJECT / "docs/SEMANTICS.md").read_text()
EXAMPLES = [
    (kind, body, PAGE[: match.start()].count("\n") + 1)
    for match in re.finditer(r"^```console ?(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for kind, body in [match.groups()]
]
INSIDE = [pytest.param(body, id=f"line-{line}") for kind, body, line in EXAMPLES if not kind]
OWN_MOUNT = [pytest.param(body, id=f"line-{line}") for kind, body, line in EXAMPLES if kind == "mount"]


def commands_of(body: str) -> list[tuple[str, str]]:
    """(command, expected output) pairs: ``$`` begins a command, ``>`` goes on with it, all else is output."""
    pairs: list[tuple[str, str]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            pairs.append((line[2:], ""))
        elif line.startswith("> "):
            pairs[-1] = (f"{pairs[-1][0]}\n{line[2:]}", pairs[-1][1])
        else:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]}{line}\n")
    return pairs


def check(body: str, folder: Path) -> None:
    """Run all commands in one shell and compare what each printed, on both channels."""
    mark = "=== next ==="
    pairs = commands_of(body)
    script = "".join(f"{command}\necho '{mark}'\n" for command, _ in pairs)
    shim = f'metadiskfs() {{ PYTHONPATH="{PROJECT}" "{sys.executable}" -m metadiskfs "$@"; }}\nexec 2>&1\n'
    done = subprocess.run(
        ["bash", "-c", shim + script],
        cwd=folder,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=True,
    )
    said = done.stdout.decode(errors="surrogateescape").split(f"{mark}\n")[:-1]
    assert list(zip([command for command, _ in pairs], said, strict=True)) == pairs


def test_there_are_examples() -> None:
    assert len(INSIDE) > 15
    assert len(OWN_MOUNT) == 2
    assert len(EXAMPLES) == len(INSIDE) + len(OWN_MOUNT)
    assert PAGE.count("```console") == len(EXAMPLES)


@pytest.mark.parametrize("body", INSIDE)
def test_an_example_in_a_mount(body: str, shared: SharedMount) -> None:
    check(body, fresh_folder(shared.path))


@pytest.mark.parametrize("body", OWN_MOUNT)
def test_an_example_with_a_mount_of_its_own(body: str, make_mount: Callable[..., Mount], tmp_path: Path) -> None:
    mount = make_mount(volume="docs")
    mount.start()
    check(body, tmp_path)
