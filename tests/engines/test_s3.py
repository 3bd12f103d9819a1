"""Nodes over an S3 server: settings from where S3 tools look, clear words when they are wrong, one bucket for two."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from metadiskfs.metadisk import wire
from tests.engines.s3_server import BUCKET
from tests.node.node_process import RunningNode, run_cli


def start(folder: Path, env: dict[str, str], store: str) -> RunningNode:
    return RunningNode(folder, "--state", str(folder / "state"), store=store, env=env)


def test_two_nodes_one_bucket(s3_env: dict[str, str], tmp_path: Path) -> None:
    store = f"s3://{BUCKET}/{tmp_path.name}/deep"
    first = start(tmp_path / "a", s3_env, store)
    try:
        second = start(tmp_path / "b", s3_env, store)
        try:
            for content in (b"", b"shared", os.urandom(9_000_000)):
                answer = requests.post(first.url + "/api/upload", files={"file": ("n.txt", content)}, timeout=30)
                assert answer.status_code == 201, first.log_text()
                link = wire.Link(**answer.json())
                url = f"{second.url}/api/download/{link.filehash}"
                assert requests.get(url, params={"key": link.key}, timeout=30).content == content
                assert requests.head(url, timeout=30).headers["Content-Disposition"].endswith("_n.txt")
                if content:
                    part = requests.get(url, params={"key": link.key}, headers={"Range": "bytes=-3"}, timeout=30)
                    assert part.content == content[-3:]
            missing = requests.get(f"{second.url}/api/download/{'0' * 64}", timeout=30)
            assert (missing.status_code, missing.json()) == (404, {"error": "file-not-found"})
            assert requests.get(second.url + "/api/status", timeout=30).json()["storage"]["used"] == 9_000_006
            checked = run_cli("node", "check", "--store", store, "--state", str(tmp_path / "c"), env=s3_env)
            assert (checked.returncode, checked.stdout) == (0, ""), checked.stderr
            assert "3 objects" in checked.stderr
            assert second.terminate() == 0
        finally:
            second.end()
    finally:
        first.end()


def test_keys_from_a_profile(s3_env: dict[str, str], tmp_path: Path) -> None:
    profile = tmp_path / "credentials"
    profile.write_text(
        f"[default]\naws_access_key_id = wrong\n[disk]\naws_access_key_id = {s3_env['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {s3_env['AWS_SECRET_ACCESS_KEY']}\n"
    )
    env = s3_env | {"AWS_SHARED_CREDENTIALS_FILE": str(profile), "AWS_PROFILE": "disk"}
    env |= {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    node = start(tmp_path / "a", env, f"s3://{BUCKET}/{tmp_path.name}")
    try:
        assert requests.post(node.url + "/api/upload", files={"file": b"x"}, timeout=30).status_code == 201
        assert s3_env["AWS_SECRET_ACCESS_KEY"] == "test" or s3_env["AWS_SECRET_ACCESS_KEY"] not in node.log_text()
    finally:
        node.end()


@pytest.mark.parametrize(
    ("store", "env", "said"),
    [
        ("s3://no-such-bucket", {}, "not in the store"),
        ("s3://", {}, "names no bucket"),
        (f"s3://{BUCKET}", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "does not answer"),
        (f"s3://{BUCKET}", {"AWS_ACCESS_KEY_ID": "", "AWS_PROFILE": "nobody"}, "has no profile nobody"),
    ],
)
def test_what_is_wrong_is_said(
    s3_env: dict[str, str], tmp_path: Path, store: str, env: dict[str, str], said: str
) -> None:
    begun = time.monotonic()
    result = run_cli("node", "--listen", "127.0.0.1:0", "--store", store, "--state", str(tmp_path), env=s3_env | env)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - begun < 40


def test_without_obstore(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['obstore'] = None\n"
        "from metadiskfs.cli.main import main\n"
        "sys.exit(main(['node', 'check', '--store', 's3://x', '--state', sys.argv[1]]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert "metadiskfs[s3]" in result.stderr
