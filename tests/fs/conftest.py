"""``fs``: every scenario that takes it runs on the volume in-process and through the kernel."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.drivers import Driver, KernelDriver, VolumeDriver


@pytest.fixture(params=["volume", "kernel"])
def fs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    if request.param == "volume":
        driver: VolumeDriver | KernelDriver = VolumeDriver(tmp_path)
    else:
        make_mount = request.getfixturevalue("make_mount")
        mount = make_mount("--chunk-size", "64K")
        mount.start()
        driver = KernelDriver(mount)
    yield driver
    driver.close()
