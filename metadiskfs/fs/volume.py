"""The file system without FUSE, by inode: handles, content, directories, and what must happen by itself.

Whoever serves it resolves paths with ``tree`` and passes inodes and handles in. Lock order: ``_lock`` (handles) is
taken before a content's locks and never while one of them is held.
"""

import contextlib
import errno
import itertools
import logging
import os
import stat
import threading
import time
from collections.abc import Callable

from metadiskfs.errors import CacheFull, MetadiskfsError
from metadiskfs.fs.content import Content, Store
from metadiskfs.fs.inode import Inode
from metadiskfs.fs.listing import Listing
from metadiskfs.fs.readahead import FileReader, ReadAhead
from metadiskfs.fs.tree import Tree, posix_error
from metadiskfs.fs.work import Hasher
from metadiskfs.store.cache import Cache
from metadiskfs.store.chunks import Chunks
from metadiskfs.store.fetcher import Fetcher
from metadiskfs.store.index import Index
from metadiskfs.store.uploader import Uploader

log = logging.getLogger(__name__)

QUIET_SECONDS = 5.0
"""A file that stays open is sealed when it was not written to for so long."""
_TICK = 1.0
_GATHER_SECONDS = 0.005
"""For what follows an unlink: the rename it may belong to, the unlinks after it."""
_PROGRESS_PATIENCE = 10.0
"""Seconds a writer waits for an upload to make room before it gets ENOSPC."""
_RELATIME_NS = 24 * 3600 * 10**9


_CAPABILITY = b"security.capability"


def _without_privileges(mode: int) -> int:
    """A file's mode without suid, and without sgid where that means a group and not mandatory locking."""
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode


class Handle:
    """One open file. ``path`` is where it was when it was opened."""

    __slots__ = ("append", "content", "inode", "noatime", "path", "reader", "writable")

    def __init__(self, inode: Inode, content: Content | None, flags: int, path: bytes) -> None:
        self.inode = inode
        self.content = content
        self.path = path
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.append = bool(flags & os.O_APPEND)
        self.noatime = bool(flags & os.O_NOATIME)
        self.reader = FileReader()


class Volume:
    """One mounted volume. Safe to use from any thread."""

    def __init__(
        self,
        index: Index,
        cache: Cache,
        chunks: Chunks,
        fetcher: Fetcher,
        uploader: Uploader,
        *,
        read_only: bool = False,
        sync_timeout: float | None = None,
        atime: bool = True,
    ) -> None:
        """``sync_timeout``: seconds a close waits for the node's acknowledgement (--sync), None not to wait."""
        self.index = index
        self.cache = cache
        self.chunks = chunks
        self.fetcher = fetcher
        self.uploader = uploader
        self.read_only = read_only
        self.tree = Tree(index, chunks)
        self.hasher = Hasher(cache)
        self.read_ahead = ReadAhead(self.tree, chunks, fetcher, chunk_size=index.chunk_size)
        self.store = Store(index, cache, chunks, fetcher, self.hasher, index.chunk_size)
        self._sync_timeout = sync_timeout
        self._atime = atime and not read_only
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        self._open_contents: dict[int, Content] = {}
        self._atimes: dict[int, int] = {}
        self._stopping = threading.Event()
        self._urgent = threading.Event()
        self._thread = threading.Thread(target=self._maintain, name="maintenance", daemon=True)
        cache.on_dropped = self._hurry
        self.on_tick: list[Callable[[], None]] = []
        """Called about once a second by the maintenance thread."""

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.hasher.start()
        self.uploader.start()
        self._thread.start()

    def stop(self) -> None:
        """Seal everything and end the threads. What is pending stays pending."""
        self._stopping.set()
        self._urgent.set()
        if self._thread.is_alive():
            self._thread.join()
        self.seal_all()
        self._write_atimes()
        self.uploader.stop()
        self.hasher.stop()
        self.cache.settle()

    def _maintain(self) -> None:
        next_tick = time.monotonic() + _TICK
        while not self._stopping.is_set():
            if self._urgent.wait(max(0.0, next_tick - time.monotonic())):
                self._urgent.clear()
                time.sleep(_GATHER_SECONDS)
            try:
                self.index.flush_joining()
                self.cache.remove_dropped()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + _TICK
                    self._tick()
            except Exception as error:  # whatever it is, this thread must go on
                foreseen = isinstance(error, (MetadiskfsError, OSError))
                log.error("maintenance failed, trying again: %s", error, exc_info=not foreseen)

    def _tick(self) -> None:
        self._seal_quiet()
        self.cache.settle()
        self._write_atimes()
        for act in self.on_tick:
            act()

    def _seal_quiet(self) -> None:
        before = time.monotonic() - QUIET_SECONDS
        for content in self._dirty_contents():
            if content.last_write < before:
                content.seal()
                self.uploader.wake()

    def _dirty_contents(self) -> list[Content]:
        with self._lock:
            contents = list(self._open_contents.values())
        return [content for content in contents if content.is_dirty and content.inode.nlink]

    def seal_all(self) -> None:
        """Seal what all open files hold at this moment. Raises the first failure after trying all."""
        failure: Exception | None = None
        for content in self._dirty_contents():
            try:
                content.seal()
            except (MetadiskfsError, OSError) as error:
                failure = failure or error
        self.uploader.wake()
        if failure is not None:
            raise failure

    # -- open and close -------------------------------------------------------------------------------------------

    def open(self, inode: Inode, flags: int, path: bytes = b"") -> int:
        """Open a file; returns the handle's number. O_TRUNC is honoured; ``path`` is for messages."""
        if inode.is_directory and flags & os.O_ACCMODE != os.O_RDONLY:
            raise posix_error(errno.EISDIR)
        if self.read_only and (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC):
            raise posix_error(errno.EROFS)
        with self._lock:
            content = self._content_of(inode)
            inode.opens += 1
            number = next(self._numbers)
            self._handles[number] = Handle(inode, content, flags, path)
        if flags & os.O_TRUNC:
            content.truncate(0)
        elif path:
            self.read_ahead.opened(path)
        return number

    def _content_of(self, inode: Inode) -> Content:
        if inode.content is None:
            inode.content = Content(inode, self.store)
            self._open_contents[inode.number] = inode.content
        return inode.content

    def handle(self, number: int) -> Handle:
        try:
            return self._handles[number]
        except KeyError:
            raise posix_error(errno.EBADF) from None

    def paths_moved(self, old: bytes, new: bytes) -> None:
        """Let open files be called by their present names."""
        below = old + b"/"
        for handle in list(self._handles.values()):
            if handle.path == old or handle.path.startswith(below):
                handle.path = new + handle.path[len(old) :]

    def paths_exchanged(self, one: bytes, two: bytes) -> None:
        parked = one + b"/\0"
        self.paths_moved(two, parked)
        self.paths_moved(one, two)
        self.paths_moved(parked, one)

    def flush(self, number: int) -> None:
        """What close(2) reports: seal, and with --sync wait for the node. Cheap when nothing was written."""
        handle = self.handle(number)
        content = handle.content
        if content is None or not handle.writable or not content.is_dirty or not handle.inode.nlink:
            return
        chunks = content.seal()
        self.uploader.wake()
        if self._sync_timeout is not None and chunks:
            self.uploader.wait_stored(chunks, self._sync_timeout)

    def release(self, number: int) -> None:
        """The last of a handle: seal what came after flush (mmap), forget the file if it has no name any more."""
        with self._lock:
            handle = self._handles.pop(number, None)
        if handle is None:
            return
        self._let_go(handle.inode)

    def _let_go(self, inode: Inode) -> None:
        content = inode.content
        if content is not None and content.is_dirty and inode.nlink and inode.opens == 1:
            content.seal()
            self.uploader.wake()
        with self._lock:
            inode.opens -= 1
            if inode.opens:
                return
            inode.closed = time.monotonic()
            if inode.nlink and content is not None and content.is_dirty:
                return  # could not be sealed: stays in memory and is tried again
            inode.content = None
            self._open_contents.pop(inode.number, None)
            if inode.nlink == 0:
                if content is not None:
                    content.discard()
                self.tree.forget(inode)

    # -- content --------------------------------------------------------------------------------------------------

    def read_into(self, number: int, view: memoryview, offset: int) -> int:
        """Read into ``view``; returns the count. Raises NodeError (EIO) naming file and chunk in the log."""
        handle = self.handle(number)
        content = handle.content
        if content is None:
            raise posix_error(errno.EISDIR)
        if self._atime and not handle.noatime:
            self._accessed(handle.inode)

        def look_ahead() -> None:
            self.read_ahead.read(handle.reader, content, offset, len(view))

        try:
            count = content.read_into(view, offset, meanwhile=look_ahead)
        except MetadiskfsError as error:
            log.error("%s at %d: %s", os.fsdecode(handle.path), offset, error)
            raise
        if content.was_missed and content.inode.size <= self.index.chunk_size:
            content.was_missed = False
            with contextlib.suppress(OSError):  # the folder may have been renamed since
                self.read_ahead.missed(handle.path)
        return count

    def read(self, number: int, size: int, offset: int) -> bytes:
        buffer = bytearray(min(size, max(0, self.handle(number).inode.size - offset)))
        count = self.read_into(number, memoryview(buffer), offset)
        return bytes(buffer[:count])

    def _accessed(self, inode: Inode) -> None:
        """relatime: note the access when it is the first since a change, or a day after the last noted one."""
        now = time.time_ns()
        if inode.atime_ns > max(inode.mtime_ns, inode.ctime_ns) and now - inode.atime_ns < _RELATIME_NS:
            return
        inode.atime_ns = now
        self._atimes[inode.number] = now

    def _write_atimes(self) -> None:
        if self._atimes:
            noted, self._atimes = self._atimes, {}
            self.index.set_atimes([(atime, number) for number, atime in noted.items()])

    def write(self, number: int, data: memoryview, offset: int, *, append: bool | None = None) -> int:
        """Write all of ``data``; ``append`` (at the end, wherever that is now): None for as it was opened.

        Raises CacheFull (ENOSPC) when nothing can be freed for it, NodeError (EIO).
        """
        handle = self.handle(number)
        if handle.content is None or not handle.writable:
            raise posix_error(errno.EBADF)
        self._make_room(len(data))
        if handle.append if append is None else append:
            handle.content.append(data)
        else:
            handle.content.write(data, offset)
        return len(data)

    def _make_room(self, size: int) -> None:
        cache = self.cache
        while True:
            try:
                cache.make_room(size)
                return
            except CacheFull:
                self.seal_all()  # what open files hold can be uploaded, and then evicted
                if not self.uploader.wait_progress(_PROGRESS_PATIENCE):
                    raise

    def truncate(self, inode: Inode, size: int, number: int | None = None) -> None:
        """Set a file's size. Through a handle it is committed by flush like a write, by path at once."""
        if inode.is_directory:
            raise posix_error(errno.EISDIR)
        if number is not None and (content := self.handle(number).content) is not None:
            content.truncate(size)
            return
        with self._lock:
            content = self._content_of(inode)
            inode.opens += 1
        try:
            content.truncate(size)
            content.seal()
            self.uploader.wake()
        finally:
            self._let_go(inode)

    def fallocate(self, number: int, mode: int, offset: int, length: int) -> None:
        """Plain allocation, KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE; nothing is reserved. Raises EOPNOTSUPP."""
        keep_size, punch_hole, zero_range = 1, 2, 16
        content = self.handle(number).content
        if content is None:
            raise posix_error(errno.EBADF)
        if mode & ~(keep_size | punch_hole | zero_range):
            raise posix_error(errno.EOPNOTSUPP)
        if mode & (punch_hole | zero_range):
            self._make_room(min(length, 2 * self.index.chunk_size))
            content.punch(offset, length)
        if not mode & keep_size and offset + length > content.inode.size:
            content.truncate(offset + length)
        else:
            content.touch()

    def copy_range(self, source: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """Share whole chunks of one file with another; returns the bytes done.

        Raises EOPNOTSUPP where that does not fit; the caller's copy by hand is then as good.
        """
        one, two = self.handle(source), self.handle(target)
        chunk_size = self.index.chunk_size
        if one.content is None or two.content is None or one.content is two.content:
            raise posix_error(errno.EOPNOTSUPP)
        if offset % chunk_size or target_offset % chunk_size:
            raise posix_error(errno.EOPNOTSUPP)
        one.content.seal()
        stop = min(offset + length, one.inode.size)
        if stop % chunk_size and (stop < one.inode.size or target_offset + stop - offset < two.inode.size):
            stop -= stop % chunk_size  # the rest of the last slot is not the source's to overwrite
        if stop <= offset:
            raise posix_error(errno.EOPNOTSUPP)
        shift = (target_offset - offset) // chunk_size
        first, last = offset // chunk_size, -(-stop // chunk_size)
        held, pinned = self.chunks.pin_slots(one.inode.number, first, last, two.inode.number)
        try:
            if len(held) != last - first:
                raise posix_error(errno.EOPNOTSUPP)  # holes are the caller's to keep
            two.content.adopt_slots({n + shift: slot for n, slot in held.items()}, target_offset + stop - offset)
            two.content.seal()
            self.uploader.wake()
        finally:
            self.chunks.unpin(two.inode.number, pinned)
        return stop - offset

    def fsync(self, number: int) -> None:
        """Survives a power cut when it returns; with --sync it is stored too."""
        content = self.handle(number).content
        if content is None:
            self.index.make_durable()
        elif content.inode.nlink:
            content.fsync()
            if self._sync_timeout is not None and (chunks := content.seal()):
                self.uploader.wake()
                self.uploader.wait_stored(chunks, self._sync_timeout)

    # -- names ----------------------------------------------------------------------------------------------------

    def unlink_for_rename(self, parent: Inode, name: bytes) -> Inode:
        """Take the name of an open file away, committed with the rename that follows, or soon where none does."""
        inode = self.tree.unlink_later(parent, name)
        self._hurry()
        return inode

    def _hurry(self) -> None:
        if not self._urgent.is_set():
            self._urgent.set()

    def open_directory(self, inode: Inode) -> int:
        if not inode.is_directory:
            raise posix_error(errno.ENOTDIR)
        self.index.flush_joining()
        with self._lock:
            number = next(self._numbers)
            self._listings[number] = Listing(inode, self.index)
        return number

    def listing(self, number: int) -> Listing:
        """The open directory, about to be read."""
        try:
            listing = self._listings[number]
        except KeyError:
            raise posix_error(errno.EBADF) from None
        if self._atime:
            self._accessed(listing.directory)
        return listing

    def close_directory(self, number: int) -> None:
        with self._lock:
            self._listings.pop(number, None)

    # -- attributes -----------------------------------------------------------------------------------------------

    def read_link(self, inode: Inode) -> bytes:
        """A symlink's target. Raises EINVAL for anything else."""
        if inode.target is None:
            raise posix_error(errno.EINVAL)
        if self._atime:
            self._accessed(inode)
        return inode.target

    def drop_privileges(self, inode: Inode) -> None:
        """Clear suid, sgid and capabilities of a file that somebody not privileged opened with O_TRUNC.

        For every other change of content the kernel asks for this itself.
        """
        mode = _without_privileges(inode.mode)
        if mode != inode.mode:
            self.tree.set_attributes(inode, mode=mode)
        if self.index.xattr(inode.number, _CAPABILITY) is not None:
            self.tree.remove_xattr(inode, _CAPABILITY)

    def change_mode(self, inode: Inode, mode: int) -> None:
        self.tree.set_attributes(inode, mode=mode)

    def change_owner(self, inode: Inode, uid: int | None, gid: int | None) -> None:
        """chown(2): clears suid and sgid of a file that can be executed."""
        mode = _without_privileges(inode.mode) if stat.S_ISREG(inode.mode) else None
        self.tree.set_attributes(inode, mode=mode, uid=uid, gid=gid)

    def state_of(self, inode: Inode) -> str:
        """'pending' while anything of a file waits for the node, 'lost' where nobody has it, else 'stored'."""
        if inode.content is not None and inode.content.is_dirty:
            return "pending"
        states = self.chunks.states_of(inode.number)
        return "lost" if 2 in states else "pending" if 0 in states else "stored"
