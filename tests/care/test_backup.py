"""The index on the node: saved by itself and on demand, restored from one link, and hostile ones refused."""

import contextlib
import json
import os
import sqlite3
import stat
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiskfs.errors import IndexDamaged
from metadiskfs.metadisk.wire import Link
from metadiskfs.store.backup import BLOCK_SIZE, Block, Manifest, adopt_index, fetch_index, thinned, unzip
from metadiskfs.store.index import Index
from tests.conftest import Mount, eventually, metadiskfs

DAY = 86_400 * 10**9


def backup(mount: Mount) -> str:
    return metadiskfs("backup", str(mount.path)).stdout.strip()


def fill(mount: Mount) -> dict[str, bytes]:
    (mount / "d").mkdir()
    files = {"a": b"", "d/b": b"test data\n", "d/big": os.urandom(9_000_000)}
    for name, content in files.items():
        (mount / name).write_bytes(content)
    (mount / "s").symlink_to("d/b")
    os.link(mount / "d/b", mount / "h")
    os.chmod(mount / "d/b", 0o640)
    os.utime(mount / "d/b", ns=(1, 1_234_567_890_123_456_789))
    os.setxattr(mount / "d/b", "user.colour", b"blue")
    return files


def test_a_volume_comes_back_whole_from_its_link_and_a_node(
    mount: Mount, make_mount: Callable[..., Mount], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = fill(mount)
    link = backup(mount)
    node = json.loads(metadiskfs("status", "--json").stdout)["node"]
    monkeypatch.setenv("HOME", str(tmp_path / "another-machine"))
    assert "--volume again" in metadiskfs("restore", link, "--volume", "again", "--node", node).stdout
    other = make_mount(volume="again", name="m2")
    other.start("--node", node)
    for name, content in files.items():
        assert (other / name).read_bytes() == content
    found = (other / "d/b").stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert (found.st_mtime_ns, found.st_nlink) == (1_234_567_890_123_456_789, 2)
    assert os.readlink(other / "s") == "d/b"
    assert os.getxattr(other / "h", "user.colour") == b"blue"
    other.unmount("--no-wait")


def test_an_older_link_restores_the_older_state(mount: Mount, make_mount: Callable[..., Mount]) -> None:
    (mount / "f").write_bytes(b"old")
    old = backup(mount)
    (mount / "f").write_bytes(b"new")
    new = backup(mount)
    for volume, link, content in (("o", old, b"old"), ("n", new, b"new")):
        metadiskfs("restore", link, "--volume", volume)
        other = make_mount(volume=volume, name=f"m-{volume}")
        other.start()
        assert (other / "f").read_bytes() == content


def test_it_is_saved_at_unmount_and_the_link_is_kept_and_shown(
    make_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    recovery = tmp_path / "recovery"
    mount = make_mount("--recovery-file", str(recovery))
    mount.start()
    (mount / "f").write_bytes(b"x")
    mount.unmount()
    link = recovery.read_text().strip()
    assert Link.parse(link)
    assert stat.S_IMODE(recovery.stat().st_mode) == 0o600
    mount.start()
    assert mount.status()["recovery_link"] == link
    mount.unmount()
    assert recovery.read_text().strip() == link  # nothing changed: nothing was saved again


def test_it_is_saved_at_least_every_interval_while_changing(
    make_mount: Callable[..., Mount], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METADISKFS_BACKUP_INTERVAL", "1")
    mount = make_mount()
    mount.start()

    def saved() -> bool:
        (mount / "f").write_bytes(os.urandom(10))
        return bool(mount.status()["recovery_link"])

    eventually(saved)


def test_a_small_change_costs_little(mount: Mount) -> None:
    for n in range(3000):
        (mount / f"some-longer-name-{n}").symlink_to("target")
    backup(mount)

    def stored() -> int:
        return sum(path.stat().st_size for path in (mount.data_dir / "node/objects").rglob("*") if path.is_file())

    before = stored()
    (mount / "one-more").touch()
    backup(mount)
    index = (mount.volume_dir / "index.db").stat().st_size
    assert stored() - before < min(index, 3 * BLOCK_SIZE)


def test_restoring_over_a_volume_is_refused(mount: Mount) -> None:
    (mount / "f").write_bytes(b"x")
    link = backup(mount)
    mount.unmount()
    assert "exists already" in metadiskfs("restore", link, check=False).stderr


@pytest.mark.parametrize("text", ["nonsense", "0" * 64 + "?key=" + "0" * 64])
def test_a_link_to_nothing_leaves_nothing(home: Path, text: str) -> None:
    done = metadiskfs("restore", text, "--volume", "v", check=False)
    assert done.returncode in (2, 3)
    assert "Traceback" not in done.stderr
    assert not (home / ".local/share/metadiskfs/volumes/v/index.db").exists()


# -- untrusted input ------------------------------------------------------------------------------------------------


@pytest.fixture
def index_file(tmp_path: Path) -> Path:
    path = tmp_path / "index.db"
    Index(path, chunk_size=4 << 20).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
    return path


@pytest.mark.parametrize(
    "poison",
    [
        "CREATE TRIGGER t AFTER INSERT ON inode BEGIN DELETE FROM name; END",
        "CREATE VIEW v AS SELECT * FROM inode",
        "CREATE TABLE extra (x)",
        "DROP TABLE xattr",
        "INSERT INTO name VALUES (1, CAST('../../etc/passwd' AS BLOB), 1)",
        "INSERT INTO inode VALUES (2, 33188, 0, 0, 1, -1, 0, 0, 0, 0, 0, NULL)",
        "UPDATE inode SET mode = 33188 WHERE id = 1",
        "PRAGMA user_version = 0",
    ],
)
def test_a_hostile_index_is_refused(index_file: Path, poison: str) -> None:
    with contextlib.closing(sqlite3.connect(index_file, isolation_level=None)) as db:
        db.execute(poison)
    with pytest.raises(IndexDamaged):
        adopt_index(index_file, "embedded")


def test_a_good_index_is_adopted(index_file: Path) -> None:
    assert adopt_index(index_file, "http://other:1") == 0
    index = Index(index_file, chunk_size=1)
    assert index.meta("node") == "http://other:1"
    index.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(os.urandom(100_000))
    with pytest.raises(IndexDamaged):
        adopt_index(path, "embedded")


def test_a_bomb_does_not_explode() -> None:
    with pytest.raises(IndexDamaged):
        unzip(zlib.compress(bytes(50_000_000)), 1_000_000)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    block = Block("0" * 64, "1" * 64, "2" * 64, 0)
    manifest = Manifest("u", 1, 1, BLOCK_SIZE, "0" * 64, (block,))
    assert Manifest.decode(manifest.encode()) == manifest
    with pytest.raises(IndexDamaged):
        fetch_index(manifest, lambda _link: zlib.compress(b"short"), tmp_path / "one")
    with pytest.raises(IndexDamaged):
        fetch_index(manifest, lambda _link: zlib.compress(bytes(BLOCK_SIZE)), tmp_path / "two")
    for wrong in (b"", b"{}", zlib.compress(b"[]"), zlib.compress(b'{"format": "metadiskfs-index", "version": 1}')):
        with pytest.raises(IndexDamaged):
            Manifest.decode(wrong)


def test_old_backups_are_thinned_by_age() -> None:
    now = 1000 * DAY
    backups = [(n, now - age) for n, age in enumerate(range(0, 60 * DAY, DAY // 4))]
    kept = thinned(backups, now)
    ages = sorted((now - created) // DAY for n, created in backups if n in kept)
    assert {0, 1, 2, 3, 4, 5, 6} <= set(ages)
    assert max(ages) <= 35
    assert len(kept) <= 5 + 8 + 6
