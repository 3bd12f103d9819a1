"""Guessing what will be read next: the chunks behind a sequential reader, the small files behind one in a folder.

Guesses cost at most some transfer: nothing here waits, and errors are left to the read that really needs the chunk.
Racing threads may at worst guess twice.
"""

from metadiskfs.fs.content import Content
from metadiskfs.fs.tree import Tree
from metadiskfs.store.chunks import Chunks
from metadiskfs.store.fetcher import Fetcher

_CHUNKS_AHEAD = 4
"""Chunks fetched ahead of a sequential reader at most."""
_RUN_PER_CHUNK = 1 << 20
"""Bytes read in sequence for each chunk more."""
_OUT_OF_ORDER = 2 << 20
"""Bytes: the kernel's own read-ahead sends requests on several threads, so they overtake each other by so much."""
_FILES_AHEAD = 16
_FOLDERS = 64
_IN_ORDER = 2
"""Misses in the order of names after which a folder counts as read in order."""


class FileReader:
    """How one handle is read: ``run`` bytes in sequence so far, chunks fetched ahead up to slot ``ahead_to``."""

    __slots__ = ("ahead_to", "next_offset", "run")

    def __init__(self) -> None:
        self.next_offset = 0
        self.run = 0
        self.ahead_to = 0


class _FolderReader:
    """How a folder is read: the last name, how many in order, up to which name is fetched, where to fetch on."""

    __slots__ = ("ahead_to", "last", "run", "trigger")

    def __init__(self, name: bytes) -> None:
        self.last = name
        self.run = 1
        self.ahead_to = b""
        self.trigger = b""


class ReadAhead:
    """Watches reads and starts fetches. Safe to use from any thread."""

    def __init__(self, tree: Tree, chunks: Chunks, fetcher: Fetcher, *, chunk_size: int) -> None:
        self._tree = tree
        self._chunks = chunks
        self._fetcher = fetcher
        self._chunk_size = chunk_size
        self._folders: dict[int, _FolderReader] = {}

    def read(self, reader: FileReader, content: Content, offset: int, length: int) -> None:
        """A handle reads: fetch behind it, more the longer it goes on; nothing for a random reader."""
        if abs(offset - reader.next_offset) > _OUT_OF_ORDER:
            reader.run = reader.ahead_to = 0
        else:
            reader.run += length
            ahead = min(_CHUNKS_AHEAD, reader.run // _RUN_PER_CHUNK + 1)
            slot = offset // self._chunk_size + 1
            if slot + ahead > reader.ahead_to and slot * self._chunk_size < content.inode.size:
                reader.ahead_to = slot + ahead
                if missing := content.chunks_ahead(slot * self._chunk_size, ahead):
                    self._fetcher.prefetch(missing)
        reader.next_offset = offset + length

    def missed(self, path: bytes) -> None:
        """A small file had to be fetched: perhaps the ones behind it in its folder are next."""
        parent, name = self._tree.resolve_parent(path)
        reader = self._folders.get(parent.number)
        if reader is None:
            if len(self._folders) >= _FOLDERS:
                self._folders.pop(next(iter(self._folders)), None)
            self._folders[parent.number] = _FolderReader(name)
            return
        reader.run = reader.run + 1 if name > reader.last else 0
        reader.last = name
        if reader.run >= _IN_ORDER:
            self._fetch_behind(parent.number, reader, name)

    def opened(self, path: bytes) -> None:
        """A file is opened: go on in a folder that is read in order, before its next file is missed."""
        if not self._folders:
            return
        try:
            parent, name = self._tree.resolve_parent(path)
        except OSError:
            return
        reader = self._folders.get(parent.number)
        if reader is not None and reader.trigger and reader.trigger <= name <= reader.ahead_to:
            reader.last = name
            self._fetch_behind(parent.number, reader, reader.ahead_to)

    def _fetch_behind(self, folder: int, reader: _FolderReader, name: bytes) -> None:
        ahead = self._chunks.small_files_after(folder, name, _FILES_AHEAD)
        if not ahead:
            self._folders.pop(folder, None)
            return
        reader.trigger, reader.ahead_to = ahead[len(ahead) // 2][0], ahead[-1][0]
        self._fetcher.prefetch([chunk for _, chunk in ahead])
