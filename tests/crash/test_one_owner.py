"""Two processes and one volume; an index from the future; migrations: in order, whole or not at all."""

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiskfs.errors import MetadiskfsError
from metadiskfs.store import schema
from metadiskfs.store.index import Index
from tests.conftest import Mount
from tests.crash.conftest import Bench, verify


def test_a_second_mount_is_refused(mount: Mount, make_mount: Callable[..., Mount]) -> None:
    (mount / "file").write_bytes(b"first")
    second = make_mount(name="second")
    done = second.start(check=False)
    assert done.returncode == 6
    assert "mounted already" in done.stderr
    assert not os.path.ismount(second.path)
    assert (mount / "file").read_bytes() == b"first"
    again = mount.start(check=False)
    assert again.returncode == 7
    assert "mounted" in again.stderr


def test_two_that_start_at_once(make_mount: Callable[..., Mount]) -> None:
    """One wins, the other says why; whoever it is, the volume works and is sound."""
    mounts = [make_mount(name=f"m{number}") for number in range(3)]
    command = [sys.executable, "-m", "metadiskfs", "mount"]
    starts = [
        subprocess.Popen([*command, str(mount.path)], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        for mount in mounts
    ]
    said = [start.communicate(timeout=90)[1] for start in starts]
    codes = sorted(start.returncode for start in starts)
    assert codes == [0, 6, 6], said
    (winner,) = [mount for mount in mounts if os.path.ismount(mount.path)]
    (winner / "file").write_bytes(b"content")
    winner.sync()
    assert verify(winner) == (0, {"chunks_checked": 1, "ok": True, "findings": []})
    winner.unmount()


def digest(folder: Path) -> dict[str, bytes]:
    """The index and its log; an empty log is none, and the log's own index says nothing."""
    found = {name: folder / name for name in ("index.db", "index.db-wal")}
    return {name: path.read_bytes() for name, path in found.items() if path.exists() and path.stat().st_size}


@pytest.mark.parametrize("with_log", [False, True])
def test_an_index_that_is_too_new_stays_as_it_is(bench: Bench, with_log: bool) -> None:
    """Also where a newer program was killed and left its write-ahead log: closing must not move that."""
    index = bench.mount.volume_dir / "index.db"
    if with_log:
        script = (
            "import os, sqlite3, sys\n"
            "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "db.execute('PRAGMA user_version = 99')\n"
            "db.execute('CREATE TABLE future (x)')\n"
            "os._exit(0)\n"
        )
        subprocess.run([sys.executable, "-c", script, str(index)], check=True)
        assert (index.parent / "index.db-wal").stat().st_size
    else:
        db = sqlite3.connect(index)
        db.execute("PRAGMA user_version = 99")
        db.close()
    before = digest(bench.mount.volume_dir)
    done = bench.mount.start(check=False)
    assert done.returncode == 6
    assert "newer metadiskfs" in done.stderr
    assert digest(bench.mount.volume_dir) == before


def open_index(path: Path) -> Index:
    return Index(path, chunk_size=1 << 20)


@pytest.fixture
def old_index(tmp_path: Path) -> Path:
    path = tmp_path / "index.db"
    open_index(path).close()
    return path


def version_of(path: Path) -> int:
    db = sqlite3.connect(path)
    try:
        return int(db.execute("PRAGMA user_version").fetchone()[0])
    finally:
        db.close()


def test_migrations_run_in_order_once(old_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = len(schema.MIGRATIONS)
    steps = (
        "CREATE TABLE step (n INTEGER); INSERT INTO step VALUES (1)",
        "INSERT INTO step SELECT max(n) * 10 FROM step",
        "INSERT INTO step SELECT max(n) + 5 FROM step",
    )
    for count in (1, 3, 3):
        monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS[:first], *steps[:count]))
        index = open_index(old_index)
        rows = [row[0] for row in index.db.execute("SELECT n FROM step ORDER BY n")]
        index.close()
        assert rows == [1, 10, 15][:count]
        assert version_of(old_index) == first + count


@pytest.mark.parametrize("broken", ["INSERT INTO nowhere VALUES (1)", "this is no SQL"])
def test_a_migration_that_fails_leaves_the_index_as_it_was(
    old_index: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before, first = content_of(old_index), len(schema.MIGRATIONS)
    good = "CREATE TABLE extra (n INTEGER)"
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, f"DROP TABLE xattr; {good}; {broken}"))
        with pytest.raises(MetadiskfsError):
            open_index(old_index)
    assert content_of(old_index) == before
    assert version_of(old_index) == first
    open_index(old_index).close()


def content_of(path: Path) -> list[str]:
    db = sqlite3.connect(path)
    try:
        return list(db.iterdump())
    finally:
        db.close()


def test_no_migration_ends_its_transaction_itself() -> None:
    for script in schema.MIGRATIONS:
        statements = re.sub("--.*", "", script)
        assert not re.search(r"\b(commit|rollback|begin)\b", statements, re.IGNORECASE)
