"""One set of file operations, two ways: on a volume in-process, and through the kernel."""

import os
import stat
from pathlib import Path
from typing import Protocol

from metadiskfs.config import Config
from metadiskfs.fs.recovery import recover
from metadiskfs.fs.volume import Volume
from metadiskfs.store.cache import Cache
from metadiskfs.store.chunks import Chunks
from metadiskfs.store.fetcher import Fetcher
from metadiskfs.store.index import Index
from metadiskfs.store.uploader import Uploader
from tests.fs.memory_node import MemoryNode


class Driver(Protocol):
    """Paths are absolute inside the volume; errors are OSErrors with the errno a program would see."""

    def write(self, path: str, data: bytes, offset: int = 0, *, flags: int = os.O_CREAT | os.O_WRONLY) -> None: ...
    def read(self, path: str, size: int = 1 << 30, offset: int = 0) -> bytes: ...
    def truncate(self, path: str, size: int) -> None: ...
    def mkdir(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def rename(self, old: str, new: str) -> None: ...
    def link(self, old: str, new: str) -> None: ...
    def symlink(self, target: str, path: str) -> None: ...
    def readlink(self, path: str) -> str: ...
    def listdir(self, path: str) -> list[str]: ...
    def stat(self, path: str) -> os.stat_result: ...
    def chmod(self, path: str, mode: int) -> None: ...
    def utime(self, path: str, atime_ns: int, mtime_ns: int) -> None: ...
    def sync(self) -> None: ...
    def evict(self) -> None: ...
    def remount(self) -> None: ...


class VolumeDriver:
    """The volume as an object, over a node in memory."""

    def __init__(self, folder: Path, *, chunk_size: int = 64 << 10, cache_size: int = 1 << 30) -> None:
        self.config = Config(
            data_dir=folder / "data", cache_dir=folder / "cache", chunk_size=chunk_size, cache_size=cache_size
        )
        self.node = MemoryNode()
        self.start()

    def start(self) -> None:
        config = self.config
        config.volume_dir.mkdir(parents=True, exist_ok=True)
        self.index = Index(config.volume_dir / "index.db", chunk_size=config.chunk_size)
        cache = Cache(config.volume_dir, config.volume_cache_dir, limit=config.cache_size)
        cache.measure()
        chunks = Chunks(self.index, cache)
        fetcher = Fetcher(chunks, cache, deadline=5)
        uploader = Uploader(chunks, cache)
        self.node.on_upload, self.node.on_fetch = uploader.on_result, fetcher.on_result
        fetcher.transfer = uploader.transfer = self.node
        self.volume = Volume(self.index, cache, chunks, fetcher, uploader)
        recover(self.volume)
        self.volume.start()
        uploader.wake()

    def close(self) -> None:
        self.volume.stop()
        self.index.close()
        self.volume.cache.descriptors.close()

    def remount(self) -> None:
        self.close()
        self.start()

    def sync(self) -> None:
        self.volume.seal_all()
        self.volume.uploader.retry_now()
        while self.volume.chunks.pending_total()[0]:
            self.volume.uploader.wait_progress(0.1)

    def evict(self) -> None:
        self.volume.cache.clear()

    def write(self, path: str, data: bytes, offset: int = 0, *, flags: int = os.O_CREAT | os.O_WRONLY) -> None:
        tree, raw = self.volume.tree, os.fsencode(path)
        try:
            inode = tree.resolve(raw)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            parent, name = tree.resolve_parent(raw)
            inode = tree.make(parent, name, stat.S_IFREG | 0o644, uid=0, gid=0)
        handle = self.volume.open(inode, flags)
        try:
            self.volume.write(handle, memoryview(data), offset)
            self.volume.flush(handle)
        finally:
            self.volume.release(handle)

    def read(self, path: str, size: int = 1 << 30, offset: int = 0) -> bytes:
        handle = self.volume.open(self.volume.tree.resolve(os.fsencode(path)), os.O_RDONLY)
        try:
            return self.volume.read(handle, size, offset)
        finally:
            self.volume.release(handle)

    def truncate(self, path: str, size: int) -> None:
        self.volume.truncate(self.volume.tree.resolve(os.fsencode(path)), size)

    def mkdir(self, path: str) -> None:
        self._make(path, stat.S_IFDIR | 0o755)

    def symlink(self, target: str, path: str) -> None:
        self._make(path, stat.S_IFLNK | 0o777, os.fsencode(target))

    def _make(self, path: str, mode: int, target: bytes | None = None) -> None:
        parent, name = self.volume.tree.resolve_parent(os.fsencode(path))
        self.volume.tree.make(parent, name, mode, uid=0, gid=0, target=target)

    def rmdir(self, path: str) -> None:
        self.volume.tree.rmdir(*self.volume.tree.resolve_parent(os.fsencode(path)))

    def unlink(self, path: str) -> None:
        self.volume.tree.unlink(*self.volume.tree.resolve_parent(os.fsencode(path)))

    def rename(self, old: str, new: str) -> None:
        tree = self.volume.tree
        tree.rename(*tree.resolve_parent(os.fsencode(old)), *tree.resolve_parent(os.fsencode(new)))

    def link(self, old: str, new: str) -> None:
        tree = self.volume.tree
        tree.link(tree.resolve(os.fsencode(old)), *tree.resolve_parent(os.fsencode(new)))

    def readlink(self, path: str) -> str:
        target = self.volume.tree.resolve(os.fsencode(path)).target
        assert target is not None
        return os.fsdecode(target)

    def listdir(self, path: str) -> list[str]:
        number = self.volume.open_directory(self.volume.tree.resolve(os.fsencode(path)))
        listing, names, position = self.volume.listing(number), [], 0
        while (entry := listing.entry(position)) is not None:
            names.append(os.fsdecode(entry[0]))
            position += 1
        self.volume.close_directory(number)
        return names

    def stat(self, path: str) -> os.stat_result:
        inode = self.volume.tree.resolve(os.fsencode(path))
        times = [inode.atime_ns, inode.mtime_ns, inode.ctime_ns]
        whole = [time // 10**9 for time in times]
        fields = (inode.mode, inode.number, 0, inode.nlink, inode.uid, inode.gid, inode.size, *whole)
        extra = {"st_blocks": -(-inode.held // 512), "st_mtime_ns": inode.mtime_ns, "st_atime_ns": inode.atime_ns}
        return os.stat_result(fields, extra)

    def chmod(self, path: str, mode: int) -> None:
        self.volume.change_mode(self.volume.tree.resolve(os.fsencode(path)), mode)

    def utime(self, path: str, atime_ns: int, mtime_ns: int) -> None:
        inode = self.volume.tree.resolve(os.fsencode(path))
        self.volume.tree.set_attributes(inode, atime_ns=atime_ns, mtime_ns=mtime_ns)


class KernelDriver:
    """The same through a real mount."""

    def __init__(self, mount: "Mount") -> None:  # noqa: F821 - tests.conftest.Mount
        self.mount = mount

    def _at(self, path: str) -> str:
        return f"{self.mount.path}{path}"

    def close(self) -> None:
        """The fixture of the mount ends it."""

    def remount(self) -> None:
        self.mount.remount()

    def sync(self) -> None:
        self.mount.sync()

    def evict(self) -> None:
        self.mount.clear_cache()
        self.mount.drop_kernel_caches()

    def write(self, path: str, data: bytes, offset: int = 0, *, flags: int = os.O_CREAT | os.O_WRONLY) -> None:
        fd = os.open(self._at(path), flags, 0o644)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:], offset + done)
        finally:
            os.close(fd)

    def read(self, path: str, size: int = 1 << 30, offset: int = 0) -> bytes:
        with open(self._at(path), "rb") as file:
            file.seek(offset)
            return file.read(size)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self._at(path), size)

    def mkdir(self, path: str) -> None:
        os.mkdir(self._at(path))

    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def rename(self, old: str, new: str) -> None:
        os.rename(self._at(old), self._at(new))

    def link(self, old: str, new: str) -> None:
        os.link(self._at(old), self._at(new))

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self._at(path))

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def listdir(self, path: str) -> list[str]:
        return os.listdir(self._at(path))

    def stat(self, path: str) -> os.stat_result:
        return os.lstat(self._at(path))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def utime(self, path: str, atime_ns: int, mtime_ns: int) -> None:
        os.utime(self._at(path), ns=(atime_ns, mtime_ns))
