"""A node's life: starting, ending, dying, and being somebody's own."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

from metadiskfs.metadisk import wire
from tests.node.node_process import (
    TOKEN,
    RunningNode,
    StartNode,
    children,
    exists,
    multipart,
    post_head,
    run_cli,
    wait_for,
)

FORM = {"Content-Type": "multipart/form-data; boundary=edge"}


def slow_upload(node: RunningNode, body: bytes, pause: float) -> bytes:
    """Send half, wait, send the rest; the whole answer."""
    with socket.create_connection(("127.0.0.1", node.port), timeout=20) as connection:
        connection.sendall(post_head(len(body)) + body[: len(body) // 2])
        time.sleep(pause)
        connection.sendall(body[len(body) // 2 :])
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            if answer.count(b"}"):
                break
        return answer


def test_sigterm_answers_what_is_under_way(start_node: StartNode) -> None:
    node = start_node()
    worker = node.worker
    content = os.urandom(3_000_000)
    form = multipart([(b'name="file"; filename="a"', content)])
    answers: list[bytes] = []
    thread = threading.Thread(target=lambda: answers.append(slow_upload(node, form, 1.0)))
    thread.start()
    time.sleep(0.4)
    assert node.terminate() == 0
    thread.join()
    assert answers[0].startswith(b"HTTP/1.1 201")
    filehash = wire.link_of(content).filehash
    assert (node.store / "objects" / filehash[:2] / filehash).stat().st_size == len(content)
    assert not exists(worker)
    assert [item.name for item in (node.store / "tmp").iterdir()] == ["lock"]
    with pytest.raises(requests.ConnectionError):
        requests.get(node.url, timeout=2)


def test_sigterm_does_not_wait_for_idle_connections(start_node: StartNode) -> None:
    node = start_node()
    with requests.Session() as session:
        assert session.get(node.url + "/healthz", timeout=10).ok
        begun = time.monotonic()
        assert node.terminate() == 0
        assert time.monotonic() - begun < 5


def test_a_name_to_listen_on(start_node: StartNode) -> None:
    assert start_node("--listen", "localhost:0").url.startswith("http://127.0.0.1:")


def test_kill_9_leaves_nothing_that_the_next_start_does_not_sweep(start_node: StartNode) -> None:
    node = start_node()
    worker = node.worker
    body = multipart([(b'name="file"; filename="a"', bytes(30_000_000))])
    connection = socket.create_connection(("127.0.0.1", node.port), timeout=20)
    connection.sendall(post_head(len(body)) + body[:20_000_000])
    assert wait_for(lambda: any(file.stat().st_size > 10_000_000 for file in node.store.glob("tmp/*/*")))
    node.process.kill()
    assert wait_for(lambda: not exists(worker)), "a worker outlived its main process"
    connection.close()
    node.end()
    assert any(node.store.glob("tmp/*/[0-9]*"))
    other = start_node()
    living = [folder.name for folder in (node.store / "tmp").iterdir() if folder.is_dir()]
    assert len(living) == 1
    third = RunningNode(node.log.parent, store=str(node.store))  # a second node on one store sweeps no living one's
    try:
        assert living[0] in [folder.name for folder in (node.store / "tmp").iterdir()]
    finally:
        third.end()
    assert requests.get(other.url + "/healthz", timeout=10).ok


def test_a_taken_port_is_said(start_node: StartNode, tmp_path: Path) -> None:
    node = start_node()
    second = run_cli("node", "--listen", f"127.0.0.1:{node.port}", "--store", str(tmp_path / "other"))
    assert second.returncode == 2
    assert "cannot listen on" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_store_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_cli("node", "--listen", "127.0.0.1:0", "--store", str(tmp_path / "file"))
    assert result.returncode == 2
    assert "cannot use the store" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--listen", "nonsense"],
        ["--listen", "127.0.0.1:99999"],
        ["--workers", "0"],
        ["--tls-cert", "x"],
        ["--max-file-size", "many"],
        ["--store", "ftp://x"],
        ["--secret-file", "missing"],
        ["--access-log", "no/such/log"],
    ],
)
def test_flags_that_make_no_sense(options: list[str], tmp_path: Path) -> None:
    result = run_cli("node", "--store", str(tmp_path / "s"), "--state", str(tmp_path / "t"), *options)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("metadiskfs: ")


def test_a_large_body_never_lies_in_memory(start_node: StartNode) -> None:
    node = start_node()

    def high_water() -> int:
        status = Path(f"/proc/{node.worker}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0])

    before = high_water()
    size, piece = 200 << 20, os.urandom(1 << 20)
    head, tail = multipart([(b'name="file"; filename="a"', b"|")]).split(b"|")
    body = (part for part in (head, *[piece] * 200, tail))
    answer = requests.post(node.url + "/api/upload", data=body, headers=FORM, timeout=60)
    link = wire.Link(**answer.json())
    with requests.get(f"{node.url}/api/download/{link.filehash}?key={link.key}", stream=True, timeout=60) as got:
        received = 0
        for part in got.iter_content(1 << 20):
            assert part == piece[: len(part)] or received % (1 << 20)
            received += len(part)
    assert received == size
    assert high_water() - before < 40_000, "kilobytes"


def test_more_workers_share_the_store_and_hup_renews_them(start_node: StartNode) -> None:
    node = start_node("--workers", "2")
    assert wait_for(lambda: len(children(node.process.pid)) == 2)
    before = children(node.process.pid)
    link = wire.Link(**requests.post(node.url + "/api/upload", files={"file": b"shared"}, timeout=10).json())
    node.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 15
    while set(before) & set(children(node.process.pid)) and time.monotonic() < deadline:
        assert (
            requests.get(f"{node.url}/api/download/{link.filehash}?key={link.key}", timeout=10).content == b"shared"
        )
        time.sleep(0.05)
    assert not set(before) & set(children(node.process.pid))
    assert node.terminate() == 0


def test_embedded_takes_uploads_with_its_token_only(start_node: StartNode) -> None:
    node = start_node(embedded=True)
    form = {"file": ("a", b"test data\n")}
    given = requests.post(node.url + "/accounts/token/new", timeout=10).json()["token"]
    for token in ("", given, TOKEN[:-1], TOKEN.lower()):
        answer = requests.post(node.url + "/api/upload", data={"token": token}, files=form, timeout=10)
        assert (answer.status_code, answer.json()) == (401, {"error": "invalid-token"})
    late = multipart([(b'name="file"; filename="a"', b"x"), (b'name="token"', TOKEN.encode())])
    assert requests.post(node.url + "/api/upload", data=late, headers=FORM, timeout=10).status_code == 401
    assert not list(node.store.glob("objects/*/*"))
    answer = requests.post(node.url + "/api/upload", data={"token": TOKEN}, files=form, timeout=10)
    assert answer.status_code == 201
    link = wire.Link(**answer.json())
    assert requests.get(f"{node.url}/api/download/{link}", timeout=10).content == b"test data\n"
    assert (
        "Access-Control-Allow-Origin"
        not in requests.get(node.url + "/api/status", headers={"Origin": "http://x"}, timeout=10).headers
    )
    for pid in (node.process.pid, node.worker):
        assert (
            TOKEN.encode()
            not in Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        )


def test_embedded_is_ready_soon(start_node: StartNode) -> None:
    begun = time.monotonic()
    start_node(embedded=True)
    assert time.monotonic() - begun < 5  # 0.3 s on an idle machine; a loaded one is no failure


def test_embedded_ends_when_its_owner_lets_go(start_node: StartNode) -> None:
    node = start_node(embedded=True)
    worker = node.worker
    assert node.process.stdin
    node.process.stdin.close()
    assert node.process.wait(10) == 0
    assert wait_for(lambda: not exists(worker))


def test_embedded_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    """The owner is a process of its own here, and dies by kill -9 with the pipe in its hands."""
    script = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'metadiskfs', 'node', '--embedded', '--listen', '127.0.0.1:0']\n"
        "command += ['--store', sys.argv[1]]\n"
        "node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "node.stdin.write(b'TestTokenOfThisUser01\\n'); node.stdin.flush(); node.stdout.readline()\n"
        "print(node.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        main = int(owner.stdout.readline())
        pids = [main, *children(main)]
        try:
            assert len(pids) == 2
            owner.kill()
            assert wait_for(lambda: not any(exists(pid) for pid in pids))
        finally:
            owner.kill()
            for pid in pids:
                if exists(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["main", "worker"])
def test_embedded_dies_whole(start_node: StartNode, victim: str) -> None:
    node = start_node(embedded=True)
    worker = node.worker
    os.kill(node.process.pid if victim == "main" else worker, signal.SIGKILL)
    node.process.wait(10)
    assert wait_for(lambda: not exists(worker))


def test_embedded_wants_its_token() -> None:
    for line in (b"", b"short\n", b"no newline at the end of it", b"with spaces in between it\n"):
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "metadiskfs",
                "node",
                "--embedded",
                "--listen",
                "127.0.0.1:0",
                "--store",
                "/nonexistent",
            ],
            input=line,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert result.returncode == 2
        assert b"token" in result.stderr


def test_tls(start_node: StartNode, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            str(key),
            "-out",
            str(cert),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    node = start_node("--tls-cert", str(cert), "--tls-key", str(key))
    assert node.url.startswith("https://")
    answer = requests.post(node.url + "/api/upload", files={"file": b"test data\n"}, verify=str(cert), timeout=10)
    assert answer.status_code == 201
    url = requests.get(f"{node.url}/api/find/{answer.json()['filehash']}", verify=str(cert), timeout=10).json()[
        "uploads"
    ][0]["url"]
    assert url.startswith("https://")
