"""The large ones of tests/posix/test_programs.py."""

import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from tests.posix.conftest import SharedMount
from tests.posix.test_programs import git_life, rsync_twice

CPYTHON = ("test_os", "test_shutil", "test_tempfile", "test_mmap", "test_fcntl", "test_mailbox", "test_pathlib")


@pytest.mark.timeout(600)
def test_git_with_a_thousand_files(inside: Path) -> None:
    git_life(inside, 1000)


@pytest.mark.timeout(600)
def test_rsync_of_a_thousand_files(inside: Path) -> None:
    rsync_twice(inside, 1000)


@pytest.mark.timeout(900)
def test_a_hundred_thousand_names_listed_while_they_change(inside: Path) -> None:
    """Every name that stays is listed exactly once, whatever comes and goes beside."""
    staying = {f"stays-{number:06}" for number in range(100_000)}
    for name in staying:
        os.symlink("x", inside / name)
    ended = threading.Event()

    def change() -> None:
        number = 0
        while not ended.is_set():
            os.symlink("x", inside / f"comes-{number}")
            if number >= 50:
                os.unlink(inside / f"comes-{number - 50}")
            number += 1

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(3):
            listed = os.listdir(inside)
            kept = [name for name in listed if name.startswith("stays")]
            assert len(kept) == len(staying)
            assert set(kept) == staying
            assert len(set(listed)) == len(listed)
    finally:
        ended.set()
        changer.join()
    with os.scandir(inside) as entries:
        for number, entry in enumerate(entries):
            if number % 1000 == 0 and entry.name in staying:
                os.unlink(entry.path)
                staying.discard(entry.name)
    assert staying <= set(os.listdir(inside))


@pytest.mark.timeout(600)
def test_pip_installs_into_a_venv(inside: Path) -> None:
    """A wheel made here, so that no network is needed; and pip itself, which is a thousand files."""
    wheel = inside / "hello-1.0-py3-none-any.whl"
    info = "hello-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("hello/__init__.py", "def main():\n    print('hello from the mount')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hello\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\nhello = hello:main\n")
        archive.writestr(f"{info}/RECORD", "")
    subprocess.run([sys.executable, "-m", "venv", "v"], cwd=inside, check=True, timeout=300)
    pip = ["v/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "-q", wheel.name]
    subprocess.run(pip, cwd=inside, check=True, timeout=200)
    said = subprocess.run(["v/bin/hello"], cwd=inside, check=True, capture_output=True, text=True, timeout=60).stdout
    assert said == "hello from the mount\n"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CPYTHON)
def test_cpythons_own(name: str, shared: SharedMount, disk: Path) -> None:
    """CPython's tests with their files in the mount fail nowhere where they do not on the disk."""
    assert failed(name, shared.path) <= failed(name, disk)


def failed(name: str, folder: Path) -> set[str]:
    """The tests of a module that fail with their files in ``folder``."""
    place = folder / f"cpython-{name}"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "test", "--tempdir", str(place), "-v", "-j1", name],
        env=os.environ | {"TMPDIR": str(place)},
        cwd=place,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=800,
        check=False,
    )
    text = done.stdout + done.stderr
    assert "Ran " in text or "ran " in text, text[-2000:]
    print(text[-3000:])
    return {line for line in text.splitlines() if line.startswith(("FAIL: ", "ERROR: "))}
