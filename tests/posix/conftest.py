"""One mount and one folder on the disk for all of tests/posix, and users to act as.

The disk is the reference: whatever runs on ``place`` runs there first, so that a wrong expectation shows as such.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT, Mount
from tests.posix.users import ANNA, BEN, CARL, STAFF, User


class SharedMount(Mount):
    """A mount that outlives a test: brings its environment with it."""

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "METADISKFS_"))}
        done = subprocess.run(
            [sys.executable, "-m", "metadiskfs", *arguments],
            env=kept | {"HOME": str(self.home), "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            done.check_returncode()
        return done


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A folder every user can enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="posix-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def shared(open_folder: Path) -> Iterator[SharedMount]:
    """A volume mounted with allow_other, with small chunks so that tests cross their borders."""
    home = open_folder / "home"
    home.mkdir()
    mount = SharedMount(home, open_folder / "m", "-o", "allow_other", "--chunk-size", "64K")
    try:
        mount.start()
        yield mount
        assert "Traceback" not in mount.log
    finally:
        mount.end()


@pytest.fixture(scope="session")
def disk(open_folder: Path) -> Path:
    """The local disk, for comparison."""
    (open_folder / "disk").mkdir()
    return open_folder / "disk"


def fresh_folder(parent: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="t", dir=parent))
    folder.chmod(0o755)
    return folder


@pytest.fixture(params=["disk", "mount"])
def place(request: pytest.FixtureRequest) -> Path:
    """A fresh folder on the disk, then in the mount: what differs is a bug."""
    if request.param == "disk":
        return fresh_folder(request.getfixturevalue("disk"))
    return fresh_folder(request.getfixturevalue("shared").path)


@pytest.fixture
def inside(shared: SharedMount) -> Path:
    """A fresh folder in the mount."""
    return fresh_folder(shared.path)


@pytest.fixture(scope="session")
def users() -> Iterator[dict[str, User]]:
    """root; anna and ben, who share the group STAFF; carl, who shares none."""
    assert os.geteuid() == 0, "only root can act as several users: run these tests as root"
    made = {
        "root": User(),
        "anna": User(ANNA, ANNA, STAFF),
        "ben": User(BEN, BEN, STAFF),
        "carl": User(CARL, CARL),
    }
    yield made
    for user in made.values():
        user.end()


@pytest.fixture
def user() -> Iterator[Callable[..., User]]:
    """More processes, ended with the test: user(uid, gid, *groups)."""
    with contextlib.ExitStack() as stack:

        def start(*who: int) -> User:
            started = User(*who)
            stack.callback(started.end)
            return started

        yield start
