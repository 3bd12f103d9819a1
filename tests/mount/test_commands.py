"""The commands as a user types them, against real mounts and the embedded node."""

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from metadiskfs.metadisk.wire import Link, link_of
from tests.conftest import Mount, eventually, is_running, metadiskfs

TEST_DATA = (
    "0c12e76f671e6056b3be9af526acf1f6ca3d42d9066c811c9bceae560f3791cc"
    "?key=31292df8fd0ec1d5c3904fc12a4c90ca1f2425e0aaad1e6171970fddb904a823"
)


def get(mount: Mount, link: str) -> bytes:
    answer = requests.get(f"{mount.status()['node']}/api/download/{link}", timeout=10)
    assert answer.status_code == 200
    return answer.content


# -- mount and unmount ----------------------------------------------------------------------------------------------


def test_mount_makes_the_folder_and_returns_when_it_is_usable(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount(name="does/not/exist/yet")
    done = mount.start()
    assert (done.stdout, done.stderr) == ("", "")
    assert os.path.ismount(mount.path)
    assert stat.S_IMODE(mount.data_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((mount.volume_dir / "index.db").stat().st_mode) == 0o600


def test_unmount_waits_until_all_is_stored_and_ends_every_process(mount: Mount) -> None:
    (mount / "f").write_bytes(os.urandom(20_000_000))
    pids = mount.pids()
    assert len(pids) == 3
    mount.unmount()
    assert not os.path.ismount(mount.path)
    assert not any(is_running(pid) for pid in pids)
    mount.start()
    assert mount.status()["pending_chunks"] == 0


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "umount", "fusermount3"])
def test_other_ends_are_clean_too(mount: Mount, how: str) -> None:
    (mount / "f").write_bytes(b"content")
    pids = mount.pids()
    if how.startswith("SIG"):
        os.kill(pids[0], getattr(signal, how))
    else:
        command = ["umount"] if how == "umount" else ["fusermount3", "-u"]
        subprocess.run([*command, mount.path], check=True, timeout=20)
    eventually(lambda: not any(is_running(pid) for pid in pids))
    assert not os.path.ismount(mount.path)
    assert "Traceback" not in mount.log
    mount.start()
    assert (mount / "f").read_bytes() == b"content"


def test_a_second_mount_of_a_volume_is_refused(mount: Mount, make_mount: Callable[..., Mount]) -> None:
    done = make_mount(name="second").start(check=False)
    assert done.returncode == 6
    assert "mounted already" in done.stderr
    assert "something is mounted" in mount.start(check=False).stderr


def test_another_node_is_refused_unless_it_moved(mount: Mount) -> None:
    mount.unmount()
    done = mount.start("--node", "http://127.0.0.1:9", check=False)
    assert done.returncode == 6
    assert "--node-moved" in done.stderr


def test_mistakes_are_said_in_one_line(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, code, words in (
        (["mount", str(tmp_path / "file")], 7, "not a directory"),
        (["mount", str(tmp_path / "m"), "-o", "nonsense"], 2, "nonsense"),
        (["mount", str(tmp_path / "m"), "--cache-size", "much"], 2, "not a size"),
        (["mount", str(tmp_path / "m"), "--volume", "../x"], 2, "volume name"),
        (["mount", str(tmp_path / "m"), "--node", "ftp://x"], 2, "URL"),
        (["unmount", str(tmp_path)], 7, "not a mounted volume"),
        (["status"], 7, "no volume is mounted"),
        (["link", str(tmp_path / "file")], 7, "does not lie in"),
        (["upload", str(tmp_path / "nothing"), "--node", "http://127.0.0.1:9"], 2, "No such file"),
        (["download", "nonsense"], 2, "not a link"),
    ):
        done = metadiskfs(*arguments, check=False)
        assert done.returncode == code, arguments
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not done.stdout


def test_read_only(mount: Mount) -> None:
    (mount / "f").write_bytes(b"content")
    mount.remount("--read-only")
    assert (mount / "f").read_bytes() == b"content"
    for change in (
        lambda: (mount / "g").write_bytes(b""),
        lambda: (mount / "f").unlink(),
        lambda: (mount / "f").chmod(0o600),
        lambda: os.truncate(mount / "f", 1),
        lambda: os.setxattr(mount / "f", "user.a", b""),
    ):
        with pytest.raises(OSError, match="Read-only"):
            change()


def test_sync_mount_returns_from_close_when_stored_and_fails_without_a_node(
    make_mount: Callable[..., Mount], monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = make_mount("--sync")
    mount.start()
    (mount / "f").write_bytes(b"stored at once")
    assert os.getxattr(mount / "f", "user.metadisk.state") == b"stored"
    assert get(mount, link_of(b"stored at once").filehash)


def test_statfs_shows_the_disk_under_the_embedded_node(mount: Mount) -> None:
    there, here = os.statvfs(mount.path), os.statvfs(mount.home)
    assert there.f_blocks * there.f_frsize == pytest.approx(here.f_blocks * here.f_frsize, rel=0.01)
    assert there.f_bavail * there.f_frsize == pytest.approx(here.f_bavail * here.f_frsize, rel=0.2)
    assert there.f_namemax == 255


# -- links ----------------------------------------------------------------------------------------------------------


def test_the_published_link(mount: Mount) -> None:
    (mount / "f").write_bytes(b"test data\n")
    assert metadiskfs("link", str(mount / "f")).stdout.strip() == TEST_DATA
    assert os.getxattr(mount / "f", "user.metadisk.link").decode().strip() == TEST_DATA
    assert os.listxattr(mount / "f") == []
    mount.sync()
    url = metadiskfs("link", "--url", str(mount / "f")).stdout.strip()
    assert subprocess.run(["curl", "-sf", url], capture_output=True, check=True, timeout=20).stdout == b"test data\n"


def test_the_lines_fetched_in_order_are_the_file(make_mount: Callable[..., Mount]) -> None:
    chunk = 64 << 10
    mount = make_mount("--chunk-size", "64K")
    mount.start()
    content = bytearray(10 * chunk + 77)
    with (mount / "sparse").open("wb") as file:
        for offset, size in ((0, 10), (2 * chunk + 5, chunk), (9 * chunk, 3)):
            piece = os.urandom(size)
            file.seek(offset)
            file.write(piece)
            content[offset : offset + size] = piece
        file.truncate(len(content))
    os.truncate(mount / "sparse", 3 * chunk + 9)
    os.truncate(mount / "sparse", len(content))
    content[3 * chunk + 9 :] = bytes(len(content) - 3 * chunk - 9)
    (mount / "empty").touch()
    for name, expected in (("sparse", bytes(content)), ("empty", b"")):
        links = metadiskfs("link", str(mount / name)).stdout.splitlines()
        mount.sync()
        assert b"".join(get(mount, link) for link in links) == expected
        assert (mount / name).read_bytes() == expected
        whole = metadiskfs("link", "--whole", str(mount / name)).stdout.strip()
        assert get(mount, whole) == expected
    assert metadiskfs("verify", str(mount.path)).returncode == 0


def test_a_long_list_of_links_does_not_fit_the_attribute(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount("--chunk-size", "64K")
    mount.start()
    (mount / "f").touch()
    os.truncate(mount / "f", 500 * (64 << 10))
    done = subprocess.run(
        ["getfattr", "-n", "user.metadisk.link", mount / "f"], capture_output=True, text=True, check=False, timeout=20
    )
    assert "Numerical result out of range" in done.stderr
    assert len(set(metadiskfs("link", str(mount / "f")).stdout.splitlines())) == 1


def test_upload_and_download(home: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(6_000_000))
    (tmp_path / "small").write_bytes(b"test data\n")
    links = metadiskfs("upload", str(tmp_path / "small"), str(big)).stdout.splitlines()
    assert links[0] == TEST_DATA
    assert metadiskfs("download", links[0]).stdout == "test data\n"
    metadiskfs("download", links[1], "-o", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "big", "home", "small"]
    unknown = link_of(b"nobody has this")
    done = metadiskfs("download", str(unknown), "-o", str(tmp_path / "nothing"), check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert not (tmp_path / "nothing").exists()
    wrong_key = Link(links[0][:64], "0" * 64)
    assert metadiskfs("download", str(wrong_key), check=False).returncode == 3


# -- looking --------------------------------------------------------------------------------------------------------


def test_status_sync_and_cache_clear(mount: Mount) -> None:
    content = os.urandom(9_000_000)
    (mount / "f").write_bytes(content)
    mount.sync()
    status = mount.status()
    assert (status["pending_chunks"], status["stored_chunks"]) == (0, 3)
    assert status["stored_bytes"] == status["cache_bytes"] == 9_000_000
    assert status["embedded"]
    text = metadiskfs("status").stdout
    assert "3 chunks, 8.6 MiB" in text
    assert str(mount.path) in text
    mount.clear_cache()
    assert mount.status()["cache_bytes"] == 0
    mount.drop_kernel_caches()
    assert (mount / "f").read_bytes() == content


def test_status_without_json_is_no_secret_but_the_recovery_link(mount: Mount) -> None:
    (mount / "f").write_bytes(b"test data\n")
    mount.sync()
    assert TEST_DATA.partition("=")[2] not in metadiskfs("status").stdout + mount.log


def test_the_embedded_node_takes_uploads_from_its_user_only(mount: Mount) -> None:
    url = mount.status()["node"]
    token = requests.post(f"{url}/accounts/token/new", timeout=10).json()["token"]
    answer = requests.post(f"{url}/api/upload", files={"file": ("f", b"x")}, data={"token": token}, timeout=10)
    assert answer.status_code == 401
    assert requests.post(f"{url}/api/upload", files={"file": ("f", b"x")}, timeout=10).status_code == 401
    address = url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=5) as connection:
        assert connection.getpeername()[0] == "127.0.0.1"


def test_the_embedded_node_is_started_again(mount: Mount) -> None:
    (mount / "f").write_bytes(b"before")
    mount.sync()
    node = mount.status()["node_pid"]
    os.kill(node, signal.SIGKILL)
    eventually(lambda: not is_running(node))
    (mount / "g").write_bytes(b"after")
    mount.sync()
    mount.clear_cache()
    mount.drop_kernel_caches()
    assert (mount / "f").read_bytes() + (mount / "g").read_bytes() == b"beforeafter"


def test_version(home: Path) -> None:
    assert metadiskfs("--version").stdout.startswith("metadiskfs ")
