"""Random file operations on a mount, each told to the model before and after."""

import contextlib
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from metadiskfs.torture.model import Directory, File, Model, Names, Symlink

T = TypeVar("T")

_CHUNK = 64 << 10
_FILE_MAX = 5 * _CHUNK
_STATES_MAX = 10
_HANDLES_MAX = 8
_NAMES_MAX = 60
_DIRECTORIES_MAX = 8


class Difference(Exception):
    """The mount answered otherwise than promised."""


class _NothingToDo(Exception):
    """There is no file, handle or room for this act just now."""


@dataclass(slots=True)
class Handle:
    fd: int
    file: File
    writable: bool
    append: bool


class Player:
    """Raises OSError as the mount does, and Difference."""

    def __init__(self, root: Path, model: Model, dice: random.Random) -> None:
        self._root = root
        self._model = model
        self._dice = dice
        self._handles: list[Handle] = []
        self._serial = 0
        self.counts: Counter[str] = Counter()
        self._acts: list[tuple[Callable[[], None], int]] = [
            (self._create, 14),
            (self._open, 10),
            (self._close, 14),
            (self._write, 30),
            (self._truncate_open, 6),
            (self._fsync, 10),
            (self._read, 14),
            (self._replace_whole, 8),
            (self._truncate_path, 4),
            (self._rename, 8),
            (self._replace, 8),
            (self._unlink, 8),
            (self._link, 4),
            (self._symlink, 2),
            (self._mkdir, 4),
            (self._rmdir, 2),
            (self._list, 3),
        ]

    def act(self) -> None:
        """Do one thing, whatever there is something to do it with."""
        acts, weights = zip(*self._acts, strict=True)
        while True:
            act = self._dice.choices(acts, weights)[0]
            try:
                act()
                break
            except _NothingToDo:
                continue
        self.counts[act.__name__.strip("_").replace("_", "-")] += 1

    def drop_handles(self) -> None:
        """Close everything, whatever is at the other end."""
        while self._handles:
            with contextlib.suppress(OSError):
                os.close(self._handles.pop().fd)

    def close_all(self) -> None:
        """Close everything as a program would; each close is a promise."""
        while self._handles:
            self._close()

    # -- content --------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        if len(self._model.names) >= _NAMES_MAX or len(self._handles) >= _HANDLES_MAX:
            raise _NothingToDo
        path, file = self._new_path(), File()
        append = self._dice.random() < 0.2
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | (os.O_APPEND if append else 0)
        fd = self._rename_like({path: file}, (), lambda: os.open(self._at(path), flags, 0o644))
        self._handles.append(Handle(fd, file, True, append))
        self._write_to(self._handles[-1])

    def _open(self) -> None:
        if len(self._handles) >= _HANDLES_MAX:
            raise _NothingToDo
        path = self._some_file()
        file = self._file(path)
        mode = self._dice.choice(
            [os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND]
        )
        if mode & os.O_TRUNC:
            file.expect(b"")
        fd = os.open(self._at(path), mode)
        if mode & os.O_TRUNC:
            file.changed(b"")
        self._handles.append(Handle(fd, file, mode & os.O_ACCMODE != os.O_RDONLY, bool(mode & os.O_APPEND)))

    def _close(self) -> None:
        if not self._handles:
            raise _NothingToDo
        handle = self._handles.pop(self._dice.randrange(len(self._handles)))
        os.close(handle.fd)
        if handle.writable:
            handle.file.promised()

    def _write(self) -> None:
        self._write_to(self._some_writable())

    def _write_to(self, handle: Handle) -> None:
        file, data = handle.file, self._bytes()
        offset = len(file.now) if handle.append else self._dice.randint(0, min(len(file.now) + 1000, _FILE_MAX))
        file.write_begins(offset, data)
        done = 0
        while done < len(data):  # a mount that dies over it takes a part first, and fails with the next
            rest = data[done:]
            done += os.write(handle.fd, rest) if handle.append else os.pwrite(handle.fd, rest, offset + done)
        file.write_ended()
        if len(file.states) > _STATES_MAX:
            self._sync_handle(handle)

    def _truncate_open(self) -> None:
        handle = self._some_writable()
        self._change_size(handle.file, lambda size: os.ftruncate(handle.fd, size))

    def _truncate_path(self) -> None:
        path = self._some_file()
        self._change_size(self._file(path), lambda size: os.truncate(self._at(path), size))
        self._file(path).promised()

    def _change_size(self, file: File, change: Callable[[int], None]) -> None:
        size = self._dice.choice([0, self._dice.randint(0, len(file.now)), self._dice.randint(0, _FILE_MAX)])
        content = file.now[:size].ljust(size, b"\0")
        file.expect(content)
        change(size)
        file.changed(content)

    def _fsync(self) -> None:
        if not self._handles:
            raise _NothingToDo
        self._sync_handle(self._dice.choice(self._handles))

    def _sync_handle(self, handle: Handle) -> None:
        os.fsync(handle.fd)
        handle.file.promised()

    def _read(self) -> None:
        path = self._some_file()
        file = self._file(path)
        with open(self._at(path), "rb") as opened:
            offset = self._dice.choice([0, self._dice.randint(0, len(file.now))])
            opened.seek(offset)
            content = opened.read()
        if content != file.now[offset:]:
            raise Difference(f"{path} reads wrong from {offset} on: {len(content)} of {len(file.now) - offset} bytes")

    def _replace_whole(self) -> None:
        """As editors do: a new file, synced or not, renamed over the old one."""
        path = self._some_file()
        temporary, file = self._new_path(), File()
        data = self._bytes()
        fd = self._rename_like({temporary: file}, (), lambda: os.open(self._at(temporary), os.O_CREAT | os.O_WRONLY))
        self._handles.append(Handle(fd, file, True, False))
        file.expect(data)
        os.write(fd, data)
        file.changed(data)
        if self._dice.random() < 0.5:
            self._sync_handle(self._handles[-1])
        handle = self._handles.pop()
        os.close(handle.fd)
        file.promised()
        self._move(temporary, path)

    # -- names ----------------------------------------------------------------------------------------------------

    def _rename(self) -> None:
        self._move(self._some_file(), self._new_path())

    def _replace(self) -> None:
        old, new = self._some_file(), self._some_file()
        if self._file(old) is self._file(new):
            raise _NothingToDo
        self._move(old, new)

    def _move(self, old: str, new: str) -> None:
        file = self._file(old)
        self._rename_like({new: file}, (old,), lambda: os.rename(self._at(old), self._at(new)))

    def _unlink(self) -> None:
        paths = [path for path, entry in self._model.names.items() if not isinstance(entry, Directory)]
        if not paths:
            raise _NothingToDo
        path = self._dice.choice(paths)
        entry = self._model.names[path]
        if isinstance(entry, File) and any(handle.file is entry for handle in self._handles):
            self._model.unlinked_open(path, entry)
        self._rename_like({}, (path,), lambda: os.unlink(self._at(path)))

    def _link(self) -> None:
        old, new = self._some_file(), self._new_path()
        if len(self._model.names) >= _NAMES_MAX:
            raise _NothingToDo
        self._rename_like({new: self._file(old)}, (), lambda: os.link(self._at(old), self._at(new)))

    def _symlink(self) -> None:
        path, target = self._new_path(), f"target-{self._dice.randrange(1000)}"
        if len(self._model.names) >= _NAMES_MAX:
            raise _NothingToDo
        self._rename_like({path: Symlink(target)}, (), lambda: os.symlink(target, self._at(path)))

    def _mkdir(self) -> None:
        if len(self._model.directories()) >= _DIRECTORIES_MAX:
            raise _NothingToDo
        path = self._new_path("d")
        self._rename_like({path: Directory()}, (), lambda: os.mkdir(self._at(path)))

    def _rmdir(self) -> None:
        full = {os.path.dirname(path) for path in self._model.names}
        empty = [path for path in self._model.directories() if path and path not in full]
        if not empty:
            raise _NothingToDo
        path = self._dice.choice(empty)
        self._rename_like({}, (path,), lambda: os.rmdir(self._at(path)))

    def _list(self) -> None:
        folder = self._dice.choice(self._model.directories())
        prefix = f"{folder}/" if folder else ""
        expected = {
            path.removeprefix(prefix)
            for path in self._model.names
            if path.startswith(prefix) and "/" not in path.removeprefix(prefix)
        }
        found = {name for name in os.listdir(self._at(folder)) if name != "lost+found"}
        if found != expected:
            raise Difference(f"/{folder} lists {sorted(found ^ expected)} otherwise than it should")

    def _rename_like(self, added: Names, removed: tuple[str, ...], act: Callable[[], T]) -> T:
        """An act on names: atomic, so after a crash all or nothing of it is there."""
        after = {path: entry for path, entry in self._model.names.items() if path not in removed} | added
        self._model.pending = after
        result = act()
        self._model.names = after
        self._model.pending = None
        return result

    # -- dice -----------------------------------------------------------------------------------------------------

    def _at(self, path: str) -> str:
        return os.path.join(self._root, path)

    def _file(self, path: str) -> File:
        file = self._model.names[path]
        assert isinstance(file, File)
        return file

    def _some_file(self) -> str:
        files = self._model.files()
        if not files:
            raise _NothingToDo
        return self._dice.choice(files)

    def _some_writable(self) -> Handle:
        writable = [handle for handle in self._handles if handle.writable]
        if not writable:
            raise _NothingToDo
        return self._dice.choice(writable)

    def _new_path(self, letter: str = "f") -> str:
        self._serial += 1
        return os.path.join(self._dice.choice(self._model.directories()), f"{letter}{self._serial}")

    def _bytes(self) -> bytes:
        """Often content that was there before, so that chunks are shared."""
        size = self._dice.choice([1, 100, 4096, _CHUNK - 1, _CHUNK, self._dice.randint(1, 2 * _CHUNK)])
        seed = self._dice.randrange(40) if self._dice.random() < 0.3 else self._dice.getrandbits(64)
        return random.Random(seed).randbytes(size)
