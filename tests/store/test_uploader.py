"""The upload queue: nothing pending is ever forgotten."""

import os
import time
from pathlib import Path

import pytest

from metadiskfs.store import uploader
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


@pytest.fixture
def slow_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a moment ends no burst."""
    monkeypatch.setattr(uploader, "_BURST_SECONDS", 2.0)


def test_a_burst_of_closing_files_is_let_alone_and_then_uploaded(slow_bursts: None, tmp_path: Path) -> None:
    fs = VolumeDriver(tmp_path)
    for n in range(100):
        fs.write(f"/f{n}", os.urandom(100))
    assert len(fs.node.objects) < 20  # the first ones are no burst yet
    eventually(lambda: not fs.volume.chunks.pending_total()[0], 10)
    fs.close()


def test_a_burst_without_end_does_not_hold_uploads_back(
    slow_bursts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(uploader, "_HELD_SECONDS", 1.0)
    fs = VolumeDriver(tmp_path)
    begun = time.monotonic()
    while len(fs.node.objects) < 100 and time.monotonic() - begun < 30:
        fs.write(f"/f{time.monotonic_ns()}", os.urandom(100))
        time.sleep(0.01)
    assert 0.9 < time.monotonic() - begun < 15
    fs.close()


def test_somebody_who_waits_ends_the_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uploader, "_HELD_SECONDS", 60.0)
    monkeypatch.setattr(uploader, "_BURST_SECONDS", 20.0)
    fs = VolumeDriver(tmp_path)
    for n in range(100):
        fs.write(f"/f{n}", os.urandom(100))
    begun = time.monotonic()
    assert fs.volume.uploader.wait_progress(15)
    assert time.monotonic() - begun < 10
    fs.close()


def test_content_written_again_right_after_it_was_dropped_stays_here(tmp_path: Path) -> None:
    """The dropped chunk's files go a moment later: not those of the same content that came since."""
    fs = VolumeDriver(tmp_path)
    for is_stored in (True, False):
        content = os.urandom(100_000)
        fs.node.away = not is_stored
        fs.write("/f", content)
        if is_stored:
            fs.sync()
        fs.unlink("/f")
        fs.write("/g", content)
        fs.node.away = True
        fs.volume.cache.settle()
        assert fs.read("/g") == content
        assert fs.volume.cache.pending_bytes + fs.volume.cache.cached_bytes == len(content)
        fs.unlink("/g")
        fs.volume.cache.settle()
        assert fs.volume.cache.pending_bytes + fs.volume.cache.cached_bytes == 0
    fs.close()
