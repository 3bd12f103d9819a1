"""Open directories."""

from typing import Any

from metadiskfs.fs.inode import Inode
from metadiskfs.store.index import Index

_LISTED_AT_ONCE = 1000


class Listing:
    """One open directory: its names in order, read in pieces; the n-th stays the n-th while it is open."""

    def __init__(self, directory: Inode, index: Index) -> None:
        self.directory = directory
        self._index = index
        self._names: list[bytes] = []
        self._rows: dict[int, tuple[Any, ...]] = {}
        self._complete = False

    def entry(self, position: int) -> tuple[Any, ...] | None:
        """(name, *InodeRow) of the entry at ``position``, None behind the last one."""
        row = self._rows.get(position)
        if row is None:
            self._load(position)
            row = self._rows.get(position)
        return row

    def restart(self) -> None:
        """rewinddir(3): the names that are there now."""
        self._names.clear()
        self._rows.clear()
        self._complete = False

    def _load(self, position: int) -> None:
        self._rows.clear()
        if position < len(self._names):  # went back: the same names again, with what they stand for now
            after = self._names[position - 1] if position else b""
            rows = self._index.list_names(self.directory.number, after, _LISTED_AT_ONCE)
            places = {name: place for place, name in enumerate(self._names[position:], position)}
            self._rows = {places[row[0]]: row for row in rows if row[0] in places}
            return
        while not self._complete and position >= len(self._names):
            after = self._names[-1] if self._names else b""
            rows = self._index.list_names(self.directory.number, after, _LISTED_AT_ONCE)
            self._complete = len(rows) < _LISTED_AT_ONCE
            start = len(self._names)
            self._names.extend(row[0] for row in rows)
            self._rows = dict(enumerate(rows, start))

    def __len__(self) -> int:
        return len(self._names)
