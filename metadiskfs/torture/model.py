"""What a volume owes: its names and contents as told to it, and after a crash which contents it may show.

A file's ``states`` are the contents it may have after a crash: the last one that close, fsync or sync promised, and
every later one. Without later ones there is exactly one. Between an fsync and the next promise writes go to the same
work files, so what is found may be a mixture, byte by byte, of the states.
"""

import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

LOST_AND_FOUND = "lost+found"
_GHOST_SECONDS = 5.0
"""How long after a plain user's unlink of an open file a crash may bring its name back (fs/hidden.py)."""
_STRIDE = 4096


class File:
    """A regular file: one object however many names and handles it has."""

    def __init__(self, content: bytes = b"") -> None:
        self.now = content
        self.states = [content]
        self._write: tuple[bytes, int, bytes] | None = None

    def write_begins(self, offset: int, data: bytes) -> None:
        """A write is under way: the kernel hands it on in pieces, so that a part of it may be all there is."""
        before = self.now.ljust(offset, b"\0")
        self._write = (before, offset, data)
        self.expect(_overwritten(before, offset, data))

    def write_ended(self) -> None:
        before, offset, data = self._write or (self.now, 0, b"")
        self.changed(_overwritten(before, offset, data))

    def changed(self, content: bytes) -> None:
        self.now = content
        self._write = None
        if content != self.states[-1]:
            self.states.append(content)

    def expect(self, content: bytes) -> None:
        """It may become this: the change is under way."""
        if content != self.states[-1]:
            self.states.append(content)

    def promised(self) -> None:
        self.states = [self.now]
        self._write = None

    def accepts(self, content: bytes) -> bool:
        """Whether this may be found after a crash."""
        if content in self.states or self._is_part_of_write(content):
            return True
        if len(content) not in {len(state) for state in self.states}:
            return False
        return all(self._piece_accepted(content, start) for start in range(0, len(content), _STRIDE))

    def _is_part_of_write(self, content: bytes) -> bool:
        if self._write is None:
            return False
        before, offset, data = self._write
        pairs = zip(content[offset:], data, strict=False)
        taken = next((place for place, (one, two) in enumerate(pairs) if one != two), len(data))
        return content == _overwritten(before, offset, data[: min(taken, max(0, len(content) - offset))])

    def _piece_accepted(self, content: bytes, start: int) -> bool:
        piece = content[start : start + _STRIDE]
        pieces = [state[start : start + _STRIDE] for state in self.states]
        if piece in pieces:
            return True
        return all(any(place < len(one) and one[place] == byte for one in pieces) for place, byte in enumerate(piece))


def _overwritten(before: bytes, offset: int, data: bytes) -> bytes:
    return before[:offset] + data + before[offset + len(data) :]


@dataclass(frozen=True, slots=True)
class Symlink:
    target: str


class Directory:
    """Equal to every other directory: only its name matters."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Directory)

    __hash__ = None  # type: ignore[assignment]


Entry = File | Symlink | Directory
Names = dict[str, Entry]


@dataclass(slots=True)
class Model:
    """``names`` by path below the root; ``pending`` is how they look when the act under way was done."""

    names: Names = field(default_factory=dict)
    pending: Names | None = None
    ghosts: dict[str, tuple[File, float]] = field(default_factory=dict)

    def files(self) -> list[str]:
        return [path for path, entry in self.names.items() if isinstance(entry, File)]

    def directories(self) -> list[str]:
        return ["", *(path for path, entry in self.names.items() if isinstance(entry, Directory))]

    def unlinked_open(self, path: str, file: File) -> None:
        if os.geteuid():
            self.ghosts[path] = (file, time.monotonic())

    def promise_all(self) -> None:
        for entry in self.names.values():
            if isinstance(entry, File):
                entry.promised()

    # -- comparing ------------------------------------------------------------------------------------------------

    def settle(self, root: Path) -> list[str]:
        """Compare with what is found after a crash, and take that for the truth. Returns the differences."""
        found = {path: os.lstat(root / path) for path in _walk(root)}
        self._add_ghosts(found)
        names = self.names
        if self.pending is not None and _fits(self.pending, found) and not _fits(names, found):
            names = self.pending
        differences = [f"{path} is missing" for path in names.keys() - found.keys()]
        differences += [f"{path} should not be there" for path in found.keys() - names.keys()]
        links: dict[int, tuple[File, int]] = {}
        for path in sorted(names.keys() & found.keys()):
            differences += _compare(root / path, path, names[path], found[path], names, links)
        self.names = _as_found(root, found, names)
        self.pending = None
        self.ghosts.clear()
        return differences

    def _add_ghosts(self, found: dict[str, os.stat_result]) -> None:
        for path, (file, since) in self.ghosts.items():
            if path in found and path not in self.names and time.monotonic() - since < _GHOST_SECONDS:
                self.names[path] = file
                if self.pending is not None:
                    self.pending[path] = file

    def compare_live(self, root: Path) -> list[str]:
        """Compare with a mount that was never killed: nothing but the last content will do."""
        for entry in self.names.values():
            if isinstance(entry, File):
                entry.promised()
        self.ghosts.clear()
        return self.settle(root)


def _walk(root: Path) -> list[str]:
    """Every path below the root but what a crash put into lost+found."""
    paths = []
    for folder, directories, files in os.walk(root):
        inner = os.path.relpath(folder, root)
        if inner == ".":
            inner = ""
            if LOST_AND_FOUND in directories:
                directories.remove(LOST_AND_FOUND)
        paths += [os.path.join(inner, name) for name in (*directories, *files)]
    return paths


def _fits(names: Names, found: dict[str, os.stat_result]) -> bool:
    return names.keys() == found.keys() and all(
        _kind(entry) == stat.S_IFMT(found[path].st_mode) for path, entry in names.items()
    )


def _kind(entry: Entry) -> int:
    return {File: stat.S_IFREG, Symlink: stat.S_IFLNK, Directory: stat.S_IFDIR}[type(entry)]


def _compare(
    place: Path,
    path: str,
    entry: Entry,
    found: os.stat_result,
    names: Names,
    links: dict[int, tuple[File, int]],
) -> list[str]:
    if _kind(entry) != stat.S_IFMT(found.st_mode):
        return [f"{path} is of another kind"]
    if isinstance(entry, Symlink):
        return [] if os.readlink(place) == entry.target else [f"{path} points elsewhere"]
    if isinstance(entry, Directory):
        return []
    differences = []
    content = place.read_bytes()
    if not entry.accepts(content):
        sizes = ", ".join(str(len(state)) for state in entry.states)
        differences.append(f"{path} has a wrong content of {len(content)} bytes (it may have: {sizes})")
    if found.st_size != len(content):
        differences.append(f"{path} has {len(content)} bytes, stat says {found.st_size}")
    count = sum(other is entry for other in names.values())
    if found.st_nlink != count:
        differences.append(f"{path} has {found.st_nlink} links instead of {count}")
    known = links.setdefault(id(entry), (entry, found.st_ino))
    if known[1] != found.st_ino:
        differences.append(f"{path} is no longer the same file as its other names")
    return differences


def _as_found(root: Path, found: dict[str, os.stat_result], names: Names) -> Names:
    """The names as they are now; files keep their objects, with what they hold as their one state."""
    settled: Names = {}
    by_number: dict[int, File] = {}
    for path, status in found.items():
        if stat.S_ISDIR(status.st_mode):
            settled[path] = Directory()
        elif stat.S_ISLNK(status.st_mode):
            settled[path] = Symlink(os.readlink(root / path))
        else:
            before = names.get(path)
            if not isinstance(before, File) or before in by_number.values():
                before = File()
            file = by_number.setdefault(status.st_ino, before)
            file.now = (root / path).read_bytes()
            file.promised()
            settled[path] = file
    return settled
