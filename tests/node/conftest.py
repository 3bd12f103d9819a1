from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.node_process import RunningNode, StartNode


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """A plain node shared by the tests of a module."""
    running = RunningNode(tmp_path_factory.mktemp("node"), "--max-file-size", "64M")
    yield running
    running.end()


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    """Starts nodes of the test's own; all are ended with it. The same ``name`` means the same folder."""
    started: list[RunningNode] = []

    def start(*options: str, name: str = "node", **more: object) -> RunningNode:
        started.append(RunningNode(tmp_path / name, *options, **more))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for running in started:
        running.end()
