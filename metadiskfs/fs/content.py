"""What one open file holds: reading, writing, and sealing what was written into chunks.

A slot's bytes are in its work file if it has one, else in its chunk, else they are zeros. Lock order: ``seal_lock``
-> ``lock`` -> cache -> index. Hashing happens under ``seal_lock`` alone: a work file that is being sealed is frozen,
and whoever writes into its slot meanwhile gets a copy. Nobody waits for the network under ``lock``: what is missing
is fetched first, then everything is looked at again.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from metadiskfs.crash import crash_point
from metadiskfs.fs.inode import Inode
from metadiskfs.fs.work import Hasher, WorkFile
from metadiskfs.store.cache import Cache
from metadiskfs.store.chunks import Chunks, ContentChange, SealedWork, Slot
from metadiskfs.store.fetcher import Fetcher
from metadiskfs.store.files import Digest, copy_range, fsync_folder, read_at
from metadiskfs.store.index import Index

_SMALL = 32 * 1024
"""Bytes that are hashed while they are written: to read them again costs more."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Store:
    """The parts of the store a file's content works with."""

    index: Index
    cache: Cache
    chunks: Chunks
    fetcher: Fetcher
    hasher: Hasher
    chunk_size: int


class _Missing(Exception):
    """A chunk must be fetched before this can go on."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk


class Content:
    """The content of one regular file, shared by all its handles. Safe to use from any thread."""

    def __init__(self, inode: Inode, store: Store) -> None:
        self.inode = inode
        self.lock = threading.Lock()
        self.seal_lock = threading.Lock()
        self._store = store
        self._chunk_size = store.chunk_size
        self._work: dict[int, WorkFile] = {}
        self._replaced: list[WorkFile] = []
        """Durable work files no slot uses any more: rows name them until the next commit."""
        self._slots: dict[int, Slot] = store.chunks.slots_of(inode.number) if inode.held or inode.size else {}
        self._removed_from: int | None = None
        self._changed: dict[int, Slot | None] = {}
        self._version = 0
        self._committed = 0
        self.last_write = 0.0
        self.was_missed = False
        """Set by a read that had to fetch."""

    @property
    def is_dirty(self) -> bool:
        """Whether something is not in the index yet."""
        return self._version != self._committed or bool(self._work)

    # -- reading --------------------------------------------------------------------------------------------------

    def read_into(self, view: memoryview, offset: int, *, meanwhile: Callable[[], None]) -> int:
        """Fill ``view`` from ``offset`` on; returns how many bytes there were. Raises NodeError (EIO).

        ``meanwhile`` is called once what must be fetched has been asked for.
        """
        missing: list[tuple[int, memoryview, int]] = []
        with self.lock:
            count = min(len(view), self.inode.size - offset)
            if count <= 0:
                return 0
            position = 0
            while position < count:
                slot, start = divmod(offset + position, self._chunk_size)
                piece = view[position : min(count, position + self._chunk_size - start)]
                position += len(piece)
                if (absent := self._read_slot(slot, start, piece)) is not None:
                    missing.append((absent.chunk, piece[: absent.length - start], start))
        self.was_missed = self.was_missed or bool(missing)
        if not missing:
            meanwhile()
        for chunk, piece, start in missing:  # chunks never change, so this is still what was asked for
            self._store.fetcher.read(chunk, piece, start, meanwhile=meanwhile)
        return count

    def _read_slot(self, slot: int, start: int, piece: memoryview) -> Slot | None:
        """Read from one slot what is on this machine; the Slot where its chunk must be fetched first."""
        work = self._work.get(slot)
        filled = 0
        if work is not None:
            with self._store.cache.descriptors.borrow(work.path) as fd:
                filled = read_at(fd, piece[: max(0, work.length - start)], start)
        elif (held := self._slots.get(slot)) is not None and start < held.length:
            opened = self._store.cache.open_chunk(held.sha256)
            if opened is None:
                filled = held.length - start
                piece[filled:] = bytes(max(0, len(piece) - filled))
                return held
            with opened as fd:
                filled = read_at(fd, piece[: held.length - start], start)
        if filled < len(piece):
            piece[filled:] = bytes(len(piece) - filled)
        return None

    def chunks_ahead(self, offset: int, count: int) -> list[int]:
        """Chunks of the next ``count`` slots from ``offset`` on that are not on this machine."""
        first = offset // self._chunk_size
        with self.lock:
            slots = [self._slots.get(slot) for slot in range(first, first + count) if slot not in self._work]
        return [slot.chunk for slot in slots if slot is not None and not self._store.cache.has_chunk(slot.sha256)]

    # -- writing --------------------------------------------------------------------------------------------------

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset`` (bytes). Raises OSError (ENOSPC) and NodeError (EIO)."""
        while True:
            try:
                with self.lock:
                    self._write(data, offset)
                return
            except _Missing as missing:
                self._store.fetcher.ensure(missing.chunk)

    def append(self, data: memoryview) -> int:
        """Write at the end as it is at that moment; returns where that was."""
        while True:
            try:
                with self.lock:
                    offset = self.inode.size
                    self._write(data, offset)
                return offset
            except _Missing as missing:
                self._store.fetcher.ensure(missing.chunk)

    def _write(self, data: memoryview, offset: int) -> None:
        inode, position = self.inode, 0
        while position < len(data):
            slot, start = divmod(offset + position, self._chunk_size)
            piece = data[position : position + self._chunk_size - start]
            self._write_slot(slot, start, piece)
            position += len(piece)
            inode.size = max(inode.size, offset + position)
        self._modified()

    def _write_slot(self, slot: int, start: int, piece: memoryview) -> None:
        stop = start + len(piece)
        work = self._work.get(slot)
        if work is None or work.frozen:
            work = self._make_writable(slot, overwritten_to=stop if start == 0 else 0)
        work.version += 1
        with self._store.cache.descriptors.borrow(work.path) as fd:
            written = 0
            try:
                while written < len(piece):
                    written += os.pwrite(fd, piece[written:], start + written)
            except OSError:
                if start + written > work.length:
                    os.ftruncate(fd, work.length)  # a full disk takes a part first, which nobody was told of
                raise
        work.version += 1
        if stop > work.length:
            self._grew(stop - work.length)
            work.length = stop
        if start == 0 and stop == work.length <= _SMALL:  # probably all there will be
            work.digest = (work.version, Digest(hashlib.sha256(piece).digest(), stop))
        if stop == self._chunk_size:
            self._store.hasher.submit(work)

    def _make_writable(self, slot: int, *, overwritten_to: int) -> WorkFile:
        """Give a slot a work file of its own with its present content, unless all of that is being overwritten.

        Raises _Missing when that content must be fetched first.
        """
        cache = self._store.cache
        frozen = self._work.get(slot)
        held = self._slots.get(slot) if frozen is None else None
        length = frozen.length if frozen is not None else held.length if held is not None else 0
        work = WorkFile(cache.new_work_path(self.inode.number, slot))
        with cache.descriptors.borrow(work.path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as target:
            if length > overwritten_to:
                try:
                    self._copy_present(frozen, held, target, length)
                except BaseException:
                    cache.discard_work(work.path, 0)
                    raise
                work.length = length
                cache.count(pending=length)
            else:
                self.inode.held -= length
        self._work[slot] = work
        return work

    def _copy_present(self, frozen: WorkFile | None, held: Slot | None, target: int, length: int) -> None:
        if frozen is not None:
            with self._store.cache.descriptors.borrow(frozen.path) as source:
                copy_range(source, target, length)
        elif held is not None:
            opened = self._store.cache.open_chunk(held.sha256)
            if opened is None:
                raise _Missing(held.chunk)
            with opened as source:
                copy_range(source, target, length)

    def _grew(self, size: int) -> None:
        self.inode.held += size
        self._store.cache.count(pending=size)

    def _modified(self) -> None:
        self._version += 1
        self.inode.mtime_ns = self.inode.ctime_ns = time.time_ns()
        self.last_write = time.monotonic()

    def truncate(self, size: int) -> None:
        """Cut or extend the file to ``size`` bytes; what is added reads as zeros. In memory until the next seal."""
        with self.lock:
            if size < self.inode.size:
                self._cut(size)
            self.inode.size = size
            self._modified()

    def touch(self) -> None:
        """Note a change that left every byte as it was."""
        with self.lock:
            self._modified()

    def _cut(self, size: int) -> None:
        last, rest = divmod(size, self._chunk_size)
        first_gone = last + 1 if rest else last
        for slot in [slot for slot in self._work if slot >= first_gone]:
            self._drop_work(slot)
        for slot in [slot for slot in self._slots if slot >= first_gone]:
            self.inode.held -= self._slots.pop(slot).length
        for slot in [slot for slot in self._changed if slot >= first_gone]:
            del self._changed[slot]
        self._removed_from = first_gone if self._removed_from is None else min(self._removed_from, first_gone)
        if rest:
            self._shorten(last, rest)

    def _drop_work(self, slot: int) -> None:
        work = self._work.pop(slot)
        held = self._slots.get(slot)
        self.inode.held += (held.length if held is not None else 0) - work.length
        if not work.frozen:  # a frozen one is discarded by the seal that holds it
            self._discard(work)

    def _discard(self, work: WorkFile) -> None:
        """Free a work file; one that fsync vouched for only when the commit that no longer names it is done."""
        if work.durable:
            self._replaced.append(work)
        else:
            self._store.cache.discard_work(work.path, work.length)

    def _shorten(self, slot: int, length: int) -> None:
        """Let only the first ``length`` bytes of a slot count."""
        held = self._slots.get(slot)
        if held is not None and held.length > length:
            if slot not in self._work:
                self.inode.held -= held.length - length
            shorter = Slot(held.chunk, held.sha256, held.size, length)
            self._slots[slot] = self._changed[slot] = shorter
        work = self._work.get(slot)
        if work is not None and work.length > length:
            if work.frozen or work.durable:  # the row of a durable one says how long it is
                self._make_writable(slot, overwritten_to=0)
                if not work.frozen:
                    self._discard(work)
                work = self._work[slot]
            work.version += 1
            with self._store.cache.descriptors.borrow(work.path) as fd:
                os.ftruncate(fd, length)
            self._grew(length - work.length)
            work.length = length
            work.version += 1

    def punch(self, offset: int, length: int) -> None:
        """Make a range read as zeros, freeing the slots it covers whole. The size stays."""
        with self.lock:
            stop = min(offset + length, self.inode.size)
            if stop <= offset:
                self._modified()
                return
            whole_end = -(-stop // self._chunk_size) if stop == self.inode.size else stop // self._chunk_size
            first_whole, last_whole = -(-offset // self._chunk_size), whole_end
            for slot in [slot for slot in self._work if first_whole <= slot < last_whole]:
                self._changed[slot] = None
                self._drop_work(slot)
            for slot in [slot for slot in self._slots if first_whole <= slot < last_whole]:
                self.inode.held -= self._slots.pop(slot).length
                self._changed[slot] = None
            self._modified()
            held = {*self._work, *self._slots}
        for start, end in self._partial_ranges(offset, stop, first_whole, last_whole):
            if start // self._chunk_size in held:
                self.write(memoryview(bytes(end - start)), start)

    def _partial_ranges(self, offset: int, stop: int, first_whole: int, last_whole: int) -> Iterator[tuple[int, int]]:
        if first_whole > last_whole:  # within one slot
            yield offset, stop
            return
        if offset < first_whole * self._chunk_size:
            yield offset, min(stop, first_whole * self._chunk_size)
        if last_whole * self._chunk_size < stop:
            yield last_whole * self._chunk_size, stop

    def seek_data(self, offset: int, *, hole: bool) -> int | None:
        """Where the next data (or hole) from ``offset`` on begins, in slots; the end of the file counts as a hole."""
        with self.lock:
            size = self.inode.size
            if offset >= size:
                return None
            slot = offset // self._chunk_size
            last = (size - 1) // self._chunk_size
            if hole:
                while slot <= last and (slot in self._work or slot in self._slots):
                    slot += 1
                return min(size, max(offset, slot * self._chunk_size))
            data = [n for n in (*self._work, *self._slots) if n >= slot]
            return max(offset, min(data) * self._chunk_size) if data else None

    # -- settling -------------------------------------------------------------------------------------------------

    def seal(self) -> set[int]:
        """Turn all that was written into chunks and commit them with the file's size and times.

        What others write meanwhile goes to copies and stays to be sealed; what they cut off is left out. Returns the
        chunks of the slots that were sealed. Raises CacheFull or VolumeError; then everything is as it was and still
        to be sealed.
        """
        with self.seal_lock:
            with self.lock:
                if not self.is_dirty:
                    return set()
                version, size = self._version, self.inode.size
                frozen = dict(self._work)
                for work in frozen.values():
                    work.frozen = True
            try:
                digests = {slot: self._store.hasher.hash(work) for slot, work in frozen.items()}
                with self.lock:
                    return self._commit(version, size, frozen, digests)
            except BaseException:
                self._thaw(frozen)
                raise

    def _commit(self, version: int, size: int, frozen: dict[int, WorkFile], digests: dict[int, Digest]) -> set[int]:
        size = min(size, self.inode.size)
        settled = {slot: work for slot, work in frozen.items() if self._is_wanted(slot, work, size)}
        sealed = {slot: SealedWork(work.path, digests[slot], work.durable) for slot, work in settled.items()}
        change = self._change(size=size, sealed=sealed, work={})
        slots = self._store.chunks.commit(change, durable=any(work.durable for work in settled.values()))
        for slot, work in frozen.items():
            if self._work.get(slot) is work:
                del self._work[slot]
            if slot not in settled:
                self._store.cache.discard_work(work.path, work.length)
        self._slots.update(slots)
        self._change_committed(version)
        return {slot.chunk for slot in slots.values()}

    def _is_wanted(self, slot: int, work: WorkFile, size: int) -> bool:
        """Whether a frozen work file is what the slot held at that moment: not cut off or shortened since."""
        return slot in self._work and slot * self._chunk_size + work.length <= size

    def _change(self, *, size: int, sealed: dict[int, SealedWork], work: dict[int, tuple[str, int]]) -> ContentChange:
        inode = self.inode
        return ContentChange(
            inode=inode.number,
            size=size,
            held=self._held_by_chunks(sealed),
            mtime_ns=inode.mtime_ns,
            ctime_ns=inode.ctime_ns,
            removed_from=self._removed_from,
            slots={slot: held for slot, held in self._changed.items() if slot not in sealed},
            sealed=sealed,
            work=work,
        )

    def _held_by_chunks(self, sealed: dict[int, SealedWork]) -> int:
        """The bytes that rows of slots will hold, after ``sealed`` became such: what work files hold is not in it."""
        held = self.inode.held
        for slot, work in self._work.items():
            before = self._slots.get(slot)
            length = sealed[slot].digest.size if slot in sealed else before.length if before is not None else 0
            held += length - work.length
        return held

    def _change_committed(self, version: int) -> None:
        self._removed_from = None
        self._changed.clear()
        self._committed = version
        crash_point("content-before-replaced")
        for work in self._replaced:
            self._store.cache.discard_work(work.path, work.length)
        self._replaced.clear()

    def _thaw(self, frozen: dict[int, WorkFile]) -> None:
        with self.lock:
            for slot, work in frozen.items():
                if self._work.get(slot) is work:
                    work.frozen = False
                else:
                    self._discard(work)

    def fsync(self) -> None:
        """Make everything written so far survive a power cut, without sealing it.

        Work files are synced where they lie and named in the index: the next mount adopts them.
        """
        cache = self._store.cache
        with self.seal_lock:
            with self.lock:
                version, size = self._version, self.inode.size
                work = dict(self._work)
                lengths = {slot: piece.length for slot, piece in work.items()}
                shas = [slot.sha256 for slot in self._slots.values()]
                dirty = self.is_dirty
            for piece in work.values():
                with cache.descriptors.borrow(piece.path) as fd:
                    os.fdatasync(fd)
            if any(not piece.durable for piece in work.values()):
                fsync_folder(cache.work_dir)
            cache.sync_chunks(shas)
            crash_point("fsync-before-row")
            if not dirty:
                self._store.index.make_durable()
                return
            with self.lock:
                kept = {slot: piece for slot, piece in work.items() if self._work.get(slot) is piece}
                rows = {
                    slot: (os.path.basename(piece.path), min(lengths[slot], piece.length))
                    for slot, piece in kept.items()
                }
                change = self._change(size=min(size, self.inode.size), sealed={}, work=rows)
                self._store.chunks.commit(change, durable=True)
                for piece in kept.values():
                    piece.durable = True
                self._change_committed(version)
            crash_point("fsync-after-row")

    def adopt_work(self, slot: int, path: str, length: int) -> None:
        """Take a work file of a session that died as this slot's content; its first ``length`` bytes count."""
        with self.lock:
            os.truncate(path, length)
            held = self._slots.get(slot)
            work = WorkFile(path)
            work.length = length
            work.durable = True
            self._work[slot] = work
            self._grew(length)
            self.inode.held -= held.length if held is not None else 0
            self.inode.size = max(self.inode.size, slot * self._chunk_size + length)
            self._version += 1

    def discard(self) -> None:
        """Drop what was written and not sealed: the file has no name any more and nobody has it open."""
        with self.seal_lock, self.lock:
            for slot in list(self._work):
                self._drop_work(slot)
            for work in self._replaced:
                self._store.cache.discard_work(work.path, work.length)
            self._replaced.clear()

    # -- whole slots ----------------------------------------------------------------------------------------------

    def slots(self) -> dict[int, Slot]:
        """What the sealed slots refer to, as of now."""
        with self.lock:
            return dict(self._slots)

    def adopt_slots(self, slots: dict[int, Slot], size: int) -> None:
        """Let whole slots refer to chunks of another file, sharing their content; seal() must follow at once."""
        with self.lock:
            for slot, held in slots.items():
                if slot in self._work:
                    self._drop_work(slot)
                old = self._slots.get(slot)
                self.inode.held += held.length - (old.length if old is not None else 0)
                self._slots[slot] = self._changed[slot] = held
            self.inode.size = max(self.inode.size, size)
            self._modified()
