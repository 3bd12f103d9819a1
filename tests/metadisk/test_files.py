"""Whole files by link, without a volume."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from metadiskfs.errors import ContentMismatch, NodeUnreachable, ObjectMissing, ObjectTooLarge
from metadiskfs.metadisk import wire
from metadiskfs.metadisk.body import PIECE
from metadiskfs.metadisk.client import Client
from metadiskfs.metadisk.files import download, upload_part
from tests.metadisk.bad_node import BadNode

Noise = Callable[[int], bytes]


def fetched(client: Client, link: wire.Link, **options: int) -> bytes:
    out = io.BytesIO()
    download(client, link, out, deadline=1, patience=0.4, **options)
    return out.getvalue()


@pytest.mark.parametrize("size", [0, 10, PIECE, 3 * PIECE + 7])
def test_there_and_back(client: Client, tmp_path: Path, noise: Noise, size: int) -> None:
    path, content, seen = tmp_path / "file", noise(size), [0]
    path.write_bytes(content)
    with path.open("rb") as file:
        receipt = upload_part(client, file.fileno(), size=size, progress=seen.append)
    assert receipt.link == wire.link_of(content)
    assert seen[-1] == size
    assert fetched(client, receipt.link) == content


def test_the_published_transcript(client: Client, node: BadNode) -> None:
    link = node.put(b"test data\n")
    assert link.filehash == "0c12e76f671e6056b3be9af526acf1f6ca3d42d9066c811c9bceae560f3791cc"
    assert fetched(client, link) == b"test data\n"


@pytest.mark.parametrize("size", [0, 10, 16, 3 * PIECE + 7])
def test_either_generation_of_node(client: Client, node: BadNode, noise: Noise, size: int) -> None:
    node.counter_start = 1
    content = noise(size)
    link, out = node.put(content), io.BytesIO()
    assert download(client, link, out) == (1 if size else 0)
    assert out.getvalue() == content


@pytest.mark.parametrize("lengths", ["length", "chunked", "none"])
def test_a_broken_line(client: Client, node: BadNode, noise: Noise, lengths: str) -> None:
    node.lengths = lengths
    content = noise(900_000)
    link = node.put(content)
    node.fail("download", "reset:300000", times=2)
    assert fetched(client, link) == content


def test_what_is_cut_off_without_a_word_does_not_prove(client: Client, node: BadNode, noise: Noise) -> None:
    """Without a length nothing but the filehash tells."""
    node.lengths = "none"
    link = node.put(noise(900_000))
    node.fail("download", "truncate:300000")
    with pytest.raises(ContentMismatch):
        fetched(client, link)


def test_altered_bytes(client: Client, node: BadNode, noise: Noise) -> None:
    link = node.put(noise(900_000))
    node.fail("download", "alter:700000")
    with pytest.raises(ContentMismatch, match="not that object"):
        fetched(client, link)


def test_a_wrong_key_is_no_noise(client: Client, node: BadNode) -> None:
    link = node.put(b"content")
    wrong = wire.Link(link.filehash, hashlib.sha256(b"guess").hexdigest())
    with pytest.raises(ContentMismatch, match="key"):
        fetched(client, wrong)
    assert not any(wrong.key in request.path for request in node.requests)


def test_an_endless_object(client: Client, node: BadNode) -> None:
    node.fail("download", "endless")
    with pytest.raises(ContentMismatch, match="does not end"):
        fetched(client, wire.link_of(b"x"), limit=10_000_000)


def test_missing_and_silent(client: Client, node: BadNode) -> None:
    with pytest.raises(ObjectMissing):
        fetched(client, wire.link_of(b"nowhere"))
    node.fail("download", "hang", times=-1)
    with pytest.raises(NodeUnreachable):
        fetched(client, wire.link_of(b"nowhere"))


def test_too_large_for_the_node(client: Client, node: BadNode, tmp_path: Path, noise: Noise) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(2_000_000))
    fd = os.open(path, os.O_RDONLY)
    try:
        node.fail("upload", "early:413")
        with pytest.raises(ObjectTooLarge):
            upload_part(client, fd, size=2_000_000)
        part = upload_part(client, fd, offset=500_000, size=700_000)
        assert fetched(client, part.link) == path.read_bytes()[500_000:1_200_000]
    finally:
        os.close(fd)
