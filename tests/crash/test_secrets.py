"""What others on this machine may see: nothing of the content, no key, no token."""

import json
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from metadiskfs import control
from tests.conftest import Mount
from tests.crash.conftest import files_below

SECRET = b"the content of a private file" * 50


@pytest.fixture
def used(mount: Mount) -> Mount:
    """Written, stored, backed up, fetched, with errors in the log."""
    (mount / "stored").write_bytes(SECRET)
    mount.sync()
    mount.run("backup", str(mount.path))
    mount.run("link", str(mount / "stored"))
    mount.clear_cache()
    mount.drop_kernel_caches()
    (mount / "stored").read_bytes()
    (mount / "lost").write_bytes(os.urandom(5000))
    mount.sync()
    mount.clear_cache()
    for path in files_below(mount.data_dir / "node/objects"):
        path.unlink()
    mount.drop_kernel_caches()
    with pytest.raises(OSError, match="Input/output"):
        (mount / "lost").read_bytes()
    (mount / "pending").write_bytes(SECRET[::-1])
    return mount


def test_files_are_their_owners_alone(used: Mount) -> None:
    for top in (used.volume_dir, used.cache_dir, used.data_dir / "node", used.home / ".local/state/metadiskfs"):
        assert stat.S_IMODE(top.stat().st_mode) == 0o700, top
        for path in top.rglob("*"):
            mode = stat.S_IMODE(path.lstat().st_mode)
            assert not mode & 0o077, f"{path}: {mode:o}"


def test_another_user_cannot_read_them(used: Mount) -> None:
    """The folders above are opened for all, so that only ours are in the way."""
    for folder in (used.home, used.home / ".local", used.home / ".local/share", used.home / ".cache"):
        folder.chmod(0o755)
    tops = [
        used.data_dir,
        used.volume_dir,
        used.cache_dir,
        used.data_dir / "node",
        used.home / ".local/state/metadiskfs",
    ]
    script = (
        "import os, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(path, os.listdir(path))\n"
        "    except PermissionError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, tops)], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def secrets_of(mount: Mount) -> set[str]:
    """The upload token and every key: of chunks and of the backup."""
    node = json.loads(mount.run("status", str(mount.path), "--json").stdout)
    links = [node["recovery_link"], *mount.run("link", str(mount / "pending")).stdout.split()]
    found = {link.partition("?key=")[2] for link in links}
    found.add(control.ask_once(mount.volume_dir, "node")["token"])
    assert all(len(secret) >= 32 for secret in found)
    return found


def test_logs_and_process_lists_tell_no_secret(used: Mount) -> None:
    secrets = secrets_of(used)
    log = used.log
    assert "uploaded" in log and "lost at" in log
    pids = used.pids()
    children = Path(f"/proc/{pids[-1]}/task/{pids[-1]}/children").read_text().split()
    for pid in (*pids, *children):
        for name in ("cmdline", "environ"):
            told = Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
            assert not [secret for secret in secrets if secret in told], f"{pid}/{name}"
    assert not [secret for secret in secrets if secret in log]
    assert "?key=" not in log and "token=" not in log


def asked_for_token(url: str) -> str:
    """What POST /accounts/token/new gives, "" where it gives none."""
    try:
        with urllib.request.urlopen(f"{url}/accounts/token/new", b"", timeout=10) as answer:
            return str(json.loads(answer.read())["token"])
    except urllib.error.HTTPError as error:
        error.close()
        return ""


def test_the_embedded_node_takes_uploads_from_its_owner_only(used: Mount) -> None:
    """Also not with a token that anyone may ask it for."""
    url = used.status()["node"]
    boundary = "x"
    for token in ("", "0" * 32, asked_for_token(url)):
        parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="token"\r\n\r\n{token}\r\n'] if token else []
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nintruder\r\n')
        body = ("".join(parts) + f"--{boundary}--\r\n").encode()
        request = urllib.request.Request(
            f"{url}/api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        caught.value.close()
        assert 400 <= caught.value.code < 500
