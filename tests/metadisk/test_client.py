"""The client against a node that fails in every way named in the design."""

import hashlib
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metadiskfs.errors import (
    BalanceInsufficient,
    ChunkDamaged,
    ContentMismatch,
    NodeBusy,
    NodeError,
    NodeRefused,
    NodeUnreachable,
    ObjectMissing,
    ObjectTooLarge,
    UsageError,
)
from metadiskfs.metadisk import wire
from metadiskfs.metadisk.body import PIECE, Source, filehash_of
from metadiskfs.metadisk.client import Client, Receipt
from tests.metadisk.bad_node import BadNode

Write = Callable[[bytes], Path]
SIZES = [0, 1, 4096, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 1_000_003]


@contextmanager
def source(path: Path, content: bytes) -> Iterator[Source]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield Source(fd, len(content), hashlib.sha256(content).digest())
    finally:
        os.close(fd)


def upload(client: Client, path: Path, content: bytes, **options: object) -> Receipt:
    with source(path, content) as it:
        return client.upload(it, **options)  # type: ignore[arg-type]


# -- uploads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_an_upload_arrives_and_its_receipt_is_proven(
    client: Client, node: BadNode, chunk: Write, noise: Callable[[int], bytes], size: int
) -> None:
    content = noise(size)
    receipt = upload(client, chunk(content), content, want_blocks=True)
    assert receipt.link == wire.link_of(content)
    assert receipt.counter_start == 0
    blocks = [content[at : at + wire.BLOCK_SIZE] for at in range(0, size, wire.BLOCK_SIZE)]
    assert receipt.blocks == (b"".join(map(wire.block_digest, blocks)) if len(blocks) > 1 else b"")
    assert node.objects[receipt.link.filehash] == wire.cipher_stream(bytes.fromhex(receipt.link.key)).update(content)


def test_a_part_of_a_file(client: Client, chunk: Write, noise: Callable[[int], bytes]) -> None:
    content = noise(900_000)
    fd = os.open(chunk(content), os.O_RDONLY)
    try:
        part = content[100_000:500_000]
        assert client.upload(Source(fd, 400_000, hashlib.sha256(part).digest(), 100_000)).link == wire.link_of(part)
    finally:
        os.close(fd)


def test_each_upload_has_a_name_and_a_boundary_of_its_own(client: Client, node: BadNode, chunk: Write) -> None:
    path = chunk(b"same")
    for _ in range(20):
        upload(client, path, b"same")
    uploads = [request for request in node.requests if request.route == "upload"]
    names = {request.form["filename"] for request in uploads}
    assert len(names) == 20
    assert all(len(name) == 32 and name.isascii() and name.isalnum() for name in names)
    assert len({request.headers["content-type"] for request in uploads}) == 20
    assert not any("transfer-encoding" in request.headers for request in uploads)


def test_a_retry_is_an_upload_of_its_own(client: Client, node: BadNode, chunk: Write) -> None:
    node.fail("upload", "status:500", times=2)
    assert upload(client, chunk(b"again"), b"again").link == wire.link_of(b"again")
    assert node.count("upload") == 3


def test_connections_are_kept(client: Client, node: BadNode, chunk: Write) -> None:
    for number in range(10):
        content = b"%d" % number
        link = upload(client, chunk(content), content).link
        assert client.exists(link.filehash)
    assert node.connections == 1


@pytest.mark.parametrize("said", [True, False])
def test_a_node_that_closes_each_connection(client: Client, node: BadNode, chunk: Write, said: bool) -> None:
    if said:
        node.keep_alive = False
    else:
        node.fail("upload", "close", times=-1)
    for number in range(8):
        content = b"%d" % number
        assert upload(client, chunk(content), content).link == wire.link_of(content)


def test_counter_start_one_is_proven_and_remembered(
    client: Client, node: BadNode, chunk: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.counter_start = 1
    passes: list[int] = []

    def counted(source: Source, *, key: bytes, counter_start: int) -> str:
        passes.append(counter_start)
        return filehash_of(source, key=key, counter_start=counter_start)

    monkeypatch.setattr("metadiskfs.metadisk.client.filehash_of", counted)
    for content in (b"first", b"second", b"third"):
        receipt = upload(client, chunk(content), content)
        assert receipt.counter_start == 1
        assert receipt.link == wire.link_of(content, counter_start=1)
    assert passes == [0, 1]


@pytest.mark.parametrize("counter_start", [0, 1])
def test_another_passphrase_is_proven_by_the_key_it_returns(
    client: Client, node: BadNode, chunk: Write, counter_start: int
) -> None:
    node.passphrase, node.counter_start = b"Something else.", counter_start
    receipt = upload(client, chunk(b"x" * 1000), b"x" * 1000)
    assert receipt.counter_start == counter_start
    opened = wire.cipher_stream(bytes.fromhex(receipt.link.key), counter_start=counter_start)
    assert opened.update(node.objects[receipt.link.filehash]) == b"x" * 1000


@pytest.mark.parametrize("lie", ["filehash", "key", "empty", "words"])
def test_a_receipt_that_does_not_prove(client: Client, node: BadNode, chunk: Write, lie: str) -> None:
    node.fail("upload", f"receipt:{lie}")
    with pytest.raises(ContentMismatch):
        upload(client, chunk(b"mine"), b"mine")


@pytest.mark.parametrize("answer", ["receipt:html", "receipt:list", "html:200", "html:404", "status:400"])
def test_what_is_no_receipt_at_all(client: Client, node: BadNode, chunk: Write, answer: str) -> None:
    node.fail("upload", answer)
    with pytest.raises(NodeRefused):
        upload(client, chunk(b"mine"), b"mine")


def test_an_acknowledgement_before_the_body_is_none(
    client: Client, node: BadNode, chunk: Write, noise: Callable[[int], bytes]
) -> None:
    node.fail("upload", "ack-early", times=-1)
    content = noise(20 << 20)
    with pytest.raises(ContentMismatch, match="before"):
        upload(client, chunk(content), content)


@pytest.mark.parametrize("size", [100, 2 << 20])
def test_a_damaged_chunk_is_never_sent_whole(
    client: Client, node: BadNode, chunk: Write, noise: Callable[[int], bytes], size: int
) -> None:
    content = noise(size)
    path = chunk(content)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ChunkDamaged):
        upload(client, path, content)
    time.sleep(0.05)
    assert not node.objects
    assert not any(request.complete and request.form for request in node.requests if request.route == "upload")
    path.write_bytes(content[:-1])
    with pytest.raises(ChunkDamaged):
        upload(client, path, content)
    path.write_bytes(content)
    assert upload(client, path, content).link == wire.link_of(content)


@pytest.mark.parametrize("fault", ["early:413", "early-hold:413", "status:413"])
@pytest.mark.parametrize("size", [100, 20 << 20])
def test_too_large_is_heard_while_still_sending(
    client: Client,
    node: BadNode,
    chunk: Write,
    noise: Callable[[int], bytes],
    caplog: pytest.LogCaptureFixture,
    fault: str,
    size: int,
) -> None:
    node.fail("upload", fault)
    content = noise(size)
    path, begun = chunk(content), time.monotonic()
    with pytest.raises(ObjectTooLarge):
        upload(client, path, content)
    if fault == "early-hold:413" and size > PIECE:  # this line's patience is 2.9 s
        assert time.monotonic() - begun < 2.4, "it waited for the line to time out"
    caplog.clear()
    assert upload(client, chunk(b"small"), b"small").link == wire.link_of(b"small")
    if fault == "early-hold:413" and size > PIECE:
        assert "trying again" not in caplog.text, "it used a connection that still owed a body"


@pytest.mark.parametrize("fault", ["reset", "reset:0", "reset:100000", "hang:100000", "hang", "drip", "endless"])
def test_an_upload_that_breaks_off_is_tried_again(
    client: Client, node: BadNode, chunk: Write, noise: Callable[[int], bytes], fault: str
) -> None:
    content = noise(1 << 20)
    node.fail("upload", fault)
    if fault == "endless":
        with pytest.raises(NodeRefused, match="does not stop"):
            upload(client, chunk(content), content)
    elif fault == "drip":
        with pytest.raises(NodeUnreachable):
            upload(client, chunk(content), content, tries=1)
    else:
        assert upload(client, chunk(content), content).link == wire.link_of(content)


def test_a_dripping_answer_ends_with_the_deadline(node: BadNode, chunk: Write) -> None:
    node.fail("upload", "drip", times=-1)
    begun = time.monotonic()
    with pytest.raises(NodeUnreachable):
        upload(Client(node.url, read_timeout=0.2), chunk(b"x"), b"x", tries=2)
    assert time.monotonic() - begun < 2


def test_tries_come_to_an_end(client: Client, node: BadNode, chunk: Write) -> None:
    node.fail("upload", "status:503", times=-1)
    with pytest.raises(NodeBusy):
        upload(client, chunk(b"x"), b"x", tries=3)
    assert node.count("upload") == 3


def test_retry_after_is_honoured_within_the_deadline_and_told_beyond(
    client: Client, node: BadNode, chunk: Write
) -> None:
    node.fail("upload", "status:429:1")
    begun = time.monotonic()
    upload(client, chunk(b"x"), b"x")
    assert time.monotonic() - begun >= 1
    node.fail("upload", "status:429:500")
    with pytest.raises(NodeBusy) as caught:
        upload(client, chunk(b"x"), b"x")
    assert caught.value.retry_after == 500


@pytest.mark.parametrize(
    ("header", "seconds"), [("999999999", 3600), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("-5", None)]
)
def test_retry_after_of_any_kind(
    client: Client, node: BadNode, chunk: Write, header: str, seconds: float | None
) -> None:
    node.fail("upload", f"status:429:{header}")
    with pytest.raises(NodeBusy) as caught:
        upload(client, chunk(b"x"), b"x", tries=1)
    assert caught.value.retry_after == seconds


def test_refused_connections_are_unreachable(chunk: Write) -> None:
    with BadNode() as gone:
        url = gone.url
    with pytest.raises(NodeUnreachable, match="refused"):
        upload(Client(url), chunk(b"x"), b"x")


def test_redirects_are_not_followed(client: Client, node: BadNode, chunk: Write) -> None:
    with BadNode() as other:
        link = other.put(b"elsewhere")
        for route in ("upload", "download", "status"):
            node.fail(route, f"redirect:{other.url}{wire.DOWNLOAD_ROUTE}{link.filehash}")
        with pytest.raises(NodeRefused, match="redirect"):
            upload(client, chunk(b"x"), b"x")
        with pytest.raises(NodeRefused, match="redirect"):
            client.exists(link.filehash)
        with pytest.raises(NodeRefused, match="redirect"):
            client.status()
        assert not other.requests


# -- tokens ---------------------------------------------------------------------------------------------------------


def test_one_token_for_all_threads(client: Client, node: BadNode, chunk: Write) -> None:
    node.fail("token", "slow:0.1")
    contents = [b"%d" % number for number in range(8)]
    threads = [threading.Thread(target=upload, args=(client, chunk(each), each)) for each in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert node.tokens_given == 1
    assert {request.form["token"] for request in node.requests if request.route == "upload"} == {"token00000000001"}
    assert set(node.objects) == {wire.link_of(each).filehash for each in contents}


def test_a_node_without_tokens(client: Client, node: BadNode, chunk: Write) -> None:
    node.fail("token", "html:404", times=-1)
    upload(client, chunk(b"x"), b"x")
    upload(client, chunk(b"y"), b"y")
    assert node.count("token") == 1
    assert all("token" not in request.form for request in node.requests)


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_token_the_node_forgot_is_renewed(client: Client, node: BadNode, chunk: Write, status: int) -> None:
    upload(client, chunk(b"x"), b"x")
    node.good_tokens, node.token_status = {"token00000000002"}, status
    upload(client, chunk(b"y"), b"y")
    assert node.tokens_given == 2


def test_a_token_that_still_has_a_balance_is_kept(client: Client, node: BadNode, chunk: Write) -> None:
    upload(client, chunk(b"x"), b"x")
    node.good_tokens, node.token_status = set(), 402
    node.balances["token00000000001"] = 7
    with pytest.raises(BalanceInsufficient):
        upload(client, chunk(b"y"), b"y")
    assert node.tokens_given == 1


def test_a_node_that_takes_no_token_is_not_flooded(client: Client, node: BadNode, chunk: Write) -> None:
    node.good_tokens, node.token_status = set(), 402
    for _ in range(5):
        with pytest.raises(BalanceInsufficient):
            upload(client, chunk(b"y"), b"y")
    assert node.tokens_given == 2


def test_a_given_token_is_never_replaced(node: BadNode, chunk: Write) -> None:
    node.good_tokens, node.token_status = {"mine"}, 401
    upload(Client(node.url, token="mine"), chunk(b"y"), b"y")
    with pytest.raises(NodeRefused) as caught:
        upload(Client(node.url, token="secret"), chunk(b"y"), b"y")
    assert "secret" not in str(caught.value)
    assert node.tokens_given == 0


def test_a_charging_node_gets_the_token_on_downloads_too(client: Client, node: BadNode) -> None:
    node.charge_downloads = True
    link = node.put(b"paid")
    assert client.exists(link.filehash)
    assert client.exists(link.filehash)
    paths = [request.path for request in node.requests if request.route == "download"]
    assert ["token=" in path for path in paths] == [False, True, True]


def test_the_key_never_travels(client: Client, node: BadNode, chunk: Write) -> None:
    link = upload(client, chunk(b"secret"), b"secret").link
    client.exists(link.filehash)
    assert not any(link.key in request.path for request in node.requests)


# -- the other routes -----------------------------------------------------------------------------------------------


def test_exists(client: Client, node: BadNode) -> None:
    link = node.put(b"here")
    assert client.exists(link.filehash)
    assert not client.exists("0" * 64)
    assert node.connections == 1
    for odd in ("", "../../status", link.filehash.upper(), "0" * 63):
        with pytest.raises(UsageError):
            client.exists(odd)


def test_a_missing_page_is_not_a_missing_object(client: Client, node: BadNode) -> None:
    """A wrong URL must not make every chunk look lost."""
    node.fail("any", "html:404", times=-1)
    with pytest.raises(NodeRefused):
        client.exists("0" * 64)
    with pytest.raises(NodeRefused):
        client.find("0" * 64)


def test_find_and_status(client: Client, node: BadNode) -> None:
    link = node.put(b"here")
    found = client.find(link.filehash)
    assert found is not None
    assert found["filesize"] == 4
    assert client.find("0" * 64) is None
    assert "storage" in client.status()


@pytest.mark.parametrize("fault", ["endless", "drip", "hang", "html:200", "status:500", "reset"])
def test_a_status_that_never_comes(client: Client, node: BadNode, fault: str) -> None:
    node.fail("status", fault, times=-1)
    begun = time.monotonic()
    with pytest.raises(NodeError):
        client.status(deadline=0.6)
    assert time.monotonic() - begun < 1.5


def test_the_environment_is_not_obeyed(node: BadNode, monkeypatch: pytest.MonkeyPatch, chunk: Write) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    client = Client(node.url)
    upload(client, chunk(b"x"), b"x")
    client.status()


def test_a_url_with_a_path(node: BadNode) -> None:
    with pytest.raises(NodeRefused):
        Client(f"{node.url}/base/").status()
    assert node.requests[-1].path == "/base/api/status"


def test_many_threads_share_one_client(
    client: Client, node: BadNode, chunk: Write, noise: Callable[[int], bytes]
) -> None:
    contents = [noise(200_000 + number) for number in range(24)]
    node.fail("upload", "reset:50000", times=5)
    errors: list[Exception] = []

    def work(mine: list[bytes]) -> None:
        try:
            for content in mine:
                assert upload(client, chunk(content), content, tries=10).link == wire.link_of(content)
        except Exception as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(contents[number::8],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# -- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificate and key of 127.0.0.1 in one file, signed by itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "node.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return path


def test_https(certificate: Path, chunk: Write, noise: Callable[[int], bytes]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    content = noise(3 << 20)
    with BadNode(tls=context) as node:
        client = Client(node.url, ca_file=str(certificate))
        assert upload(client, chunk(content), content).link == wire.link_of(content)
        assert "storage" in client.status()
        with pytest.raises(NodeUnreachable, match=r"(?i)certificate"):
            Client(node.url).status(deadline=0.3)


# -- the node as a process ------------------------------------------------------------------------------------------


def test_the_bad_node_runs_as_a_process(chunk: Write) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.metadisk.bad_node",
        "--fail",
        "upload=status:500*2",
        "--set",
        "ranges=false",
    ]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout
            client = Client(process.stdout.readline().strip())
            assert upload(client, chunk(b"x"), b"x").link == wire.link_of(b"x")
            assert client.exists(wire.link_of(b"x").filehash)
        finally:
            process.kill()


def test_object_missing_is_what_a_stream_says(client: Client) -> None:
    with pytest.raises(ObjectMissing):
        client.request_object("GET", "0" * 64)
