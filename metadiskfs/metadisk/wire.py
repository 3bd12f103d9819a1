"""The web-core protocol as pure functions: links, routes, the convergent cipher.

The cipher is the one of the original servers, bit for bit (docs/PROTOCOL.md has the vectors)::

    key        = HMAC-SHA256("Something old, something new.", ascii hex of SHA-256(plaintext))
    ciphertext = AES-256-CTR(plaintext), 128-bit big-endian counter, one stream, no header, no padding
    filehash   = SHA-256(ciphertext)

Two generations of servers differ in where the counter starts, 0 (until 2014-09) or 1. Nothing here does I/O;
everything is safe to call from any thread.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Protocol, Self

from metadiskfs.errors import UsageError

PASSPHRASE = b"Something old, something new."
COUNTER_STARTS = (0, 1)
"""Where the two generations of servers let the AES counter start; our node uses the first."""

BLOCK_SIZE = 128 * 1024
"""Bytes of plaintext under one block digest: the unit in which a part of a chunk can be proven."""
BLOCK_DIGEST_SIZE = 16
CIPHER_SLACK = 15
"""Bytes: the library asks for as much room behind its output as if the cipher padded."""

UNPROVEN = "unproven"
"""Token of a Prefer header (RFC 7240): the client proves what it gets itself, the node need not read it all first."""

TOKEN_ROUTE = "/accounts/token/new"
UPLOAD_ROUTE = "/api/upload"
DOWNLOAD_ROUTE = "/api/download/"
FIND_ROUTE = "/api/find/"
STATUS_ROUTE = "/api/status"

_FILEHASH = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[0-9A-Fa-f]{64}")
_LINK = re.compile(r"(?:https?://[^/\s]+(?:/[^/\s]+)*?/api/download/)?([0-9a-f]{64})\?key=([0-9A-Fa-f]{64})")


def is_filehash(text: str) -> bool:
    """Filehashes match exactly: 64 lower-case hex digits."""
    return _FILEHASH.fullmatch(text) is not None


def is_key(text: str) -> bool:
    """Keys match in either case."""
    return _KEY.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Link:
    """``<filehash>?key=<key>``: what anyone needs to fetch and open one object. Both in lower-case hex."""

    filehash: str
    key: str

    def __str__(self) -> str:
        return f"{self.filehash}?key={self.key}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a bare link or a whole download URL. Raises UsageError."""
        match = _LINK.fullmatch(text.strip())
        if not match:
            raise UsageError("not a link of the form <filehash>?key=<key>, 64 hex digits each")
        return cls(match[1], match[2].lower())


class CipherStream(Protocol):
    """AES-CTR from some position on: encrypting and decrypting are the same act."""

    def update(self, data: bytes | memoryview) -> bytes: ...

    def update_into(self, data: memoryview, buffer: memoryview) -> int:
        """``buffer`` may begin where ``data`` does, and has CIPHER_SLACK bytes more."""
        ...


def convergent_key(plaintext_sha256: bytes) -> bytes:
    """Derive the 32-byte key from the digest of the whole plaintext."""
    return hmac.digest(PASSPHRASE, plaintext_sha256.hex().encode("ascii"), "sha256")


def cipher_stream(key: bytes, *, offset: int = 0, counter_start: int = 0) -> CipherStream:
    """Open the stream at byte ``offset`` of the object. ``key`` has 32 bytes."""
    # Imported at its first use: the mount itself hardly ever encrypts, and the library takes 10 MiB of it.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    counter = (counter_start + offset // 16) % (1 << 128)
    stream = Cipher(algorithms.AES(key), modes.CTR(counter.to_bytes(16, "big"))).encryptor()
    if offset % 16:
        stream.update(bytes(offset % 16))
    return stream


def block_digest(block: bytes | memoryview) -> bytes:
    """Digest of one block of plaintext: SHA-256 cut to 16 bytes."""
    return hashlib.sha256(block).digest()[:BLOCK_DIGEST_SIZE]


def link_of(plaintext: bytes, *, counter_start: int = 0) -> Link:
    """The link any node of that generation gives this content. For small contents: it is held whole."""
    key = convergent_key(hashlib.sha256(plaintext).digest())
    ciphertext = cipher_stream(key, counter_start=counter_start).update(plaintext)
    return Link(hashlib.sha256(ciphertext).hexdigest(), key.hex())
