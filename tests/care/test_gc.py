"""Deleting frees, and frees nothing that is needed."""

import os
from collections.abc import Callable

import pytest

from tests.conftest import Mount, eventually, metadiskfs


def objects(mount: Mount) -> int:
    return sum(path.stat().st_size for path in (mount.data_dir / "node/objects").rglob("*") if path.is_file())


def local(mount: Mount) -> int:
    folders = (mount.volume_dir / "sealed", mount.volume_dir / "work", mount.cache_dir)
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def test_local_files_go_at_once(mount: Mount) -> None:
    (mount / "f").write_bytes(os.urandom(5_000_000))
    assert local(mount) >= 5_000_000
    mount.sync()
    (mount / "f").unlink()
    eventually(lambda: local(mount) == 0)
    (mount / "g").write_bytes(os.urandom(5_000_000))
    (mount / "g").write_bytes(b"short")
    eventually(lambda: local(mount) < 1000)


def test_what_nothing_needs_is_swept_and_all_else_stays(mount: Mount) -> None:
    kept = os.urandom(2_000_000)
    (mount / "gone").write_bytes(os.urandom(3_000_000))
    (mount / "kept").write_bytes(kept)
    mount.sync()
    (mount / "gone").unlink()
    status = mount.status()
    assert (status["left_behind_chunks"], status["left_behind_bytes"]) == (1, 3_000_000)
    assert "freed 2.9 MiB in 1 objects" in metadiskfs("gc").stdout
    assert objects(mount) < 2_200_000
    assert mount.status()["left_behind_chunks"] == 0
    mount.clear_cache()
    mount.drop_kernel_caches()
    assert (mount / "kept").read_bytes() == kept


def test_a_kept_backup_keeps_its_objects(mount: Mount, make_mount: Callable[..., Mount]) -> None:
    content = os.urandom(1_000_000)
    (mount / "f").write_bytes(content)
    link = metadiskfs("backup", str(mount.path)).stdout.strip()
    (mount / "f").unlink()
    metadiskfs("gc")
    metadiskfs("restore", link, "--volume", "old")
    old = make_mount(volume="old", name="old")
    old.start()
    assert (old / "f").read_bytes() == content
    old.unmount()


def test_another_volume_keeps_its_objects(mount: Mount, make_mount: Callable[..., Mount]) -> None:
    content = os.urandom(1_000_000)
    other = make_mount(volume="other", name="other")
    other.start()
    for each in (mount, other):
        (each / "f").write_bytes(content)
        each.sync()
    (mount / "f").unlink()
    metadiskfs("gc")
    other.clear_cache()
    other.drop_kernel_caches()
    assert (other / "f").read_bytes() == content
    other.unmount()
    (mount / "x").write_bytes(os.urandom(100_000))
    metadiskfs("gc")
    other.start()
    other.clear_cache()
    assert (other / "f").read_bytes() == content


def test_handed_out_links_keep_their_objects(mount: Mount) -> None:
    (mount / "f").write_bytes(b"published content")
    link = metadiskfs("link", "--whole", str(mount / "f")).stdout.strip()
    (mount / "f").unlink()
    metadiskfs("gc")
    assert metadiskfs("download", link).stdout == "published content"


def test_a_volume_whose_index_is_gone_stops_the_sweep(mount: Mount) -> None:
    (mount / "f").write_bytes(os.urandom(100_000))
    link = metadiskfs("backup", str(mount.path)).stdout.strip()
    mount.unmount()
    before = objects(mount)
    (mount.volume_dir / "index.db").unlink()
    done = metadiskfs("gc", check=False)
    assert done.returncode == 6
    assert "restore it" in done.stderr
    assert objects(mount) == before
    metadiskfs("restore", link)
    mount.start()
    assert len((mount / "f").read_bytes()) == 100_000


def test_content_written_again_after_a_sweep_is_uploaded_again(mount: Mount) -> None:
    content = os.urandom(1_000_000)
    (mount / "f").write_bytes(content)
    mount.sync()
    (mount / "f").unlink()
    metadiskfs("gc")
    (mount / "f").write_bytes(content)
    mount.sync()
    mount.clear_cache()
    mount.drop_kernel_caches()
    assert (mount / "f").read_bytes() == content


def test_it_sweeps_by_itself_when_the_disk_gets_short(
    make_mount: Callable[..., Mount], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METADISKFS_SWEEP_BELOW_SIZE", "1000T")
    mount = make_mount()
    mount.start()
    (mount / "f").write_bytes(os.urandom(3_000_000))
    mount.sync()
    (mount / "f").unlink()
    eventually(lambda: objects(mount) < 1_000_000, 40)
