"""What strangers send: broken forms, evil names, bodies too large, cut connections. Nothing may be left behind."""

import contextlib
import random
import socket
import time
from pathlib import Path

import pytest
import requests

from metadiskfs.node.access_log import path as logged_path
from metadiskfs.node.names import MAX_NAME, clean
from tests.node.node_process import RunningNode, StartNode, multipart, post_head, wait_for

FORM = {"Content-Type": "multipart/form-data; boundary=edge"}
GOOD = multipart([(b'name="file"; filename="a"', b"test data\n")])


def spooled(node: RunningNode) -> list[Path]:
    return [file for file in node.store.glob("tmp/*/*") if file.name != "lock"]


def stored(node: RunningNode) -> set[str]:
    return {file.name for file in node.store.glob("objects/*/*")}


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", FORM),
        (b"", {}),
        (b"file=abc", {"Content-Type": "application/x-www-form-urlencoded"}),
        (b'{"file": "abc"}', {"Content-Type": "application/json"}),
        (GOOD, {"Content-Type": "multipart/form-data"}),
        (GOOD, {"Content-Type": "multipart/form-data; boundary="}),
        (GOOD, {"Content-Type": "multipart/form-data; boundary=" + "x" * 71}),
        (GOOD, {"Content-Type": "multipart/form-data; boundary=other"}),
        (GOOD, {"Content-Type": "text/plain"}),
        (GOOD[:-4], FORM),
        (GOOD[:-9], FORM),
        (GOOD.replace(b'filename="a"', b""), FORM),
        (GOOD.replace(b'filename="a"', b'filename=""'), FORM),
        (GOOD.replace(b'"file"', b'"fill"'), FORM),
        (GOOD.replace(b"Content-Disposition", b"Content-Nonsense"), FORM),
        (GOOD.replace(b'"a"', b'"\xff\xfe"'), FORM),
        (GOOD.replace(b'"a"', b'"' + b"a" * 9000 + b'"'), FORM),
        (multipart([(b'name="x"', b"y")] * 100 + [(b'name="file"; filename="a"', b"z")]), FORM),
        (multipart([(b'name="token"', b"t" * 5000), (b'name="file"; filename="a"', b"z")]), FORM),
        (b"--edge\r\n" * 1000, FORM),
        (b"\r\n\r\n--edge--", FORM),
    ],
)
def test_forms_without_a_usable_file(node: RunningNode, body: bytes, headers: dict[str, str]) -> None:
    before = stored(node)
    answer = requests.post(node.url + "/api/upload", data=body, headers=headers, timeout=10)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]
    assert stored(node) == before
    assert not spooled(node)


NAMES = {
    "../../../etc/passwd": "etc_passwd",
    "..\\..\\boot.ini": "boot.ini",
    'a"b\r\nSet-Cookie: x=1': "ab_Set-Cookie_x1",
    "a;b=c": "abc",
    "<script>alert(1)</script>.html": "scriptalert1_script.html",
    "naïve résumé.txt": "naive_resume.txt",
    "日本語": "file",
    "....": "file",
    "\x00": "file",
    ".hidden": "hidden",
    "__init__.py": "init__.py",
    "a" * 1000: "a" * MAX_NAME,
    "": "file",
}


@pytest.mark.parametrize(("name", "cleaned"), NAMES.items())
def test_names_are_made_harmless(name: str, cleaned: str) -> None:
    assert clean(name) == cleaned
    assert clean(cleaned) == cleaned


def test_evil_names_over_the_wire(node: RunningNode) -> None:
    """Sent raw, as no well-behaved client would."""
    for number, name in enumerate(NAMES):
        if not name or "\r" in name or "\x00" in name:
            continue
        content = b"named %d" % number
        raw = name.encode().replace(b'"', b"%22")
        form = multipart([(b'name="file"; filename="' + raw + b'"', content)])
        answer = requests.post(node.url + "/api/upload", data=form, headers=FORM, timeout=10)
        assert answer.status_code == 201, (name, answer.text)
        filehash = answer.json()["filehash"]
        got = requests.get(f"{node.url}/api/download/{filehash}", timeout=10)
        disposition = got.headers["Content-Disposition"]
        assert disposition.startswith(f"attachment; filename={filehash[:7]}_")
        assert set(disposition[len("attachment; filename=") :]) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
        )
        assert "Set-Cookie" not in got.headers
        assert got.headers["X-Content-Type-Options"] == "nosniff"
        assert (node.store / "objects" / filehash[:2] / filehash).is_file()


def test_names_with_line_breaks_and_nul_in_the_header(node: RunningNode) -> None:
    for name in (b'a"\r\nContent-Type: text/html\r\nX: "', b"a\x00b", b"a\nb", b'a\\"b'):
        form = multipart([(b'name="file"; filename="' + name + b'"', b"x" + name)])
        answer = requests.post(node.url + "/api/upload", data=form, headers=FORM, timeout=10)
        assert answer.status_code in (201, 400)
        if answer.status_code == 201:
            got = requests.get(f"{node.url}/api/download/{answer.json()['filehash']}", timeout=10)
            assert got.headers["Content-Type"] == "application/octet-stream"
            assert "\n" not in got.headers["Content-Disposition"]


def test_mutated_forms_never_break_the_node(node: RunningNode) -> None:
    """A fuzzer with a fixed seed: cuts, swaps, repeats and noise in a good form."""
    chance = random.Random(2015)
    base = multipart([(b'name="token"', b"abc"), (b'name="file"; filename="a"', bytes(200))])
    with requests.Session() as session:
        for _ in range(300):
            body = bytearray(base)
            for _ in range(chance.randint(1, 4)):
                at, size = chance.randrange(len(body)), chance.randint(1, 30)
                piece = bytes(body[at : at + size])
                body[at : at + size] = chance.choice(
                    [b"", piece * 2, chance.randbytes(size), b"\r\n", b"--edge", b"\x00"]
                )
            answer = session.post(node.url + "/api/upload", data=bytes(body), headers=FORM, timeout=10)
            assert answer.status_code in (201, 400), (bytes(body), answer.status_code)
            assert isinstance(answer.json(), dict)
    assert not spooled(node)
    assert "Traceback" not in node.log_text()


def test_noise_instead_of_http(node: RunningNode) -> None:
    for noise in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"A" * 100_000,
        b"POST /api/upload HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", node.port), timeout=10) as connection:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(100)
            except ConnectionError:
                answer = b""
            assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert requests.get(node.url + "/healthz", timeout=10).status_code == 200


def test_too_large_is_refused_before_it_is_read(node: RunningNode) -> None:
    with socket.create_connection(("127.0.0.1", node.port), timeout=10) as connection:
        connection.sendall(post_head(200 << 20, "Expect: 100-continue\r\n"))
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'{"error": "file-too-large"}' in answer


@pytest.mark.parametrize("limit", [1000, 9_000_000])
def test_too_large_by_a_little_or_without_a_length(start_node: StartNode, limit: int) -> None:
    node = start_node("--max-file-size", str(limit))
    for size, status in ((limit, 201), (limit + 1, 413)):
        form = multipart([(b'name="file"; filename="a"', bytes(size))])
        for body in (form, iter([form])):
            answer = requests.post(node.url + "/api/upload", data=body, headers=FORM, timeout=10)
            assert answer.status_code == status, answer.text
    assert not spooled(node)
    assert len(stored(node)) == 1


@pytest.mark.parametrize("size", [1000, 20_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_connection_cut_in_the_middle(node: RunningNode, size: int, chunked: bool) -> None:
    """Even where the closing boundary of an inner form has come: only the outer end counts."""
    before = stored(node)
    form = multipart([(b'name="file"; filename="a"', bytes(size))])
    with socket.create_connection(("127.0.0.1", node.port), timeout=10) as connection:
        if chunked:
            head = post_head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            connection.sendall(head + b"%x\r\n" % (len(form) + 1000) + form[: len(form) // 2])
        else:
            connection.sendall(post_head(len(form)) + form[:-20])
    assert wait_for(lambda: not spooled(node))
    time.sleep(0.1)
    assert stored(node) == before


def test_a_form_shorter_than_announced_is_no_upload(node: RunningNode) -> None:
    """The form is whole, the announced length is not: either answer will do, but no failure."""
    form = multipart([(b'name="file"; filename="a"', b"whole but short")])
    before = stored(node)
    with socket.create_connection(("127.0.0.1", node.port), timeout=10) as connection:
        connection.sendall(post_head(len(form) + 500) + form)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(4096)
    assert not answer.startswith(b"HTTP/1.1 5")
    assert stored(node) == before or answer.startswith(b"HTTP/1.1 201")


@pytest.mark.parametrize(
    ("path", "logged"),
    [
        ("/api/upload", "/api/upload"),
        ("/accounts/token/balance/abc", "/accounts/token/balance/-"),
        ("/accounts/token/withdraw/abc/def\n", "/accounts/token/withdraw/-"),
        ("/a\r\nb", "/a\\x0d\\x0ab"),
        ('/a"b\\c', "/a\\x22b\\x5cc"),
        ("/é", "/\\xe9"),
        ("/x?key=abcdef", "/x?key=-"),
    ],
)
def test_paths_in_the_log(path: str, logged: str) -> None:
    assert logged_path(path) == logged


def test_slow_clients_are_cut_and_do_not_starve_others(start_node: StartNode) -> None:
    """Bodies that never come, trickling ones, and answers nobody reads: all threads but a few, and then all freed."""
    node = start_node("--threads", "12", "--client-uploads", "6", "--client-requests", "9", "--stall-timeout", "1")
    big = requests.post(node.url + "/api/upload", files={"file": bytes(30_000_000)}, timeout=30).json()["filehash"]

    def try_upload() -> requests.Response:
        return requests.post(node.url + "/api/upload", data=GOOD, headers=FORM, timeout=5)

    with contextlib.ExitStack() as connections:
        for number in range(8):
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", node.port), timeout=20))
            if number < 6:
                connection.sendall(post_head(1000) + b"--edge")
            else:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(f"GET /api/download/{big} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(0.3)
        assert requests.get(node.url + "/healthz", timeout=5).status_code == 200
        busy = try_upload()
        assert (busy.status_code, busy.headers["Retry-After"]) == (429, "1")
        assert wait_for(lambda: try_upload().status_code == 201, within=15)
        assert wait_for(lambda: "cut" in node.log_text())
    assert not spooled(node)


def test_a_trickling_body_is_cut(start_node: StartNode) -> None:
    node = start_node("--stall-timeout", "0.5")
    with socket.create_connection(("127.0.0.1", node.port), timeout=20) as trickle:
        trickle.sendall(post_head(100_000) + b"--edge")
        with pytest.raises(ConnectionError):
            for _ in range(100):
                trickle.sendall(b"x")
                time.sleep(0.1)
    assert not spooled(node)
