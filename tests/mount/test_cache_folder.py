"""Whoever empties ~/.cache loses nothing, at any time."""

import os
import shutil

from tests.conftest import Mount


def test_the_cache_folder_may_be_removed_under_a_mount(mount: Mount) -> None:
    content = os.urandom(5_000_000)
    (mount / "f").write_bytes(content)
    mount.sync()
    shutil.rmtree(mount.home / ".cache")
    mount.drop_kernel_caches()
    assert (mount / "f").read_bytes() == content
    (mount / "g").write_bytes(content[::-1])
    mount.sync()
    shutil.rmtree(mount.home / ".cache")
    mount.remount()
    assert (mount / "g").read_bytes() == content[::-1]
    assert "Traceback" not in mount.log
