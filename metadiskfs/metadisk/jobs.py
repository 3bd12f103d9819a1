"""What passes between the mount and its transfer process: jobs one way, results the other.

Both run over SOCK_SEQPACKET socket pairs, one for uploads and one for fetches, so that a read never waits behind
the upload queue. A message is a JSON array of jobs, or of results; the kernel keeps message borders and hands each
message to whichever worker thread is waiting. Values only, no behaviour: the store room may import this module.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

MAX_MESSAGE = 128 * 1024
"""Bytes. Block digests are the largest part: 16 bytes (32 in hex) per 128 KiB of chunk."""


class UploadJob(NamedTuple):
    """Put the chunk file at ``path`` on the node.

    ``sha256`` (hex) and ``size`` (bytes) are what the file must prove to be before its last byte is sent.
    """

    id: int
    path: str
    sha256: str
    size: int


class UploadResult(NamedTuple):
    """``error`` is "" and the receipt proven, or the name of a class in errors.py and why.

    ``blocks`` are the concatenated block digests (wire.block_digest) of the plaintext in hex, "" for a chunk of one
    block: its own SHA-256 proves it. ``retry_after``: seconds the node asked for.
    """

    id: int
    filehash: str = ""
    key: str = ""
    counter_start: int = 0
    blocks: str = ""
    error: str = ""
    message: str = ""
    retry_after: float | None = None


class FetchJob(NamedTuple):
    """Bring one object as plaintext into the file at ``path`` (created by the worker, 0600), starting at a block.

    The download begins at block ``first`` and runs to the end; what lies before follows afterwards. Every block is
    proven (by its digest, or where ``blocks`` is "" by the SHA-256 of the whole) before it is announced. ``ahead``:
    nobody waits for it yet.
    """

    id: int
    path: str
    filehash: str
    key: str
    counter_start: int
    sha256: str
    size: int
    blocks: str = ""
    first: int = 0
    ahead: bool = False


class FetchResult(NamedTuple):
    """Blocks ``start`` to ``stop`` (exclusive) are in the file and proven; ``done`` when that is all of them.

    The first block wanted is announced at once, later ones every few blocks. On ``error`` (see UploadResult) the
    job is over and the worker has removed the file; blocks announced before stay readable through open descriptors.
    """

    id: int
    start: int = 0
    stop: int = 0
    done: bool = False
    error: str = ""
    message: str = ""


class TransferSettings(NamedTuple):
    """First message on the upload socket: whom to talk to, and how patiently.

    ``token`` is fixed for an embedded node, "" where the worker is to ask the node for one. Times in seconds;
    ``read_deadline`` bounds one fetch from its start to its first proven block, retries included.
    ``ca_file``: whose certificates an https node may have, "" for the usual authorities.
    """

    url: str
    token: str = ""
    connect_timeout: float = 5.0
    read_timeout: float = 20.0
    read_deadline: float = 30.0
    ca_file: str = ""


M = TypeVar("M", UploadJob, UploadResult, FetchJob, FetchResult, TransferSettings)


def encode(values: Sequence[M]) -> bytes:
    """One message. Tuples and arrays without names: half of what a small upload cost the mount was its JSON."""
    return json.dumps(values, separators=(",", ":")).encode()


def decode(kind: type[M], message: bytes) -> list[M]:
    return [kind(*fields) for fields in json.loads(message)]
