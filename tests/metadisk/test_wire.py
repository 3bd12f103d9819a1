"""The cipher against the published vectors, and links."""

import hashlib

import pytest

from metadiskfs.errors import UsageError
from metadiskfs.metadisk import wire

VECTORS = [
    (
        b"test data\n",
        "31292df8fd0ec1d5c3904fc12a4c90ca1f2425e0aaad1e6171970fddb904a823",
        "0c12e76f671e6056b3be9af526acf1f6ca3d42d9066c811c9bceae560f3791cc",
        "24964d35afac92d8244e230df5be5b7c989aaca6cc3cd94795e414ff34a68022",
    ),
    (
        b"",
        "db1e68eb95e8dcf0164289309c3989f2ab007eddaeb39363d8f000ee0fc2f5ce",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ),
    (
        bytes(1 << 20),
        "94f3b1d91b1a231423c571fcd17e0b9b9f88255537dfe32436b508dfd4d4b534",
        "a619edb8ce89ebf13babbf29b9295de6ac9390aaf5741d4866975ccbe35aefe8",
        "6befe688dc03be7022669399a4748505b9f9a7c08ccbd5e9a7c80b30ef3c6bfd",
    ),
]


@pytest.mark.parametrize(("plaintext", "key", "from_zero", "from_one"), VECTORS)
def test_published_vectors(plaintext: bytes, key: str, from_zero: str, from_one: str) -> None:
    assert wire.link_of(plaintext) == wire.Link(from_zero, key)
    assert wire.link_of(plaintext, counter_start=1) == wire.Link(from_one, key)


@pytest.mark.parametrize("counter_start", wire.COUNTER_STARTS)
@pytest.mark.parametrize("offset", [0, 1, 15, 16, 17, 4095, 131072, 131073])
def test_the_stream_opens_anywhere(offset: int, counter_start: int) -> None:
    plaintext = hashlib.shake_256(b"seek").digest(200_000)
    key = wire.convergent_key(hashlib.sha256(plaintext).digest())
    ciphertext = wire.cipher_stream(key, counter_start=counter_start).update(plaintext)
    opened = wire.cipher_stream(key, offset=offset, counter_start=counter_start).update(ciphertext[offset:])
    assert opened == plaintext[offset:]


def test_the_counter_wraps() -> None:
    key = bytes(32)
    whole = wire.cipher_stream(key, counter_start=(1 << 128) - 1).update(bytes(48))
    assert wire.cipher_stream(key, counter_start=0).update(bytes(32)) == whole[16:]


def test_links_are_read_bare_and_as_urls() -> None:
    link = wire.link_of(b"test data\n")
    for text in (
        str(link),
        f"  {link}\n",
        f"http://127.0.0.1:8014/api/download/{link}",
        f"https://x.example/base/api/download/{link}",
        f"{link.filehash}?key={link.key.upper()}",
    ):
        assert wire.Link.parse(text) == link


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "0" * 64,
        "A" * 64 + "?key=" + "0" * 64,
        "0" * 64 + "?key=" + "g" * 64,
        "0" * 65 + "?key=" + "0" * 64,
    ],
)
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        wire.Link.parse(text)
