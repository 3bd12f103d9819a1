"""FUSE callbacks to volume calls: path -> inode, nothing else. The only importer of the FUSE binding.

mfusepy wraps libfuse3's high-level interface. Its own wrappers are replaced here one by one, for four reasons: it
drops rename's flags (RENAME_EXCHANGE then destroys a file and reports success), readdirplus attributes and the
handles of chmod, chown, truncate and utimens; it turns unforeseen exceptions into EINVAL; it has no lseek and no
copy_file_range; and its string paths and attribute dictionaries cost a quarter of a small operation's time.

Callbacks come on several threads that libfuse made. What libfuse does with open files that lose their name stands in
hidden.py, what the kernel does with files of several names in aliases.py.
"""

import ctypes
import errno
import logging
import os
import stat
import threading
import time
import types
from collections.abc import Callable
from typing import Any

from metadiskfs.errors import MetadiskfsError, MountError
from metadiskfs.fs.aliases import Aliases
from metadiskfs.fs.hidden import HiddenFiles
from metadiskfs.fs.inode import Inode
from metadiskfs.fs.links import links_of
from metadiskfs.fs.stat_layout import BLOCK_SIZE, StatLayout, time_ns
from metadiskfs.fs.tree import RENAME_EXCHANGE, XATTR_SIZE_MAX, posix_error
from metadiskfs.fs.volume import Volume


def _find_libfuse3() -> str:
    """The binding would take libfuse2 where both are installed. Raises MountError."""
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    raise MountError("libfuse3 is missing: install it as root, with: apt-get install fuse3")


os.environ.setdefault("FUSE_LIBRARY_PATH", _find_libfuse3())
import mfusepy  # noqa: E402 - it looks for its library while being imported

log = logging.getLogger(__name__)

_CALLBACKS = (
    "getattr", "readlink", "mknod", "mkdir", "unlink", "symlink", "rmdir", "rename", "link", "chmod", "chown",
    "truncate", "open", "read", "write", "statfs", "flush", "release", "fsync", "setxattr", "getxattr", "listxattr",
    "removexattr", "opendir", "readdir", "releasedir", "fsyncdir", "init", "destroy", "create", "utimens",
    "fallocate", "copy_file_range", "lseek",
)  # fmt: skip
_FILL_DIR_PLUS = 2
_READDIR_PLUS = 1
_CAP_HANDLE_KILLPRIV, _CAP_HANDLE_KILLPRIV_V2 = 1 << 20, 1 << 21
_CAP_WRITEBACK_CACHE = 1 << 16
_CAP_READDIRPLUS_AUTO = 1 << 14
_SEEK_DATA, _SEEK_HOLE = 3, 4
_KEPT_SECONDS = 3600.0
_ONE_ID = 0xFFFFFFFF
_THREADS = 16
"""More than the 12 requests of read-ahead that the kernel sends at once: when these wait for a node, ls need not."""


_stat = StatLayout(mfusepy.c_stat)
_thread = threading.local()


def _keep_thread_state() -> None:
    """Let this libfuse thread keep its Python thread state.

    ctypes would make one for each callback and free it after: a tenth to a third of a callback's cost, measured
    (docs/PERFORMANCE.md). The reference taken here is never given back; libfuse keeps its threads (max_idle_threads).
    """
    ctypes.pythonapi.PyGILState_Ensure()
    _thread.is_kept = True


class Operations(mfusepy.FUSE):  # type: ignore[misc]
    """Serves a volume at a mountpoint; the constructor returns when it is unmounted."""

    def __init__(
        self,
        volume: Volume,
        mountpoint: str,
        *,
        on_ready: Callable[[], None],
        statfs: Callable[[], tuple[int, int, int]],
        writeback: bool = False,
        **options: Any,
    ) -> None:
        """``on_ready`` runs in libfuse's init; ``statfs`` gives (bytes in all, bytes free, files).

        Raises RuntimeError when libfuse could not mount or its loop failed, and whatever ``on_ready`` raised.
        """
        self._volume = volume
        self._tree = volume.tree
        self._on_ready = on_ready
        self._statfs = statfs
        self._writeback = writeback
        self._hidden = HiddenFiles(volume)
        self._aliases = Aliases(self._invalidate)
        self._fuse: ctypes.c_void_p | None = None
        self._init_failure: Exception | None = None
        if mfusepy.fuse_version_minor >= 12:
            options |= {"max_threads": _THREADS, "max_idle_threads": _THREADS}  # 3.14 complains of its own defaults
        wanted = types.SimpleNamespace(use_ns=True, **dict.fromkeys(_CALLBACKS, True))
        super().__init__(wanted, mountpoint, foreground=True, **options)
        if self._init_failure is not None:
            raise self._init_failure

    def _wrapper(self, func: Callable[..., int | None], *args: Any) -> int:
        """Every callback's frame: an errno for every exception, EIO and a traceback for an unforeseen one."""
        if not hasattr(_thread, "is_kept"):
            _keep_thread_state()
        try:
            return func(*args) or 0
        except OSError as error:
            return -(error.errno or errno.EIO)
        except MetadiskfsError as error:
            log.warning("%s: %s", func.__name__, error)
            return -error.errno
        except BaseException:
            log.exception("%s failed in an unforeseen way", func.__name__)
            return -errno.EIO

    # -- life -----------------------------------------------------------------------------------------------------

    def init_fuse_3(self, conn: Any, config: Any) -> None:
        settings, connection = config.contents, conn.contents
        settings.use_ino = 1
        settings.nullpath_ok = 1
        settings.hard_remove = 0
        settings.entry_timeout = settings.attr_timeout = settings.negative_timeout = _KEPT_SECONDS
        settings.kernel_cache = 0
        # For suid and sgid the kernel knows the rules, and the caller's rights. Which writes must clear them it would
        # tell us as well (FUSE_WRITE_KILL_SUIDGID), but that does not come through this interface.
        connection.want &= ~(_CAP_HANDLE_KILLPRIV | _CAP_HANDLE_KILLPRIV_V2)
        connection.want &= ~_CAP_READDIRPLUS_AUTO  # plus on every request: ls and find want the attributes
        if self._writeback:
            connection.want |= _CAP_WRITEBACK_CACHE
        self._fuse = ctypes.c_void_p(mfusepy._libfuse.fuse_get_context().contents.fuse)
        try:
            self._on_ready()
        except Exception as error:  # noqa: BLE001 - raised by the constructor, when libfuse's loop has ended
            self._init_failure = error
            mfusepy.fuse_exit()

    def destroy(self, private_data: Any) -> None:
        self._aliases.stop()
        self._fuse = None

    # -- paths ----------------------------------------------------------------------------------------------------

    def _inode(self, path: bytes) -> Inode:
        if self._hidden and (hidden := self._hidden.get(path.rpartition(b"/")[2])) is not None:
            return hidden
        inode = self._tree.resolve(path)
        if inode.nlink > 1 and not inode.is_directory:
            self._aliases.add(inode.number, path)
        return inode

    def _inode_of(self, path: bytes | None, fip: Any) -> Inode:
        if fip:
            return self._volume.handle(fip.contents.fh).inode
        assert path is not None
        return self._inode(path)

    def _invalidate(self, path: bytes) -> None:
        if self._fuse is not None:
            mfusepy._libfuse.fuse_invalidate_path(self._fuse, path)

    def _changed(self, inode: Inode, path: bytes | None, fip: Any = None) -> None:
        """Tell the kernel of a change that reached it through one of several names: each is an inode of its own."""
        if self._aliases:
            by = self._volume.handle(fip.contents.fh).path if fip else path
            self._aliases.changed(inode.number, by, is_open=inode.opens > 0)

    def _caller(self) -> tuple[int, int]:
        context = mfusepy._libfuse.fuse_get_context().contents
        return context.uid, context.gid

    def _writable(self) -> None:
        if self._volume.read_only:
            raise posix_error(errno.EROFS)

    # -- attributes -----------------------------------------------------------------------------------------------

    def getattr_fuse_3(self, path: bytes | None, buf: Any, fip: Any) -> None:
        inode = self._inode_of(path, fip)
        attributes = inode.attributes()
        if inode.nlink and self._hidden and self._is_hidden(path, fip):
            attributes = (*attributes[:4], inode.nlink + 1, *attributes[5:])  # libfuse takes one off
        _stat.pack(_stat.Buffer.from_address(ctypes.addressof(buf.contents)), *attributes)

    def _is_hidden(self, path: bytes | None, fip: Any) -> bool:
        known = self._volume.handle(fip.contents.fh).path if fip else path or b""
        return self._hidden.get(known.rpartition(b"/")[2]) is not None

    def chmod_fuse_3(self, path: bytes | None, mode: int, fip: Any) -> None:
        self._writable()
        inode = self._inode_of(path, fip)
        self._volume.change_mode(inode, mode)
        self._changed(inode, path, fip)

    def chown_fuse_3(self, path: bytes | None, uid: int, gid: int, fip: Any) -> None:
        self._writable()
        inode = self._inode_of(path, fip)
        self._volume.change_owner(inode, None if uid == _ONE_ID else uid, None if gid == _ONE_ID else gid)
        self._changed(inode, path, fip)

    def utimens_fuse_3(self, path: bytes | None, buf: Any, fip: Any) -> None:
        self._writable()
        inode = self._inode_of(path, fip)
        times = (
            (time_ns(buf.contents.actime), time_ns(buf.contents.modtime)) if buf else (time.time_ns(), time.time_ns())
        )
        self._tree.set_attributes(inode, atime_ns=times[0], mtime_ns=times[1])
        self._changed(inode, path, fip)

    def statfs(self, path: bytes, buf: Any) -> None:
        total, free, files = self._statfs()
        values = buf.contents
        values.f_bsize = values.f_frsize = BLOCK_SIZE
        values.f_blocks = total // BLOCK_SIZE
        values.f_bfree = values.f_bavail = free // BLOCK_SIZE
        values.f_files = files + 2**32
        values.f_ffree = values.f_favail = 2**32
        values.f_namemax = 255

    # -- names ----------------------------------------------------------------------------------------------------

    def mknod(self, path: bytes, mode: int, dev: int) -> None:
        self._make(path, mode, rdev=dev)

    def mkdir(self, path: bytes, mode: int) -> None:
        self._make(path, stat.S_IFDIR | stat.S_IMODE(mode))

    def symlink(self, source: bytes, target: bytes) -> None:
        self._make(target, stat.S_IFLNK | 0o777, target=source)

    def _make(self, path: bytes, mode: int, *, rdev: int = 0, target: bytes | None = None) -> Inode:
        self._writable()
        uid, gid = self._caller()
        parent, name = self._tree.resolve_parent(path)
        return self._tree.make(parent, name, mode, uid=uid, gid=gid, rdev=rdev, target=target)

    def create(self, path: bytes, mode: int, fip: Any) -> None:
        inode = self._make(path, stat.S_IFREG | stat.S_IMODE(mode))
        info = fip.contents
        info.fh = self._volume.open(inode, info.flags & ~os.O_TRUNC, path)
        info.keep_cache = 1

    def readlink(self, path: bytes, buf: Any, size: int) -> None:
        inode = self._inode(path)
        atime_ns = inode.atime_ns
        target = self._volume.read_link(inode)
        if inode.atime_ns != atime_ns:
            self._changed(inode, path)
        ctypes.memmove(buf, target[: size - 1] + b"\0", min(len(target), size - 1) + 1)

    def link(self, source: bytes, target: bytes) -> None:
        self._writable()
        if self._writeback:
            raise posix_error(errno.EPERM)  # the kernel keeps the second name's old size for ever (docs/SEMANTICS.md)
        inode = self._inode(source)
        parent, name = self._tree.resolve_parent(target)
        self._tree.link(inode, parent, name)
        self._aliases.add(inode.number, source)
        self._aliases.add(inode.number, target)
        self._changed(inode, None)

    def unlink(self, path: bytes) -> None:
        name = path.rpartition(b"/")[2]
        if self._hidden and self._hidden.drop(name):
            self._aliases.discard(path)
            return
        self._writable()
        parent, name = self._tree.resolve_parent(path)
        self._lost_name(self._tree.unlink(parent, name), path)

    def _lost_name(self, inode: Inode, path: bytes) -> None:
        self._aliases.discard(path)
        self._changed(inode, None)

    def rmdir(self, path: bytes) -> None:
        self._writable()
        self._tree.rmdir(*self._tree.resolve_parent(path))

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> None:
        self._writable()
        parent, name = self._tree.resolve_parent(old)
        new_parent, new_name = self._tree.resolve_parent(new)
        inode = self._tree.child(parent.number, name)
        if parent is new_parent and self._hidden.is_hiding(inode, new_name):
            self._hidden.hide(inode, parent, name, new_name, caller=mfusepy._libfuse.fuse_get_context().contents.pid)
            self._moved(inode, old, new)
            self._changed(inode, None)
            return
        replaced = self._replaced(new) if self._aliases else None
        self._tree.rename(parent, name, new_parent, new_name, flags)
        if inode is replaced:
            return  # two names of one file: nothing happened
        for changed in (inode, replaced):
            if changed is not None:
                self._changed(changed, None)  # by the old names, which libfuse knows until this returns
        if flags & RENAME_EXCHANGE:
            self._aliases.exchanged(old, new)
            self._volume.paths_exchanged(old, new)
        else:
            self._moved(inode, old, new)

    def _moved(self, inode: Inode, old: bytes, new: bytes) -> None:
        self._aliases.renamed(old, new, folder=inode.is_directory)
        self._volume.paths_moved(old, new)

    def _replaced(self, path: bytes) -> Inode | None:
        try:
            return self._tree.resolve(path)
        except OSError:
            return None

    # -- directories ----------------------------------------------------------------------------------------------

    def opendir(self, path: bytes, fip: Any) -> None:
        fip.contents.fh = self._volume.open_directory(self._inode(path))

    def readdir_fuse_3(self, path: bytes | None, buf: Any, filler: Any, offset: int, fip: Any, flags: int) -> None:
        listing = self._volume.listing(fip.contents.fh)
        if offset == 0:
            listing.restart()
        buffer = mfusepy.c_stat()
        view = _stat.Buffer.from_buffer(buffer)
        pointer = ctypes.pointer(buffer)
        plus = _FILL_DIR_PLUS if flags & _READDIR_PLUS else 0
        position = offset
        while True:
            if position < 2:
                directory = listing.directory
                name: bytes = (b".", b"..")[position]
                _stat.pack(view, *directory.attributes())
                full = filler(buf, name, pointer, position + 1, 0)
            else:
                entry = listing.entry(position - 2)
                if entry is None:
                    if position - 2 >= len(listing):
                        return
                    position += 1
                    continue
                inode = self._tree.in_memory(entry[1])
                attributes = entry[1:12] if inode is None else inode.attributes()
                _stat.pack(view, *attributes)
                known = (
                    plus if attributes[4] == 1 or stat.S_ISDIR(attributes[1]) else 0
                )  # else it must come to _inode
                full = filler(buf, entry[0], pointer, position + 1, known)
            if full:
                return
            position += 1

    def releasedir(self, path: bytes | None, fip: Any) -> None:
        self._volume.close_directory(fip.contents.fh)

    def fsyncdir(self, path: bytes | None, datasync: int, fip: Any) -> None:
        self._volume.index.make_durable()

    # -- files ----------------------------------------------------------------------------------------------------

    def open(self, path: bytes, fip: Any) -> None:
        info = fip.contents
        inode = self._inode(path)
        info.fh = self._volume.open(inode, info.flags, path)
        if info.flags & os.O_TRUNC:
            if self._caller()[0]:
                self._volume.drop_privileges(inode)
            self._changed(inode, path)
        info.keep_cache = inode.nlink <= 1  # whatever changes content goes through this kernel inode

    def read(self, path: bytes | None, buf: Any, size: int, offset: int, fip: Any) -> int:
        view = memoryview((ctypes.c_char * size).from_address(ctypes.addressof(buf.contents))).cast("B")
        if not self._aliases:
            return self._volume.read_into(fip.contents.fh, view, offset)
        inode = self._volume.handle(fip.contents.fh).inode
        atime_ns = inode.atime_ns
        count = self._volume.read_into(fip.contents.fh, view, offset)
        if inode.atime_ns != atime_ns:
            self._changed(inode, path, fip)
        return count

    def write(self, path: bytes | None, buf: Any, size: int, offset: int, fip: Any) -> int:
        view = memoryview((ctypes.c_char * size).from_address(ctypes.addressof(buf.contents))).cast("B")
        number = fip.contents.fh
        # The request's own flags: fcntl may have changed them since open, and pages stored through mmap have none.
        written = self._volume.write(number, view, offset, append=bool(fip.contents.flags & os.O_APPEND))
        if self._aliases:
            self._changed(self._volume.handle(number).inode, path, fip)
        return written

    def truncate_fuse_3(self, path: bytes | None, length: int, fip: Any) -> None:
        self._writable()
        inode = self._inode_of(path, fip)
        self._volume.truncate(inode, length, fip.contents.fh if fip else None)
        self._changed(inode, path, fip)

    def fallocate(self, path: bytes | None, mode: int, offset: int, length: int, fip: Any) -> None:
        self._volume.fallocate(fip.contents.fh, mode, offset, length)
        self._changed(self._volume.handle(fip.contents.fh).inode, path, fip)

    def copy_file_range(
        self, path_in: bytes | None, fi_in: Any, offset_in: int, path_out: bytes | None, fi_out: Any, offset_out: int,
        size: int, flags: int,
    ) -> int:  # fmt: skip
        done = self._volume.copy_range(fi_in.contents.fh, offset_in, fi_out.contents.fh, offset_out, size)
        self._changed(self._volume.handle(fi_out.contents.fh).inode, path_out, fi_out)
        return done

    def lseek(self, path: bytes | None, offset: int, whence: int, fip: Any) -> int:
        content = self._volume.handle(fip.contents.fh).content
        if content is None or whence not in (_SEEK_DATA, _SEEK_HOLE):
            raise posix_error(errno.EINVAL)
        found = content.seek_data(offset, hole=whence == _SEEK_HOLE)
        if found is None:
            raise posix_error(errno.ENXIO)
        return found

    def flush(self, path: bytes | None, fip: Any) -> None:
        self._volume.flush(fip.contents.fh)

    def fsync(self, path: bytes | None, datasync: int, fip: Any) -> None:
        self._volume.fsync(fip.contents.fh)

    def release(self, path: bytes | None, fip: Any) -> None:
        self._volume.release(fip.contents.fh)

    # -- extended attributes --------------------------------------------------------------------------------------

    def getxattr(self, path: bytes, name: bytes, value: Any, size: int, *_: Any) -> int:
        if not name.startswith((b"user.", b"trusted.")) and not self._is_set(path, name):
            raise posix_error(errno.EOPNOTSUPP)  # then ls and cp stop asking; ENODATA would make them go on
        inode = self._inode(path)
        found = self._own_attribute(inode, name)
        if found is None:
            found = self._volume.index.xattr(inode.number, name)
        if found is None:
            raise posix_error(errno.ENODATA)
        return _return_bytes(found, value, size)

    def _is_set(self, path: bytes, name: bytes) -> bool:
        if not self._tree.has_privileges or not name.startswith(b"security."):
            return False
        return self._volume.index.xattr(self._inode(path).number, name) is not None

    def _own_attribute(self, inode: Inode, name: bytes) -> bytes | None:
        if not name.startswith(b"user.metadisk.") or not inode.is_regular:
            return None
        if name == b"user.metadisk.state":
            return self._volume.state_of(inode).encode()
        if name == b"user.metadisk.link":
            if inode.size > self._volume.index.chunk_size * (XATTR_SIZE_MAX // 134):
                raise posix_error(errno.ERANGE)
            return "".join(f"{link}\n" for link in links_of(self._volume, inode)).encode()
        return None

    def listxattr(self, path: bytes, buf: Any, size: int) -> int:
        names = self._volume.index.xattr_names(self._inode(path).number)
        return _return_bytes(b"".join(name + b"\0" for name in names), buf, size)

    def setxattr(self, path: bytes, name: bytes, value: Any, size: int, flags: int, *_: Any) -> None:
        self._writable()
        self._check_settable(name)
        inode = self._inode(path)
        self._tree.set_xattr(inode, name, ctypes.string_at(value, size), flags)
        self._changed(inode, path)

    def removexattr(self, path: bytes, name: bytes) -> None:
        self._writable()
        self._check_settable(name)
        inode = self._inode(path)
        self._tree.remove_xattr(inode, name)
        self._changed(inode, path)

    def _check_settable(self, name: bytes) -> None:
        if not name.startswith((b"user.", b"trusted.", b"security.")):
            raise posix_error(errno.EOPNOTSUPP)  # POSIX ACLs among them: refused, not ignored
        if name.startswith(b"user.metadisk."):
            raise posix_error(errno.EPERM)


def _return_bytes(data: bytes, buffer: Any, size: int) -> int:
    """The two-step protocol of getxattr(2): the length when asked with size 0, ERANGE when it does not fit."""
    if size == 0:
        return len(data)
    if len(data) > size:
        raise posix_error(errno.ERANGE)
    ctypes.memmove(buffer, data, len(data))
    return len(data)
