"""What every engine promises (metadiskfs/node/engine.py), on each of them."""

import hashlib
import random
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from metadiskfs.errors import ContentMismatch, ObjectMissing
from metadiskfs.node.disk import DiskEngine
from metadiskfs.node.engine import PIECE, Engine, Facts, MemoryEngine, prove
from metadiskfs.node.s3 import S3Engine
from metadiskfs.node.spool import SpoolFolder
from tests.engines.s3_server import BUCKET

FACTS = Facts("name.txt", 1_700_000_000)
SIZES = [0, 1, 4096, PIECE, PIECE + 1, (8 << 20) + 17]
FOREVER = 1 << 62


@pytest.fixture(params=["memory", "disk", "s3", "s3-without-create"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    made: Engine
    if request.param == "memory":
        made = MemoryEngine(SpoolFolder(tmp_path / "spool"))
    elif request.param == "disk":
        made = DiskEngine(tmp_path / "store")
    else:
        request.getfixturevalue("s3_settings")
        s3 = S3Engine.connect(f"s3://{BUCKET}/{secrets.token_hex(8)}", SpoolFolder(tmp_path / "spool"))
        if request.param == "s3-without-create":
            s3._creates = False
        made = s3
    yield made
    made.close()


def sample(size: int, seed: int = 0) -> tuple[str, bytes]:
    content = random.Random(f"{size}.{seed}").randbytes(size)
    return hashlib.sha256(content).hexdigest(), content


def read(engine: Engine, filehash: str, start: int = 0, stop: int | None = None) -> bytes:
    with engine.open(filehash) as stored:
        return b"".join(stored.pieces(start, stored.size if stop is None else stop))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spooled", [False, True])
def test_what_was_put_is_there(engine: Engine, size: int, spooled: bool) -> None:
    filehash, content = sample(size)
    with pytest.raises(ObjectMissing):
        engine.open(filehash)
    for expected in (True, False, False):
        if spooled:
            with engine.spools.create() as spool:
                spool.append(content)
                assert engine.put(filehash, spool, FACTS) is expected
        else:
            assert engine.put(filehash, content, FACTS) is expected
        with engine.open(filehash) as stored:
            assert stored.size == size
            assert stored.facts() == FACTS
            prove(stored, filehash)
            prove(stored, filehash)
    assert read(engine, filehash) == content


def test_parts(engine: Engine) -> None:
    filehash, content = sample(SIZES[-1])
    engine.put(filehash, content, FACTS)
    borders = [0, 1, PIECE - 1, PIECE, PIECE + 1, 8 << 20, (8 << 20) + 1, len(content)]
    for start in borders:
        for stop in borders:
            if start < stop:
                assert read(engine, filehash, start, stop) == content[start:stop]
    with engine.open(filehash) as stored:
        assert max(len(piece) for piece in stored.pieces(0, stored.size)) <= PIECE


@pytest.mark.parametrize("name", ["", "x", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", "lock"])
def test_no_other_name_is_an_object(engine: Engine, name: str) -> None:
    with pytest.raises(ObjectMissing):
        engine.open(name)


def test_delete_minds_the_time(engine: Engine) -> None:
    filehash, content = sample(100)
    before = time.time_ns()
    engine.put(filehash, content, FACTS)
    assert not engine.delete(filehash, not_newer_than_ns=before)
    assert read(engine, filehash) == content
    assert engine.delete(filehash, not_newer_than_ns=time.time_ns() + 2 * 10**9)
    assert not engine.delete(filehash, not_newer_than_ns=FOREVER)
    with pytest.raises(ObjectMissing):
        engine.open(filehash)


def test_putting_again_renews_the_time(engine: Engine) -> None:
    filehash, content = sample(100)
    engine.put(filehash, content, FACTS)
    time.sleep(1.1 if engine.label == "s3" else 0.01)
    looked = time.time_ns()
    engine.put(filehash, content, FACTS)
    assert not engine.delete(filehash, not_newer_than_ns=looked)


def test_list(engine: Engine) -> None:
    wanted = {}
    begun = time.time_ns()
    for size in (0, 5, 70_000):
        filehash, content = sample(size)
        engine.put(filehash, content, FACTS)
        wanted[filehash] = size
    entries = list(engine.list())
    assert {entry.filehash: entry.size for entry in entries} == wanted
    assert len(entries) == 3
    for entry in entries:
        assert begun <= entry.mtime_ns <= time.time_ns() + 1_000_000_000


def test_an_open_object_outlives_its_deletion(engine: Engine) -> None:
    """As far as a client can tell: whole bytes or an error, never a short end in silence."""
    filehash, content = sample(3 * PIECE)
    engine.put(filehash, content, FACTS)
    with engine.open(filehash) as stored:
        engine.delete(filehash, not_newer_than_ns=FOREVER)
        try:
            assert b"".join(stored.pieces(0, stored.size)) == content
        except (ObjectMissing, ContentMismatch):
            assert engine.label == "s3"


def test_many_putting_the_same_at_once(engine: Engine) -> None:
    filehash, content = sample(200_000)
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.append(engine.put(filehash, content, FACTS))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert answers.count(True) >= 1
    if engine.label != "s3" or getattr(engine, "_creates", False):
        assert answers.count(True) == 1
    assert read(engine, filehash) == content
    assert not [file for file in engine.spools.path.iterdir() if file.name != "lock"]
