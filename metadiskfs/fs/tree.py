"""Names: which inode stands where, and every act that changes that. No content, no FUSE.

Each act runs under ``Index.lock`` from its checks to its commit, in one transaction, and changes memory only after
it. The kernel's VFS has checked permissions, and that no directory is moved below itself, before it asks.
"""

import errno
import functools
import os
import stat
import time
from collections.abc import Callable

from metadiskfs.fs.inode import Inode
from metadiskfs.store.chunks import Chunks
from metadiskfs.store.index import Index
from metadiskfs.store.schema import ROOT

NAME_MAX = 255
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
XATTR_CREATE, XATTR_REPLACE = 1, 2
XATTR_SIZE_MAX = 65536

_ABSENT = 0
"""Instead of an inode number: a name whose removal is not committed yet."""
_INODES_KEPT = 8192
_NAMES_KEPT = 16384


_strerror = functools.cache(os.strerror)


def posix_error(number: int) -> OSError:
    """An answer of the file system: the errno is the message."""
    return OSError(number, _strerror(number))


class Tree:
    """The volume's names and attributes, from memory where they are there. Safe to use from any thread."""

    def __init__(self, index: Index, chunks: Chunks) -> None:
        self._index = index
        self._chunks = chunks
        self._inodes: dict[int, Inode] = {}
        self._names: dict[tuple[int, bytes], int] = {}
        self.has_privileges = index.has_privileges()
        """Whether a file may have an attribute of security.*; once true it stays so."""
        self.on_unlinked: Callable[[Inode], None] = lambda _inode: None
        """Told, under the index lock, of a file whose last name went while it was open."""

    # -- finding --------------------------------------------------------------------------------------------------

    def inode(self, number: int) -> Inode:
        """The one Inode object of that number. Raises ENOENT."""
        found = self._inodes.get(number)
        if found is not None:
            return found
        with self._index.lock:
            found = self._inodes.get(number)
            if found is None:
                row = self._index.inode(number)
                if row is None:
                    raise posix_error(errno.ENOENT)
                found = self._remember(Inode(row))
        return found

    def in_memory(self, number: int) -> Inode | None:
        return self._inodes.get(number)

    def child(self, parent: int, name: bytes) -> Inode:
        """Look one name up. Raises ENOENT, ENAMETOOLONG."""
        number = self._names.get((parent, name))
        if number == _ABSENT:
            raise posix_error(errno.ENOENT)
        if number is None:
            if len(name) > NAME_MAX:
                raise posix_error(errno.ENAMETOOLONG)
            with self._index.lock:
                number = self._index.lookup(parent, name)
                if number is None:
                    raise posix_error(errno.ENOENT)
                self._remember_name(parent, name, number)
        return self.inode(number)

    def resolve(self, path: bytes) -> Inode:
        """Follow a path from the root, without following symlinks: the kernel does that."""
        number = ROOT
        names = self._names
        for name in path.split(b"/"):
            if name:
                known = names.get((number, name))
                if not known:
                    parent = self.inode(number)
                    if not parent.is_directory:
                        raise posix_error(errno.ENOTDIR)
                    known = self.child(number, name).number
                number = known
        return self.inode(number)

    def resolve_parent(self, path: bytes) -> tuple[Inode, bytes]:
        """The directory a path's last name stands in, and that name."""
        folder, _, name = path.rpartition(b"/")
        if len(name) > NAME_MAX:
            raise posix_error(errno.ENAMETOOLONG)
        return self.resolve(folder), name

    def _remember(self, inode: Inode) -> Inode:
        if len(self._inodes) >= _INODES_KEPT:
            oldest = [number for number, _ in zip(self._inodes, range(_INODES_KEPT // 4), strict=False)]
            for number in oldest:
                kept = self._inodes[number]
                if not kept.is_busy and number != ROOT:
                    del self._inodes[number]
        self._inodes[inode.number] = inode
        return inode

    def _remember_name(self, parent: int, name: bytes, number: int) -> None:
        if len(self._names) >= _NAMES_KEPT:
            for key in [key for key, _ in zip(self._names, range(_NAMES_KEPT // 4), strict=False)]:
                del self._names[key]
        self._names[parent, name] = number

    # -- making ---------------------------------------------------------------------------------------------------

    def make(
        self, parent: Inode, name: bytes, mode: int, *, uid: int, gid: int, rdev: int = 0, target: bytes | None = None
    ) -> Inode:
        """Create a file, directory, symlink or special file. ``mode`` carries its type. Raises EEXIST, ENOENT."""
        now = time.time_ns()
        directory = stat.S_ISDIR(mode)
        with self._index.lock:
            self._check_absent(parent, name)
            if parent.mode & stat.S_ISGID:
                gid = parent.gid
                mode |= stat.S_ISGID if directory else 0
            number = self._index.new_inode_number()
            size = len(target) if target is not None else 0
            nlink = 2 if directory else 1
            inode = Inode((number, mode, uid, gid, nlink, size, 0, rdev, now, now, now, target))
            with self._index.transaction():
                self._index.insert_inode(inode.row())
                self._index.insert_name(parent.number, name, number)
                self._index.touch(parent.number, parent.nlink + directory, now)
            self._touched(parent, now, directory)
            self._remember_name(parent.number, name, number)
            return self._remember(inode)

    def link(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Give a file another name. Raises EEXIST, EPERM for directories, EMLINK."""
        now = time.time_ns()
        with self._index.lock:
            if inode.is_directory:
                raise posix_error(errno.EPERM)
            if inode.nlink >= 65000:
                raise posix_error(errno.EMLINK)
            self._check_absent(parent, name)
            with self._index.transaction():
                self._index.insert_name(parent.number, name, inode.number)
                self._set_nlink(inode, inode.nlink + 1, now)
                self._index.touch(parent.number, parent.nlink, now)
            inode.nlink += 1
            inode.ctime_ns = now
            self._touched(parent, now)
            self._remember_name(parent.number, name, inode.number)

    def _check_absent(self, parent: Inode, name: bytes) -> None:
        if parent.nlink == 0:
            raise posix_error(errno.ENOENT)
        known = self._names.get((parent.number, name))
        if known == _ABSENT:
            self._index.flush_joining()
        if known:
            raise posix_error(errno.EEXIST)  # what is not in memory, the index's primary key refuses

    # -- removing -------------------------------------------------------------------------------------------------

    def unlink(self, parent: Inode, name: bytes) -> Inode:
        """Remove a name that is not a directory's, and the file with its last name unless it is open."""
        now = time.time_ns()
        with self._index.lock:
            inode = self.child(parent.number, name)
            if inode.is_directory:
                raise posix_error(errno.EISDIR)
            with self._index.transaction():
                self._index.delete_name(parent.number, name)
                self._index.touch(parent.number, parent.nlink, now)
                self._lose_name(inode, now)
            self._touched(parent, now)
            self._names.pop((parent.number, name), None)
            self._name_lost(inode, now)
        return inode

    def unlink_later(self, parent: Inode, name: bytes) -> Inode:
        """unlink(), but committed with this thread's next transaction or by Index.flush_joining().

        For a file that is open: libfuse takes a name away just before it renames another file onto it, and both
        must become permanent together, or a crash between leaves neither.
        """
        now = time.time_ns()
        with self._index.lock:
            inode = self.child(parent.number, name)
            join = self._index.join_next
            join("DELETE FROM name WHERE parent = ? AND name = ? AND inode = ?", (parent.number, name, inode.number))
            join("UPDATE inode SET mtime_ns = ?1, ctime_ns = ?1 WHERE id = ?2", (now, parent.number))
            join("UPDATE inode SET nlink = nlink - 1, ctime_ns = ? WHERE id = ?", (now, inode.number))
            self._touched(parent, now)
            self._names[parent.number, name] = _ABSENT
            self._name_lost(inode, now)
        return inode

    def rmdir(self, parent: Inode, name: bytes) -> None:
        """Remove an empty directory. Raises ENOTDIR, ENOTEMPTY."""
        now = time.time_ns()
        with self._index.lock:
            inode = self.child(parent.number, name)
            self._check_empty(inode)
            with self._index.transaction():
                self._index.delete_name(parent.number, name)
                self._index.touch(parent.number, parent.nlink - 1, now)
                self._chunks.forget_inode(inode.number)
            self._touched(parent, now, -1)
            self._names.pop((parent.number, name), None)
            inode.nlink = 0
            self._inodes.pop(inode.number, None)

    def _check_empty(self, inode: Inode) -> None:
        if not inode.is_directory:
            raise posix_error(errno.ENOTDIR)
        self._index.flush_joining()
        if not self._index.is_empty(inode.number):
            raise posix_error(errno.ENOTEMPTY)

    def _lose_name(self, inode: Inode, now: int) -> None:
        """In a transaction: one name less, and the whole inode with its last one unless somebody has it open."""
        if inode.nlink > 1 or inode.is_busy:
            self._set_nlink(inode, inode.nlink - 1, now)
        else:
            self._chunks.forget_inode(inode.number)

    def _name_lost(self, inode: Inode, now: int) -> None:
        inode.nlink -= 1
        inode.ctime_ns = now
        if inode.nlink == 0:
            if inode.is_busy:
                self.on_unlinked(inode)
            else:
                self._inodes.pop(inode.number, None)

    def forget(self, inode: Inode) -> None:
        """Drop an unlinked inode for good: its last handle was closed."""
        with self._index.lock:
            self._index.flush_joining()
            self._chunks.forget_inode(inode.number)
            self._inodes.pop(inode.number, None)

    # -- moving ---------------------------------------------------------------------------------------------------

    def rename(self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int = 0) -> None:
        """Move a name, over an existing one too, or exchange two. One transaction: nobody sees neither or both.

        Raises EINVAL for unknown flags, EEXIST (RENAME_NOREPLACE), ENOTEMPTY, EISDIR, ENOTDIR.
        """
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise posix_error(errno.EINVAL)
        now = time.time_ns()
        with self._index.lock:
            inode = self.child(parent.number, name)
            try:
                other = self.child(new_parent.number, new_name)
            except FileNotFoundError:
                other = None
                if self._names.get((new_parent.number, new_name)) == _ABSENT:
                    self._index.join_all()  # the name it had before goes in the same commit, whoever took it away
            if flags & RENAME_EXCHANGE:
                if other is None:
                    raise posix_error(errno.ENOENT)
                if other is not inode:
                    self._exchange((parent, name, inode), (new_parent, new_name, other), now)
                return
            if other is not None and flags & RENAME_NOREPLACE:
                raise posix_error(errno.EEXIST)
            if other is inode:
                return
            if other is not None:
                self._check_replaceable(inode, other)
            self._move(parent, name, inode, new_parent, new_name, other, now)

    def _check_replaceable(self, inode: Inode, other: Inode) -> None:
        if inode.is_directory:
            self._check_empty(other)
        elif other.is_directory:
            raise posix_error(errno.EISDIR)

    def _move(
        self,
        parent: Inode,
        name: bytes,
        inode: Inode,
        new_parent: Inode,
        new_name: bytes,
        other: Inode | None,
        now: int,
    ) -> None:
        directory = inode.is_directory
        replaced = other is not None and directory  # then it was a directory too
        old_change, new_change = -directory, directory - replaced
        if parent is new_parent:
            old_change = new_change = old_change + new_change
        with self._index.transaction():
            self._index.delete_name(parent.number, name)
            self._index.replace_name(new_parent.number, new_name, inode.number)
            self._index.touch(parent.number, parent.nlink + old_change, now)
            if parent is not new_parent:
                self._index.touch(new_parent.number, new_parent.nlink + new_change, now)
            self._set_nlink(inode, inode.nlink, now)
            if replaced and other is not None:
                self._chunks.forget_inode(other.number)
            elif other is not None:
                self._lose_name(other, now)
        inode.ctime_ns = now
        self._touched(parent, now, old_change)
        if parent is not new_parent:
            self._touched(new_parent, now, new_change)
        self._names.pop((parent.number, name), None)
        self._remember_name(new_parent.number, new_name, inode.number)
        if replaced and other is not None:
            other.nlink = 0
            self._inodes.pop(other.number, None)
        elif other is not None:
            self._name_lost(other, now)

    def _exchange(self, one: tuple[Inode, bytes, Inode], two: tuple[Inode, bytes, Inode], now: int) -> None:
        (parent, name, inode), (new_parent, new_name, other) = one, two
        change = other.is_directory - inode.is_directory if parent is not new_parent else 0
        with self._index.transaction():
            self._index.replace_name(parent.number, name, other.number)
            self._index.replace_name(new_parent.number, new_name, inode.number)
            self._index.touch(parent.number, parent.nlink + change, now)
            if parent is not new_parent:
                self._index.touch(new_parent.number, new_parent.nlink - change, now)
            self._set_nlink(inode, inode.nlink, now)
            self._set_nlink(other, other.nlink, now)
        inode.ctime_ns = other.ctime_ns = now
        self._touched(parent, now, change)
        if parent is not new_parent:
            self._touched(new_parent, now, -change)
        self._remember_name(parent.number, name, other.number)
        self._remember_name(new_parent.number, new_name, inode.number)

    def _set_nlink(self, inode: Inode, nlink: int, now: int) -> None:
        self._index.db.execute("UPDATE inode SET nlink = ?, ctime_ns = ? WHERE id = ?", (nlink, now, inode.number))

    @staticmethod
    def _touched(directory: Inode, now: int, nlink_change: int = 0) -> None:
        directory.nlink += nlink_change
        directory.mtime_ns = directory.ctime_ns = now

    # -- attributes -----------------------------------------------------------------------------------------------

    def set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """Change what is given; ctime changes with it. ``mode`` holds permission bits only."""
        with self._index.lock:
            before = inode.row()
            if mode is not None:
                inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(mode)
            inode.uid = inode.uid if uid is None else uid
            inode.gid = inode.gid if gid is None else gid
            inode.atime_ns = inode.atime_ns if atime_ns is None else atime_ns
            inode.mtime_ns = inode.mtime_ns if mtime_ns is None else mtime_ns
            inode.ctime_ns = time.time_ns()
            try:
                self._index.update_attributes(inode.row())
            except Exception:
                _, inode.mode, inode.uid, inode.gid, _, _, _, _, inode.atime_ns, inode.mtime_ns, inode.ctime_ns, _ = (
                    before
                )
                raise

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int) -> None:
        """Raises EEXIST, ENODATA, E2BIG, ERANGE as setxattr(2)."""
        if len(name) > NAME_MAX:
            raise posix_error(errno.ERANGE)
        if len(value) > XATTR_SIZE_MAX:
            raise posix_error(errno.E2BIG)
        self.has_privileges = self.has_privileges or name.startswith(b"security.")
        with self._index.lock:
            if flags:
                exists = self._index.xattr(inode.number, name) is not None
                if flags & XATTR_CREATE and exists:
                    raise posix_error(errno.EEXIST)
                if flags & XATTR_REPLACE and not exists:
                    raise posix_error(errno.ENODATA)
            with self._index.transaction():
                self._index.set_xattr(inode.number, name, value)
                self._change_time(inode)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        with self._index.transaction():
            if not self._index.remove_xattr(inode.number, name):
                raise posix_error(errno.ENODATA)
            self._change_time(inode)

    def _change_time(self, inode: Inode) -> None:
        now = time.time_ns()
        self._set_nlink(inode, inode.nlink, now)
        inode.ctime_ns = now
