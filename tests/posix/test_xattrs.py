"""Extended attributes. The disk differs in what it lets in (4 KiB), so these run in the mount."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.posix.test_limits import raises
from tests.posix.users import User


@pytest.fixture
def file(inside: Path) -> Path:
    path = inside / "f"
    path.write_bytes(b"content")
    path.chmod(0o666)
    return path


@pytest.mark.parametrize("name", ["user.a", "trusted.a", "security.a", "user." + "n" * 250, "user.\udcff"])
def test_set_get_list_remove(file: Path, name: str) -> None:
    os.setxattr(file, name, b"one\0two")
    assert os.getxattr(file, name) == b"one\0two"
    assert os.listxattr(file) == [name]
    os.setxattr(file, name, b"")
    assert os.getxattr(file, name) == b""
    os.removexattr(file, name)
    assert os.listxattr(file) == []
    with raises(errno.ENODATA):
        os.removexattr(file, name)


@pytest.mark.parametrize("name", ["user.a", "trusted.a"])
def test_what_is_not_set(file: Path, name: str) -> None:
    with raises(errno.ENODATA):
        os.getxattr(file, name)


@pytest.mark.parametrize("name", ["security.selinux", "security.capability", "system.posix_acl_access"])
def test_labels_and_acls_that_are_not_set_are_not_supported(file: Path, name: str) -> None:
    """ENODATA would make ls and cp ask again for every file."""
    with raises(errno.EOPNOTSUPP):
        os.getxattr(file, name)


def test_create_and_replace(file: Path) -> None:
    with raises(errno.ENODATA):
        os.setxattr(file, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(file, "user.a", b"1", os.XATTR_CREATE)
    with raises(errno.EEXIST):
        os.setxattr(file, "user.a", b"2", os.XATTR_CREATE)
    os.setxattr(file, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(file, "user.a") == b"3"


def test_values_of_64_kib_and_not_one_byte_more(file: Path) -> None:
    os.setxattr(file, "user.a", b"v" * 65536)
    assert os.getxattr(file, "user.a") == b"v" * 65536
    with raises(errno.E2BIG):
        os.setxattr(file, "user.a", b"v" * 65537)
    with raises(errno.ERANGE):
        os.setxattr(file, "user." + "n" * 251, b"")
    with raises(errno.EOPNOTSUPP):
        os.setxattr(file, "nonsense", b"")


def test_a_buffer_too_small_is_erange(file: Path, users: dict[str, User]) -> None:
    os.setxattr(file, "user.a", b"12345678")
    call = "n = ctypes.CDLL(None, use_errno=True).{}; errno.errorcode.get(ctypes.get_errno()) if n < 0 else n"
    get, names = (
        "getxattr(b'f', b'user.a', ctypes.create_string_buffer(99), {})",
        "listxattr(b'f', ctypes.create_string_buffer(99), {})",
    )
    ask = users["root"].do
    assert ask(file.parent, call.format(get.format(4))) == "ERANGE"
    assert ask(file.parent, call.format(get.format(8))) == 8
    assert ask(file.parent, call.format(get.format(0))) == 8
    assert ask(file.parent, call.format(names.format(3))) == "ERANGE"
    assert ask(file.parent, call.format(names.format(0))) == 7


def test_many_names(file: Path) -> None:
    names = {f"user.{number:04}" for number in range(500)}
    for name in names:
        os.setxattr(file, name, name.encode())
    assert set(os.listxattr(file)) == names
    assert all(os.getxattr(file, name) == name.encode() for name in names)


def test_everything_can_carry_them(inside: Path) -> None:
    (inside / "d").mkdir()
    os.symlink("d", inside / "link")
    os.mkfifo(inside / "fifo")
    os.setxattr(inside / "d", "user.a", b"folder")
    os.setxattr(inside / "link", "trusted.a", b"link", follow_symlinks=False)
    os.setxattr(inside / "fifo", "trusted.a", b"fifo")
    assert os.getxattr(inside / "d", "user.a") == b"folder"
    assert os.getxattr(inside / "link", "trusted.a", follow_symlinks=False) == b"link"
    assert os.listxattr(inside / "link") == ["user.a"]
    with raises(errno.EPERM):
        os.setxattr(inside / "fifo", "user.a", b"not on special files")


def test_they_follow_the_inode(file: Path) -> None:
    os.setxattr(file, "user.a", b"1")
    other = file.with_name("g")
    os.link(file, other)
    os.setxattr(other, "user.b", b"2")
    assert sorted(os.listxattr(file)) == ["user.a", "user.b"]
    os.rename(file, file.with_name("h"))
    assert os.getxattr(file.with_name("h"), "user.b") == b"2"
    with other.open("rb") as opened:
        os.unlink(other)
        os.unlink(file.with_name("h"))
        assert os.getxattr(opened.fileno(), "user.a") == b"1"
        os.setxattr(opened.fileno(), "user.c", b"3")
        assert sorted(os.listxattr(opened.fileno())) == ["user.a", "user.b", "user.c"]
    file.write_bytes(b"")
    assert os.listxattr(file) == []


def test_trusted_is_roots(file: Path, users: dict[str, User]) -> None:
    os.setxattr(file, "trusted.a", b"1")
    os.setxattr(file, "user.a", b"1")
    carl = users["carl"]
    assert carl.do(file.parent, "os.setxattr('f', 'trusted.b', X)") == "EPERM"
    assert carl.do(file.parent, "os.getxattr('f', 'trusted.a')") == "ENODATA"
    assert carl.do(file.parent, "os.removexattr('f', 'trusted.a')") == "EPERM"
    assert carl.do(file.parent, "os.getxattr('f', 'user.a')") == b"1"
    file.chmod(0o600)
    assert carl.do(file.parent, "os.getxattr('f', 'user.a')") == "EACCES"
    assert carl.do(file.parent, "os.setxattr('f', 'user.a', X)") == "EACCES"


def test_acls_are_refused_not_ignored(file: Path) -> None:
    entries = (
        b"\x02\0\0\0"
        + b"\x01\0\x06\0\xff\xff\xff\xff"
        + b"\x04\0\0\0\xff\xff\xff\xff"
        + b"\x20\0\0\0\xff\xff\xff\xff"
    )
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        with raises(errno.EOPNOTSUPP):
            os.setxattr(file.parent if "default" in name else file, name, entries)
    assert file.stat().st_mode & 0o777 == 0o666


def test_capabilities_are_kept_and_lost_with_a_write(file: Path) -> None:
    capability = b"\x01\0\0\x02\x00\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    for lose in (lambda: file.write_bytes(b"new"), lambda: os.truncate(file, 1), lambda: os.chown(file, 5, 5)):
        os.setxattr(file, "security.capability", capability)
        assert os.getxattr(file, "security.capability") == capability
        lose()
        assert "security.capability" not in os.listxattr(file)


def test_suid_is_lost_to_a_truncating_open(place: Path, users: dict[str, User]) -> None:
    """By somebody who may not keep it: root does."""
    for user, mode in (("carl", 0o777), ("root", 0o6777)):
        (place / user).write_bytes(b"content")
        (place / user).chmod(0o6777)
        assert users[user].do(place, f"opened('{user}', os.O_WRONLY | os.O_TRUNC)") == "ok"
        assert (place / user).stat().st_mode & 0o7777 == mode


def test_capabilities_are_lost_to_a_truncating_open(file: Path, users: dict[str, User]) -> None:
    os.setxattr(file, "security.capability", b"\x01\0\0\x02\x00\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0")
    assert users["carl"].do(file.parent, "opened('f', os.O_WRONLY | os.O_TRUNC)") == "ok"
    assert os.listxattr(file) == []


def test_the_programs_own_are_readable_and_not_listed(file: Path) -> None:
    assert os.getxattr(file, "user.metadisk.state") in (b"pending", b"stored")
    filehash, _, key = os.getxattr(file, "user.metadisk.link").decode().strip().partition("?key=")
    assert len(bytes.fromhex(filehash)) == len(bytes.fromhex(key)) == 32
    assert os.listxattr(file) == []
    for name in ("user.metadisk.state", "user.metadisk.link", "user.metadisk.new"):
        with raises(errno.EPERM):
            os.setxattr(file, name, b"x")
        with raises(errno.EPERM):
            os.removexattr(file, name)
    with raises(errno.ENODATA):
        os.getxattr(file, "user.metadisk.new")
    with raises(errno.ENODATA):
        os.getxattr(file.parent, "user.metadisk.state")


def test_they_change_the_ctime_and_survive_a_copy(file: Path) -> None:
    before = file.stat()
    os.setxattr(file, "user.a", b"1")
    after = file.stat()
    assert (after.st_ctime_ns > before.st_ctime_ns, after.st_mtime_ns) == (True, before.st_mtime_ns)
    subprocess.run(["cp", "-a", str(file), str(file.with_name("copy"))], check=True)
    assert os.listxattr(file.with_name("copy")) == ["user.a"]
    os.removexattr(file, "user.a")
    assert file.stat().st_ctime_ns > after.st_ctime_ns
