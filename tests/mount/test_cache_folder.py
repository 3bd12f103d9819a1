"""Whoever empties ~/.cache loses nothing, at any time."""

import os
import shutil

from tests.conftest import Mount, eventually


def empty_cache(mount: Mount) -> None:
    """Remove the folder when everything is stored and lies there."""
    mount.sync()
    eventually(lambda: not any(folder_files for _, _, folder_files in os.walk(mount.volume_dir / "sealed")))
    shutil.rmtree(mount.home / ".cache")


def test_the_cache_folder_may_be_removed_under_a_mount(mount: Mount) -> None:
    content = os.urandom(5_000_000)
    (mount / "f").write_bytes(content)
    empty_cache(mount)
    mount.drop_kernel_caches()
    assert (mount / "f").read_bytes() == content
    (mount / "g").write_bytes(content[::-1])
    empty_cache(mount)
    mount.remount()
    assert (mount / "g").read_bytes() == content[::-1]
    assert "Traceback" not in mount.log
