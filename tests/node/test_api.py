"""Every route of the web-core API through a real process, as a client of 2015 used them."""

import hashlib
import http.client
import json
import os
import random
import re
import socket
import threading
from pathlib import Path

import pytest
import requests

from metadiskfs.metadisk import wire
from tests.node.node_process import RunningNode, StartNode, multipart, wait_for

TEST_DATA = wire.Link(
    "0c12e76f671e6056b3be9af526acf1f6ca3d42d9066c811c9bceae560f3791cc",
    "31292df8fd0ec1d5c3904fc12a4c90ca1f2425e0aaad1e6171970fddb904a823",
)
EMPTY = wire.Link(
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "db1e68eb95e8dcf0164289309c3989f2ab007eddaeb39363d8f000ee0fc2f5ce",
)
ZEROS = wire.Link(
    "a619edb8ce89ebf13babbf29b9295de6ac9390aaf5741d4866975ccbe35aefe8",
    "94f3b1d91b1a231423c571fcd17e0b9b9f88255537dfe32436b508dfd4d4b534",
)


def upload(node: RunningNode, content: bytes, name: str = "file.bin") -> wire.Link:
    answer = requests.post(node.url + "/api/upload", files={"file": (name, content)}, timeout=30)
    assert answer.status_code == 201, answer.text
    return wire.Link(**answer.json())


def download(node: RunningNode, link: wire.Link, *, key: bool = True, **headers: str) -> requests.Response:
    params = {"key": link.key} if key else {}
    return requests.get(f"{node.url}/api/download/{link.filehash}", params=params, headers=headers, timeout=30)


def test_the_script_of_the_article(node: RunningNode) -> None:
    token = requests.post(node.url + "/accounts/token/new", timeout=10).json()["token"]
    assert re.fullmatch("[0-9A-Za-z]{16}", token)
    answer = requests.post(
        node.url + "/api/upload", data={"token": token}, files={"file": ("hello.txt", b"test data\n")}, timeout=10
    )
    assert answer.status_code == 201
    assert answer.json() == {"filehash": TEST_DATA.filehash, "key": TEST_DATA.key}
    got = requests.get(
        f"{node.url}/api/download/{TEST_DATA.filehash}", params={"key": TEST_DATA.key, "token": token}, timeout=10
    )
    assert (got.status_code, got.content) == (200, b"test data\n")
    assert got.headers["Content-Type"] == "application/octet-stream"
    assert got.headers["Content-Disposition"] == "attachment; filename=0c12e76_hello.txt"
    assert got.headers["Content-Length"] == "10"


@pytest.mark.parametrize(
    ("content", "link"),
    [(b"test data\n", TEST_DATA), (b"", EMPTY), (bytes(1 << 20), ZEROS)],
    ids=["text", "empty", "zeros"],
)
def test_vectors_end_to_end(node: RunningNode, content: bytes, link: wire.Link) -> None:
    assert upload(node, content) == link
    assert upload(node, content) == link  # again: one object, the same answer
    assert download(node, link).content == content
    assert download(node, wire.Link(link.filehash, link.key.upper())).content == content
    ciphertext = download(node, link, key=False)
    assert hashlib.sha256(ciphertext.content).hexdigest() == link.filehash
    assert ciphertext.headers["Content-Length"] == str(len(content))
    for stored in (node.store / "objects" / link.filehash[:2]).iterdir():
        assert stored.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("size", [1, 15, 16, 17, 262_144, 262_145, (8 << 20) - 1, (8 << 20) + 1, 20_000_000])
def test_sizes_around_every_border(node: RunningNode, size: int) -> None:
    content = random.Random(size).randbytes(size)
    link = upload(node, content)
    assert link == wire.link_of(content)
    assert download(node, link).content == content
    assert hashlib.sha256(download(node, link, key=False).content).hexdigest() == link.filehash


RANGES = [
    ("bytes=0-0", 206, 0, 1),
    ("bytes=5-20", 206, 5, 21),
    ("bytes=17-", 206, 17, None),
    ("bytes=-7", 206, -7, None),
    ("bytes=0-99999999999", 206, 0, None),
    ("bytes=-99999999999", 206, 0, None),
    ("bytes=3-2", 200, 0, None),
    ("bytes=0-1,4-5", 200, 0, None),
    ("bytes=a-b", 200, 0, None),
    ("lines=0-1", 200, 0, None),
    ("bytes=-", 200, 0, None),
]


@pytest.mark.parametrize("size", [100_000, 9_000_000])
@pytest.mark.parametrize(("header", "status", "start", "stop"), RANGES)
def test_ranges(node: RunningNode, header: str, status: int, start: int, stop: int | None, size: int) -> None:
    content = random.Random(size).randbytes(size)
    link = upload(node, content)
    ciphertext = wire.cipher_stream(bytes.fromhex(link.key)).update(content)
    for whole, key in ((content, True), (ciphertext, False)):
        answer = download(node, link, key=key, Range=header)
        assert (answer.status_code, answer.content) == (status, whole[start:stop])
        if status == 206:
            first = start % size
            assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(answer.content) - 1}/{size}"


def test_a_range_beyond_the_end(node: RunningNode) -> None:
    link = upload(node, b"test data\n")
    for header in ("bytes=10-", "bytes=10-20", "bytes=-0"):
        answer = download(node, link, Range=header)
        assert answer.status_code == 416
        assert answer.headers["Content-Range"] == "bytes */10"
        assert answer.json() == {"error": "range-not-satisfiable"}
    assert download(node, upload(node, b""), Range="bytes=0-0").status_code == 416


def test_head_wherever_get(node: RunningNode) -> None:
    link = upload(node, bytes(300_000), "z.bin")
    for path in (
        f"/api/download/{link.filehash}?key={link.key}",
        f"/api/download/{link.filehash}",
        f"/api/find/{link.filehash}",
        "/api/status",
        "/accounts/token/prices",
        "/accounts/token/balance/abc",
        "/",
        "/healthz",
        "/metrics",
    ):
        got, head = (requests.request(verb, node.url + path, timeout=10) for verb in ("GET", "HEAD"))
        assert head.status_code == got.status_code == 200, path
        assert head.content == b""
        if "metrics" not in path:
            assert head.headers["Content-Length"] == got.headers["Content-Length"], path
    assert requests.head(node.url + "/api/download/" + "0" * 64, timeout=10).status_code == 404


def test_find(node: RunningNode) -> None:
    link = upload(node, b"find me", "../my notes.txt")
    found = requests.get(f"{node.url}/api/find/{link.filehash}", timeout=10).json()
    assert found["filename"] == f"{link.filehash[:7]}_my_notes.txt"
    assert (found["filehash"], found["filesize"], found["version"]) == (link.filehash, 7, "0.2")
    assert int(found["datetime"]) > 1_700_000_000 and isinstance(found["datetime"], str)
    assert found["uploads"][0]["host_name"] == "disk"
    missing = requests.get(f"{node.url}/api/find/{'0' * 64}", timeout=10)
    assert (missing.status_code, missing.json()) == (404, {"error": "File not found"})


def test_status_counts_what_went_through(node: RunningNode) -> None:
    def status() -> dict[str, dict[str, dict[str, int]]]:
        return requests.get(node.url + "/api/status", timeout=10).json()

    before = status()["bandwidth"]
    link = upload(node, random.randbytes(12_345))
    download(node, link)
    after = status()
    for period in ("total", "current"):
        for direction in ("incoming", "outgoing"):
            assert after["bandwidth"][period][direction] == before[period][direction] + 12_345
    stored = sum(file.stat().st_size for file in node.store.glob("objects/*/*"))
    assert after["storage"]["used"] == stored
    assert after["storage"]["max_file_size"] == 64 << 20
    assert after["storage"]["capacity"] > after["storage"]["used"] >= 0
    assert after["florincoin"] == {"balance": 0, "address": ""}
    assert after["sync"]["cloud_queue"] == {"count": 0, "size": 0}


@pytest.mark.parametrize(
    "filehash", ["0" * 64, "0" * 63, TEST_DATA.filehash.upper(), "x", "..", "%2e%2e%2f" * 3, "0" * 65]
)
def test_unknown_and_malformed_hashes(node: RunningNode, filehash: str) -> None:
    upload(node, b"test data\n")
    for query in ("", "?key=nonsense", f"?key={TEST_DATA.key}"):
        connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=10)
        connection.request("GET", f"/api/download/{filehash}{query}")
        answer = connection.getresponse()
        assert answer.status == 404
        assert json.loads(answer.read())["error"] in ("file-not-found", "not-found")
        connection.close()


@pytest.mark.parametrize("key", ["", "abc", "g" * 64, TEST_DATA.key + "00", "%00", TEST_DATA.key[:-1] + "%0a"])
def test_a_key_that_is_none(node: RunningNode, key: str) -> None:
    upload(node, b"test data\n")
    answer = requests.get(f"{node.url}/api/download/{TEST_DATA.filehash}?key={key}", timeout=10)
    assert (answer.status_code, answer.json()) == (400, {"error": "invalid-key"})


def test_wrong_methods_and_routes_are_json(node: RunningNode) -> None:
    for verb, path, status in (
        ("PUT", "/api/upload", 405),
        ("GET", "/api/upload", 405),
        ("DELETE", f"/api/download/{'0' * 64}", 405),
        ("GET", "/accounts/token/new", 405),
        ("POST", "/api/status", 405),
        ("GET", "/nope", 404),
        ("GET", "/web/x.js", 404),
        ("GET", "/web/..%2fserver.py", 404),
    ):
        answer = requests.request(verb, node.url + path, timeout=10)
        assert answer.status_code == status, (verb, path)
        assert answer.json()["error"], (verb, path)


def test_the_form_in_any_order_and_chunked(node: RunningNode) -> None:
    form = multipart(
        [(b'name="file"; filename="a"', b"test data\n"), (b'name="token"', b"abc"), (b'name="more"', b"x")]
    )
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    plain = requests.post(node.url + "/api/upload", data=form, headers=headers, timeout=10)
    chunked = requests.post(node.url + "/api/upload", data=iter([form[:50], form[50:]]), headers=headers, timeout=10)
    for answer in (plain, chunked):
        assert (answer.status_code, answer.json()["filehash"]) == (201, TEST_DATA.filehash)


def test_one_connection_serves_many_requests(node: RunningNode) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=10)
    form = multipart([(b'name="file"; filename="a"', b"test data\n")])
    connection.connect()
    sock = connection.sock
    for _ in range(5):
        connection.request("POST", "/api/upload", form, {"Content-Type": "multipart/form-data; boundary=edge"})
        assert connection.getresponse().read()
        connection.request("GET", f"/api/download/{TEST_DATA.filehash}?key={TEST_DATA.key}")
        assert connection.getresponse().read() == b"test data\n"
        assert connection.sock is sock
    connection.close()


def test_cors_for_pages_elsewhere(node: RunningNode) -> None:
    origin = {"Origin": "https://page.example"}
    answer = requests.post(node.url + "/api/upload", files={"file": b"x"}, headers=origin, timeout=10)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    preflight = requests.options(
        node.url + "/accounts/token/redeem/abc",
        headers=origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "Content-Type"},
        timeout=10,
    )
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "*"
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]


def test_cors_for_chosen_pages_only(start_node: StartNode) -> None:
    node = start_node("--cors-origin", "https://mine.example")
    for origin, allowed in (("https://mine.example", "https://mine.example"), ("https://other.example", None)):
        answer = requests.post(node.url + "/api/upload", files={"file": b"x"}, headers={"Origin": origin}, timeout=10)
        assert answer.status_code == 201
        assert answer.headers.get("Access-Control-Allow-Origin") == allowed


def test_downloads_broken_off_leave_nothing_open(start_node: StartNode) -> None:
    node = start_node()
    links = [upload(node, bytes(size)) for size in (30_000_000, 3_000_000)]
    for link in links * 5:
        for verb in ("GET", "HEAD"):
            with socket.create_connection(("127.0.0.1", node.port), timeout=10) as connection:
                connection.sendall(f"{verb} /api/download/{link} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                connection.recv(1000)

    def opened() -> list[str]:
        folder = Path(f"/proc/{node.worker}/fd")
        names = [os.readlink(descriptor) for descriptor in folder.iterdir() if descriptor.is_symlink()]
        return [name for name in names if "/objects/" in name]

    assert wait_for(lambda: not opened())
    assert download(node, links[0]).content == bytes(30_000_000)


def test_concurrent_uploads_do_not_touch_each_other(node: RunningNode) -> None:
    """Under one name too, and of one content: what the old servers corrupted in silence."""
    contents = [random.Random(i % 10).randbytes(50_000 + i % 10) for i in range(30)]
    links: dict[int, wire.Link] = {}

    def work(numbers: range) -> None:
        for number in numbers:
            links[number] = upload(node, contents[number], "same.bin")

    threads = [threading.Thread(target=work, args=(range(first, 30, 6),)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(links) == 30
    for number, link in links.items():
        assert link == wire.link_of(contents[number])
        assert download(node, link).content == contents[number]


def test_the_log_has_a_line_for_each_request_and_no_key(node: RunningNode) -> None:
    link = upload(node, b"never logged")
    download(node, link)
    requests.get(
        f"{node.url}/accounts/token/balance/SecretToken12345",
        timeout=10,
        headers={"Referer": f"http://x/#/{link.filehash}?key={link.key}", "User-Agent": 'evil" \x1b[2J'},
    )
    requests.get(f"{node.url}/api/download/{link.filehash}%3Fkey={link.key}", timeout=10)
    text = node.log_text()
    combined = r'127\.0\.0\.1 - - \[[^\]]+\] "GET /api/download/%s HTTP/1\.1" 200 12 "-" "python-requests/[^"]*"'
    assert re.search(combined % link.filehash, text)
    assert link.key not in text
    assert "SecretToken12345" not in text
    assert "\x1b" not in text
