"""Nodes and mounts over a real Ceph cluster (scripts/test-ceph starts it): a disk of three dies, nothing is lost."""

import hashlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from metadiskfs.metadisk import wire
from tests.conftest import Mount
from tests.engines.s3_server import BUCKET
from tests.node.node_process import RunningNode

CLUSTER = os.environ.get("METADISKFS_CEPH", "")
pytestmark = pytest.mark.ceph


def ceph(*arguments: str) -> str:
    script = Path(__file__).with_name("ceph.sh")
    return subprocess.run(
        [str(script), arguments[0], CLUSTER, *arguments[1:]], check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.fixture
def nodes(s3_env: dict[str, str], tmp_path: Path) -> Iterator[list[RunningNode]]:
    """Two nodes over one bucket."""
    started: list[RunningNode] = []
    try:
        for name in ("a", "b"):
            folder = tmp_path / name
            store = f"s3://{BUCKET}/{tmp_path.name}"
            started.append(RunningNode(folder, "--state", str(folder / "state"), store=store, env=s3_env))
        yield started
    finally:
        for node in started:
            node.end()


def upload(node: RunningNode, content: bytes) -> wire.Link:
    """Put it, as patiently as a client: an OSD that dies makes the gateway wait for a while."""
    until = time.monotonic() + 90
    while True:
        try:
            answer = requests.post(node.url + "/api/upload", files={"file": content}, timeout=60)
        except requests.RequestException:
            answer = None
        if answer is not None and answer.status_code == 201:
            return wire.Link(**answer.json())
        assert time.monotonic() < until, answer and answer.text
        time.sleep(0.5)


def download(node: RunningNode, link: wire.Link) -> bytes:
    until = time.monotonic() + 90
    while True:
        try:
            answer = requests.get(f"{node.url}/api/download/{link}", timeout=60)
            if answer.status_code == 200:
                return answer.content
            assert answer.status_code >= 500, f"{answer.status_code}: {answer.text}"
        except requests.RequestException:
            pass
        assert time.monotonic() < until
        time.sleep(0.5)


def test_two_nodes_share_one_bucket(nodes: list[RunningNode]) -> None:
    for size in (0, 10, 5_000_000, 20_000_000):
        content = random.Random(size).randbytes(size)
        link = upload(nodes[0], content)
        assert link == wire.link_of(content)
        assert download(nodes[1], link) == content
        part = requests.get(f"{nodes[1].url}/api/download/{link}", headers={"Range": "bytes=3-7"}, timeout=60)
        assert part.status_code == (206 if size else 416)
        found = requests.get(f"{nodes[1].url}/api/find/{link.filehash}", timeout=60).json()
        assert (found["filesize"], found["uploads"][0]["host_name"]) == (size, "s3")


def test_an_osd_dies_in_the_middle(nodes: list[RunningNode]) -> None:
    chance = random.Random("osd")
    contents = [chance.randbytes(chance.choice([4096, 100_000, 4 << 20])) for _ in range(80)]
    links: dict[int, wire.Link] = {}
    wrong: list[int] = []

    def work(first: int) -> None:
        for number in range(first, len(contents), 4):
            links[number] = upload(nodes[number % 2], contents[number])
            if download(nodes[(number + 1) % 2], links[number]) != contents[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    while len(links) < 20:
        time.sleep(0.05)
    ceph("osd-kill", "1")
    killed_at = len(links)
    try:
        for thread in threads:
            thread.join()
        assert killed_at < len(contents), "the OSD died too late to matter"
        assert not wrong
        for number, link in links.items():
            assert hashlib.sha256(download(nodes[0], link)).digest() == hashlib.sha256(contents[number]).digest()
    finally:
        ceph("osd-start", "1")


def test_mounts_over_two_nodes(nodes: list[RunningNode], make_mount: Callable[..., Mount], tmp_path: Path) -> None:
    """A volume on each node; files written, the caches dropped, an OSD killed, all read again; links cross over."""
    mounts = [make_mount("--node", node.url, volume=name, name=name) for node, name in zip(nodes, "ab", strict=True)]
    for mount in mounts:
        mount.start()
    files = {f"f{number}": random.Random(number).randbytes(number * 700_000 + 1) for number in range(12)}
    for mount in mounts:
        (mount / "folder").mkdir()
        for name, content in files.items():
            (mount / f"folder/{name}").write_bytes(content)
    ceph("osd-kill", "2")
    try:
        for mount in mounts:
            mount.run("sync", str(mount.path))
            mount.clear_cache()
            for name, content in files.items():
                assert (mount / f"folder/{name}").read_bytes() == content, name
        lines = mounts[0].run("link", str(mounts[0] / "folder/f11")).stdout.split()
        assert b"".join(download(nodes[1], wire.Link.parse(line)) for line in lines) == files["f11"]
    finally:
        ceph("osd-start", "2")
    for mount in mounts:
        mount.unmount()
