"""The upload queue: nothing pending is ever forgotten."""

import os
from pathlib import Path

from tests.conftest import eventually
from tests.fs.drivers import VolumeDriver


def test_a_chunk_after_a_dropped_one_is_uploaded(tmp_path: Path) -> None:
    """Row numbers are not given out twice: the queue would take the new chunk for one it had."""
    fs = VolumeDriver(tmp_path)
    for n in range(5):
        fs.write("/f", os.urandom(1000))
        eventually(lambda: not fs.volume.chunks.pending_total()[0])
        fs.unlink("/f")
        fs.index.db.execute("DELETE FROM chunk")
        fs.write(f"/kept{n}", os.urandom(1000))
        eventually(lambda: not fs.volume.chunks.pending_total()[0], 5)
        fs.unlink(f"/kept{n}")
    fs.close()


def test_what_failed_while_the_node_was_away_is_uploaded_when_it_is_back(tmp_path: Path) -> None:
    fs = VolumeDriver(tmp_path)
    fs.node.away = True
    for n in range(20):
        fs.write(f"/f{n}", os.urandom(1000))
    eventually(lambda: fs.volume.uploader.is_node_away)
    assert fs.volume.chunks.pending_total()[0] == 20
    fs.node.away = False
    eventually(lambda: not fs.volume.chunks.pending_total()[0])
    assert not fs.volume.uploader.state()["failing_chunks"]
    fs.close()
