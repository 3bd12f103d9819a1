"""A process that does what it is told as a certain user: started once, asked many times.

Run as a script it becomes that user and answers requests on its stdin: a list of (folder, statement) pairs, each
statement one line of Python executed in its folder. The answer is what the statement's last expression gave, or the
name of the errno it failed with. Programs are not started and nothing is imported after the change of user: the
interpreter may lie where that user cannot read.
"""

import ctypes
import encodings.idna  # noqa: F401 - before the user changes
import errno
import fcntl
import mmap
import os
import pickle
import platform
import select
import socket
import stat
import struct
import sys
import time
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_RENAMEAT2, _FALLOCATE = "renameat2", "fallocate"
_AT_FDCWD = -100
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32
X = b"x"


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def rename2(old: str, new: str, flags: int) -> None:
    """renameat2(2)."""
    _checked(_LIBC.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags))


def fallocate(path: str, mode: int, offset: int, length: int) -> None:
    """fallocate(2) on a file opened for it."""
    fd = os.open(path, os.O_RDWR)
    try:
        _checked(_LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))
    finally:
        os.close(fd)


def opened(path: str, flags: int, mode: int = 0o644) -> str:
    """Open and close; never waits for the other end of a FIFO."""
    os.close(os.open(path, flags | os.O_NONBLOCK, mode))
    return "ok"


def with_fd(path: str, flags: int, function: Any, *arguments: Any) -> Any:
    """Call ``function(fd, ...)`` on the file opened."""
    fd = os.open(path, flags)
    try:
        return function(fd, *arguments)
    finally:
        os.close(fd)


def store_mapped(path: str) -> None:
    """Change the first byte through a shared mapping."""
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 0) as mapped:
        os.close(fd)
        mapped[0] = 88
        mapped.flush()


def copied(source: str, target: str) -> int:
    """copy_file_range(2) of the whole file, or a copy by hand where that is refused."""
    one, two = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY)
    try:
        return os.copy_file_range(one, two, 1 << 20)
    finally:
        os.close(one)
        os.close(two)


def took(path: str) -> bool:
    """Whether this process is the one that created the file."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def snapshot() -> dict[str, tuple[Any, ...]]:
    """What stat says of the current folder and everything below; inode numbers stand first, times last but one.

    stat comes before the look inside, which changes the access time of folders and symlinks.
    """
    found: dict[str, tuple[Any, ...]] = {}
    paths = ["."]
    for path in paths:
        status = os.lstat(path)
        size = status.st_size if not stat.S_ISDIR(status.st_mode) else -1
        times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
        attributes = (oct(status.st_mode), status.st_uid, status.st_gid, status.st_nlink, size, status.st_rdev)
        found[path] = (status.st_ino, *attributes, target, *times)
        if stat.S_ISDIR(status.st_mode):
            paths += [f"{path}/{name}" for name in sorted(os.listdir(path))]
    return found


def look_around() -> None:
    """Read every folder and symlink here, so that a later look changes no access time any more."""
    paths = ["."]
    for path in paths:
        if os.path.islink(path):
            os.readlink(path)
        elif os.path.isdir(path):
            paths += [f"{path}/{name}" for name in os.listdir(path)]


def _become(uid: int, gid: int, groups: list[int]) -> None:
    os.umask(0)
    if uid or gid or groups:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


def _execute(folder: str, statement: str, scope: dict[str, Any]) -> Any:
    try:
        os.chdir(folder)
        head, _, last = statement.rpartition("; ")
        if head:
            exec(head, scope)
        return eval(last, scope)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _serve() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    scope = {name: value for name, value in globals().items() if not name.startswith("_")}
    while True:
        try:
            batch = pickle.load(requests)
        except EOFError:
            return
        done = [_execute(folder, statement, scope) for folder, statement in batch]
        os.chdir("/")  # or a mount could not be ended
        pickle.dump(done, answers)
        answers.flush()


if __name__ == "__main__":
    assert all((fcntl, platform, select, socket, struct, time))  # for the statements
    _become(int(sys.argv[1]), int(sys.argv[2]), [int(group) for group in sys.argv[3:]])
    _serve()
