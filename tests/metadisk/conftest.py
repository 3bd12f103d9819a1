"""A node that can be made to fail, and a patient way to wait."""

import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadiskfs.metadisk.client import Client
from tests.metadisk.bad_node import BadNode


@pytest.fixture
def node() -> Iterator[BadNode]:
    with BadNode() as node:
        yield node


@pytest.fixture
def client(node: BadNode) -> Iterator[Client]:
    client = Client(node.url, connect_timeout=1, read_timeout=0.4)
    yield client
    client.close()


@pytest.fixture
def noise(request: pytest.FixtureRequest) -> Callable[[int], bytes]:
    """Random bytes that are the same each time a test runs."""
    source = random.Random(request.node.nodeid)
    return source.randbytes


@pytest.fixture
def chunk(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / hashlib.sha256(content).hexdigest()
        if not path.exists():  # else it may be on its way to the node
            path.write_bytes(content)
        return path

    return write


def until(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Wait for something to come true; fail when it does not."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_secrets_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No key and no token is ever logged."""
    caplog.set_level(logging.DEBUG, logger="metadiskfs")
    yield
    for record in caplog.records:
        if record.name.startswith("metadiskfs"):
            assert "key=" not in record.getMessage()
            assert "token0" not in record.getMessage()
