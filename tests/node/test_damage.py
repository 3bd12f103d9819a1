"""Objects that rotted, disks that are full, stores that went away: errors, never wrong bytes."""

import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import falcon.testing
import pytest
import requests

from metadiskfs.errors import NodeUnreachable
from metadiskfs.metadisk import wire
from metadiskfs.node.process import open_parts
from metadiskfs.node.server import Parts, build
from metadiskfs.node.settings import NodeSettings
from tests.node.node_process import RunningNode, StartNode, multipart, run_cli


def upload(node: RunningNode, content: bytes) -> tuple[wire.Link, Path]:
    link = wire.Link(**requests.post(node.url + "/api/upload", files={"file": content}, timeout=30).json())
    return link, node.store / "objects" / link.filehash[:2] / link.filehash


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.parametrize("size", [1000, 300_000, 20_000_000])
def test_a_flipped_bit_is_an_error_and_an_upload_heals_it(node: RunningNode, size: int) -> None:
    content = random.Random(f"rot{size}").randbytes(size)
    link, path = upload(node, content)
    url = f"{node.url}/api/download/{link.filehash}"
    assert requests.get(url, params={"key": link.key}, timeout=30).content == content
    flip(path, size - 1)
    for params in ({"key": link.key}, {}):
        for headers in ({}, {"Range": "bytes=0-9"}):
            answer = requests.get(url, params=params, headers=headers, timeout=30)
            assert (answer.status_code, answer.json()) == (500, {"error": "error-downloading-file"})
    assert f"object {link.filehash} is damaged" in node.log_text()
    metrics = requests.get(node.url + "/metrics", timeout=10).text
    assert int(metrics.partition("\nmetadisk_objects_damaged_total ")[2].split()[0]) >= 4
    upload(node, content)
    assert requests.get(url, params={"key": link.key}, timeout=30).content == content


def test_a_cut_object_is_an_error(node: RunningNode) -> None:
    for size in (500_000, 12_000_000):
        link, path = upload(node, random.Random(f"cut{size}").randbytes(size))
        os.truncate(path, size - 1)
        assert requests.get(f"{node.url}/api/download/{link}", timeout=30).status_code == 500


def test_check_names_what_is_damaged_and_changes_nothing(start_node: StartNode) -> None:
    node = start_node()
    links = [upload(node, b"%d" % number * 1000) for number in range(5)]
    whole = run_cli("node", "check", "--store", str(node.store))
    assert (whole.returncode, whole.stdout) == (0, "")
    assert "5 objects" in whole.stderr
    flip(links[3][1], 5)
    os.truncate(links[1][1], 3)
    checked = run_cli("node", "check", "--store", str(node.store))
    assert checked.returncode == 4
    assert {line.split()[0] for line in checked.stdout.splitlines()} == {links[3][0].filehash, links[1][0].filehash}
    assert "2 damaged" in checked.stderr
    assert all(path.exists() for _, path in links)


Client = falcon.testing.TestClient


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[tuple[Client, Parts]]:
    """The application without a process around it, to break its parts on purpose."""
    settings = NodeSettings(store=str(tmp_path), state_dir=tmp_path)
    parts = open_parts(settings)
    yield falcon.testing.TestClient(build(settings, parts)._app), parts  # type: ignore[arg-type]
    parts.close()


def post(client: Client, content: bytes) -> falcon.testing.Result:
    form = multipart([(b'name="file"; filename="a"', content)])
    return client.simulate_post(
        "/api/upload", body=form, headers={"Content-Type": "multipart/form-data; boundary=edge"}
    )


@pytest.mark.parametrize("place", ["put", "spool"])
def test_a_full_disk_is_507_and_reads_go_on(
    inside: tuple[Client, Parts], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    client, parts = inside
    good = post(client, b"before").json

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"put": (parts.engine, "put"), "spool": (os, "pwrite")}[place], full)
    refused = post(client, bytes(9_000_000))
    assert (refused.status_code, refused.json) == (507, {"error": "insufficient-storage"})
    got = client.simulate_get(f"/api/download/{good['filehash']}", params={"key": good["key"]})
    assert (got.status_code, got.content) == (200, b"before")
    monkeypatch.undo()
    assert post(client, b"after").status_code == 201
    assert not [file for file in parts.engine.spools.path.iterdir() if file.name != "lock"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(NodeUnreachable("gone"), 503), (OSError(errno.EIO, "I/O error"), 500), (RuntimeError("x"), 500)],
)
def test_a_store_that_fails(
    inside: tuple[Client, Parts], monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    client, parts = inside

    def fail(*_: object) -> None:
        raise error

    for method in ("put", "open", "usage"):
        monkeypatch.setattr(parts.engine, method, fail)
    refused = post(client, b"x")
    assert (refused.status_code, refused.json) == (status, {"error": "upload-error"})
    got = client.simulate_get("/api/download/" + "0" * 64)
    assert (got.status_code, got.json) == (status, {"error": "error-downloading-file"})
    if not isinstance(error, RuntimeError):
        assert client.simulate_get("/healthz").status_code == 503


def test_metrics_are_prometheus_text(inside: tuple[Client, Parts]) -> None:
    client, _ = inside
    post(client, b"x")
    text = client.simulate_get("/metrics").text
    assert 'metadisk_requests_total{route="upload",status="201"} 1\n' in text
    assert "metadisk_objects_stored_total 1\n" in text
    assert "metadisk_objects_damaged_total 0\n" in text
    for line in text.splitlines():
        assert line.startswith("# TYPE metadisk_") or float(line.rpartition(" ")[2]) >= 0
    assert json.dumps(text)
