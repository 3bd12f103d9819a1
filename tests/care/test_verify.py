"""Each kind of damage that verify claims to find is done here on purpose, in a real volume, and must be found."""

import contextlib
import json
import os
import sqlite3
from typing import Any

import pytest

from metadiskfs.store.fsck import CHECKS, check_index
from tests.conftest import Mount, metadiskfs

DAMAGE = {
    "dangling-name": "INSERT INTO name VALUES (1, x'6768', 999999)",
    "bad-name": "UPDATE name SET name = x'2e2e2f78' WHERE name = x'66'",
    "second-name-of-directory": "INSERT INTO name SELECT 1, x'7a7a', inode FROM name WHERE name = x'64'",
    "unreachable": "UPDATE name SET parent = inode WHERE name = x'64'",
    "orphan": "DELETE FROM name WHERE name = x'66'",
    "not-a-directory": "INSERT INTO name SELECT inode, x'7a', inode FROM name WHERE name = x'66'",
    "link-count": "UPDATE inode SET nlink = 7 WHERE id = (SELECT inode FROM name WHERE name = x'66')",
    "directory-link-count": "UPDATE inode SET nlink = 9 WHERE id = 1",
    "chunk-missing": "DELETE FROM chunk WHERE id = (SELECT min(chunk) FROM slot)",
    "slot-without-file": "INSERT INTO slot SELECT 999999, 0, id, size FROM chunk LIMIT 1",
    "slot-beyond-end": "INSERT INTO slot SELECT inode, 1000, chunk, length FROM slot LIMIT 1",
    "slot-length": "UPDATE slot SET length = 1 << 40",
    "chunk-size": "UPDATE chunk SET size = 1 << 50",
    "held": "UPDATE inode SET held = held + 1 WHERE held > 0",
    "size": "UPDATE inode SET size = -5 WHERE id = (SELECT inode FROM name WHERE name = x'66')",
    "stored-without-link": "UPDATE chunk SET filehash = NULL",
    "unreferenced": "INSERT INTO chunk (sha256, size, state, created_ns, born) VALUES (zeroblob(32), 1, 2, 0, 0)",
    "dead-but-used": "UPDATE chunk SET dead = 1",
}


def verify(mount: Mount, *options: str) -> tuple[int, dict[str, Any]]:
    done = metadiskfs("verify", "--volume", mount.volume, "--json", *options, check=False)
    return done.returncode, json.loads(done.stdout)


def kinds(report: dict[str, Any]) -> set[str]:
    return {finding["kind"] for finding in report["findings"]}


@pytest.fixture
def unmounted(mount: Mount) -> Mount:
    (mount / "d").mkdir()
    (mount / "f").write_bytes(os.urandom(100))
    (mount / "d" / "g").write_bytes(os.urandom(5_000_000))
    mount.unmount()
    return mount


def damage(mount: Mount, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(mount.volume_dir / "index.db")) as db:
        assert db.execute(statement).rowcount
        db.commit()


def test_every_check_has_its_damage() -> None:
    assert DAMAGE.keys() == {check.kind for check in CHECKS}


def test_each_damage_of_the_index_is_found_and_mended(unmounted: Mount) -> None:
    index = unmounted.volume_dir / "index.db"
    good = index.read_bytes()
    for kind, statement in DAMAGE.items():
        index.write_bytes(good)
        damage(unmounted, statement)
        with contextlib.closing(sqlite3.connect(index, isolation_level=None)) as db:
            assert kind in {finding.kind for finding in check_index(db)}, kind
            for _ in range(3):  # mending one thing may bring another to light
                list(check_index(db, repair=True))
            assert not list(check_index(db)), kind


def test_the_command_finds_mends_and_tells(unmounted: Mount) -> None:
    assert verify(unmounted)[0] == 0
    damage(unmounted, DAMAGE["link-count"])
    code, report = verify(unmounted)
    assert (code, kinds(report)) == (9, {"link-count"})
    assert report["findings"][0]["path"] == "/f"
    assert verify(unmounted, "--repair")[0] == 0
    assert verify(unmounted) == (0, {"chunks_checked": 3, "ok": True, "findings": []})


def test_an_object_the_node_lost_is_found_by_path_and_healed_from_the_cache(mount: Mount) -> None:
    (mount / "d").mkdir()
    (mount / "d" / "file").write_bytes(b"content" * 1000)
    mount.sync()
    for path in (mount.data_dir / "node" / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    code, report = verify(mount)
    assert code == 9
    assert [(finding["kind"], finding["path"]) for finding in report["findings"]] == [("missing", "/d/file")]
    code, report = verify(mount, "--repair")
    assert code == 0
    assert report["findings"][0]["repaired"]
    mount.sync()
    mount.clear_cache()
    mount.drop_kernel_caches()
    assert (mount / "d" / "file").read_bytes() == b"content" * 1000
    assert verify(mount, "--data") == (0, {"chunks_checked": 1, "ok": True, "findings": []})


def test_a_damaged_object_is_found_by_its_data(mount: Mount) -> None:
    (mount / "file").write_bytes(b"content" * 1000)
    mount.sync()
    objects = [path for path in (mount.data_dir / "node" / "objects").rglob("*") if path.is_file()]
    with objects[0].open("r+b") as file:
        file.seek(3000)
        file.write(b"X")
    code, report = verify(mount, "--data")
    assert code == 9
    assert kinds(report) <= {"wrong", "missing"}
    assert report["findings"][0]["path"] == "/file"


def test_a_lost_chunk_is_healed_by_the_next_write_of_its_content(mount: Mount) -> None:
    content = os.urandom(50_000)
    (mount / "file").write_bytes(content)
    mount.sync()
    mount.clear_cache()
    for path in (mount.data_dir / "node" / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    mount.drop_kernel_caches()
    with pytest.raises(OSError, match="Input/output error"):
        (mount / "file").read_bytes()
    assert mount.status()["lost_chunks"] == 1
    assert "file" in mount.log
    (mount / "copy").write_bytes(content)
    mount.sync()
    assert mount.status()["lost_chunks"] == 0
    assert (mount / "file").read_bytes() == content


def test_an_interrupted_run_goes_on_where_it_was(unmounted: Mount) -> None:
    memory = unmounted.volume_dir / "verify-head.json"
    memory.write_text(json.dumps({"after": 1, "done": 1}))
    total = verify(unmounted, "--restart")[1]["chunks_checked"]
    memory.write_text(json.dumps({"after": 1, "done": 1}))
    assert verify(unmounted)[1]["chunks_checked"] == total - 1
    assert not memory.exists()


def test_verifying_a_mounted_volume_while_it_is_written_finds_nothing(mount: Mount) -> None:
    for n in range(200):
        (mount / f"f{n}").write_bytes(os.urandom(500))
    code, report = verify(mount)
    assert (code, report["findings"]) == (0, [])


def test_the_index_cannot_be_mended_under_a_mount(mount: Mount) -> None:
    (mount / "f").write_bytes(b"x")
    mount.sync()
    damage(mount, "UPDATE inode SET nlink = 9 WHERE id = 1")
    code, report = verify(mount, "--repair")
    assert code == 9
    assert not report["findings"][0]["repaired"]
