"""Composition: what a mount consists of, in which order it comes up and goes down, and what it answers to commands.

Up: lock -> index -> recovery -> node -> FUSE, and in its init the threads, the transfer process, the control socket.
Down, after the kernel let go: seal, stop the queues, transfer process, node, index, lock.
"""

import contextlib
import ctypes
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metadiskfs.config import Config
from metadiskfs.control import ControlServer, ask_once
from metadiskfs.crash import crash_point
from metadiskfs.embedded import EmbeddedNode, register_volume
from metadiskfs.errors import MetadiskfsError, MountError, UsageError, VolumeBusy, WrongNode
from metadiskfs.fs.links import links_of
from metadiskfs.fs.operations import Operations
from metadiskfs.fs.recovery import recover
from metadiskfs.fs.volume import Volume
from metadiskfs.metadisk.jobs import TransferSettings, UploadResult
from metadiskfs.metadisk.transfer import Transfer
from metadiskfs.mountpoint import raise_read_ahead
from metadiskfs.store.backup import JOB_IDS, Backups
from metadiskfs.store.cache import Cache
from metadiskfs.store.chunks import Chunks, purge_dead
from metadiskfs.store.fetcher import Fetcher
from metadiskfs.store.index import Index
from metadiskfs.store.lock import volume_lock
from metadiskfs.store.uploader import Uploader
from metadiskfs.upkeep import SAVE_SECONDS, BackupSchedule, SpaceWatch

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
_M_ARENA_MAX = -8  # malloc.h
_COUNT_PATIENCE = 0.5
"""Seconds df waits for the files to be counted."""
_SYNC_SECONDS = 60.0
_ENDING_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What one mount was asked for, besides the Config. ``fuse`` are options passed on to libfuse."""

    mountpoint: Path
    read_only: bool = False
    sync: bool = False
    node_moved: bool = False
    writeback: bool = False
    atime: bool = True
    fuse: dict[str, Any] = field(default_factory=dict)


class MountedVolume:
    """One volume with its node and processes, from open to close."""

    def __init__(self, config: Config, options: MountOptions) -> None:
        """Open the index and recover; nothing runs yet. Raises VolumeError and its kind, UsageError."""
        self.config = config
        self.options = options
        self.index = Index(config.volume_dir / "index.db", chunk_size=config.chunk_size)
        self.node_name = settle_node(self.index, config.node, moved=options.node_moved)
        self.cache = Cache(config.volume_dir, config.volume_cache_dir, limit=config.cache_size)
        self.cache.measure()
        self.cache.before_eviction = self.index.make_durable
        power_cut = self._doubt_after_power_cut()
        self.chunks = Chunks(self.index, self.cache)
        self.fetcher = Fetcher(self.chunks, self.cache, deadline=config.read_deadline)
        self.uploader = Uploader(self.chunks, self.cache)
        self.backups = Backups(self.index, self.chunks, config.volume_dir, recovery_file=config.recovery_file)
        self.volume = Volume(
            self.index,
            self.cache,
            self.chunks,
            self.fetcher,
            self.uploader,
            read_only=options.read_only,
            sync_timeout=_SYNC_SECONDS if options.sync else None,
            atime=options.atime,
        )
        recover(self.volume)
        if power_cut:
            self._doubt()  # what recovery moved looks new
        crash_point("recovered-before-session")
        self._begin_session()
        with self.index.transaction(counted=False):
            self.index.set_meta("saved", 0)
        self.schedule = BackupSchedule(self.backups, self.uploader, config.backup_interval)
        self.volume.on_tick.append(self.schedule.tick)
        self.node: EmbeddedNode | None = None
        self.transfer: Transfer | None = None
        self.control = ControlServer(config.volume_dir, self._handlers())
        self._usage = (0, 0)
        self._usage_due = 0.0
        self._counter = ThreadPoolExecutor(1, "usage")
        self._counting: Future[tuple[int, int]] | None = None

    def _doubt_after_power_cut(self) -> bool:
        """Whether the last session ended with the machine. Doubts outlive sessions, until each file was proven."""
        known = int(self.index.meta("doubted") or 0)
        if known:
            self.cache.doubt_older_than(known)
        if self.index.meta("session") in (None, "", _boot_id()):
            return False
        log.warning("the last session ended with the machine: chunk files prove themselves before use")
        self._doubt()
        return True

    def _doubt(self) -> None:
        moment = self.cache.doubt_older_than(time.time_ns())
        with self.index.transaction(counted=False):
            self.index.set_meta("doubted", moment)

    def _begin_session(self) -> None:
        with self.index.transaction(durable=True, counted=False):
            self.index.set_meta("session", _boot_id())

    # -- life -----------------------------------------------------------------------------------------------------

    def start_node(self) -> None:
        """Start the embedded node, where the volume has no other. Raises NodeUnreachable."""
        if self.node_name == EMBEDDED:
            self.node = EmbeddedNode(self.config.embedded_node_dir, on_restart=self.uploader.retry_now)
            self.node.start()
            register_volume(self.config.embedded_node_dir, self.index.meta("uuid"), self.config.volume)
            watch = SpaceWatch(self.config.embedded_node_dir, self.chunks, self.config.sweep_below_size)
            self.volume.on_tick.append(watch.tick)

    @property
    def url(self) -> str:
        return self.node.url if self.node is not None else self.node_name

    def start(self) -> None:
        """Start threads and the transfer process. Called from FUSE's init."""
        settings = TransferSettings(
            self.url,
            self.node.token if self.node is not None else "",
            self.config.connect_timeout,
            self.config.read_timeout,
            self.config.read_deadline,
            self.config.ca_file,
        )
        self.transfer = Transfer(
            settings,
            on_upload=self._uploaded,
            on_fetch=self.fetcher.on_result,
            on_restart=self._transfer_restarted,
        )
        self.fetcher.transfer = self.uploader.transfer = self.backups.transfer = self.transfer
        self.transfer.start()
        self.volume.start()
        self.uploader.wake()
        self.control.start()

    def _uploaded(self, result: UploadResult) -> None:
        (self.backups if result.id >= JOB_IDS else self.uploader).on_result(result)

    def _transfer_restarted(self) -> None:
        self.uploader.on_restart()
        self.fetcher.on_restart()

    def stop(self) -> None:
        """Seal what is open and end everything, in the order that lets results arrive. Raises nothing foreseeable."""
        self.control.stop()
        clean = True
        try:
            self.volume.stop()
        except (MetadiskfsError, OSError) as error:
            clean = False
            log.error("not everything could be sealed, the next mount takes it up: %s", error)
        self.schedule.save_at_end()
        if self.transfer is not None:
            self.transfer.close()
        if self.node is not None:
            self.node.stop()
        if clean:
            for folder in (self.config.volume_dir, self.config.volume_cache_dir):
                with contextlib.suppress(FileNotFoundError):  # somebody emptied the cache
                    _sync_disk_under(folder)  # chunk files too, so that the next start need not doubt them
            with self.index.transaction(durable=True, counted=False):
                self.index.set_meta("session", "")
                self.index.set_meta("saved", 0 if self.backups.is_needed else 1)
        self.index.checkpoint()
        self.index.close()
        self.cache.descriptors.close()

    # -- figures --------------------------------------------------------------------------------------------------

    def statfs(self) -> tuple[int, int, int]:
        """(bytes in all, bytes free, files), as df shows them: the disk under an embedded node, else no limit."""
        used, files = self._measured_usage()
        disk = os.statvfs(self.config.data_dir)
        if self.node is not None:
            return disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize, files
        limit = 1 << 50
        return limit, limit - used, files

    def _measured_usage(self) -> tuple[int, int]:
        """(bytes held, files) of the volume, counted anew when the last count is twenty times its own cost old.

        With millions of files counting takes seconds: who asks gets the last count then, at first none.
        """
        if self._counting is None and time.monotonic() >= self._usage_due:
            self._counting = self._counter.submit(self._count_usage)
        if (counting := self._counting) is not None:
            wait([counting], _COUNT_PATIENCE)
            if counting.done():
                self._counting = None
                self._usage = counting.result()
        return self._usage

    def _count_usage(self) -> tuple[int, int]:
        began = time.monotonic()
        usage = self.index.usage()
        self._usage_due = time.monotonic() + 20 * (time.monotonic() - began)
        return usage

    # -- answers to commands --------------------------------------------------------------------------------------

    def _handlers(self) -> dict[str, Callable[[dict[str, Any]], Iterator[dict[str, Any]]]]:
        return {
            "mount": self._answer_mount,
            "status": self._answer_status,
            "sync": self._answer_sync,
            "clear_cache": self._answer_clear_cache,
            "links": self._answer_links,
            "node": self._answer_node,
            "backup": self._answer_backup,
            "heal": self._answer_heal,
            "purge": self._answer_purge,
        }

    def _answer_mount(self, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"mountpoint": str(self.options.mountpoint), "volume": self.config.volume, "pid": os.getpid()}

    def _answer_node(self, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"url": self.url, "token": self.node.token if self.node is not None else ""}

    def _answer_status(self, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
        cache = self.cache
        yield {
            "volume": self.config.volume,
            "mountpoint": str(self.options.mountpoint),
            "node": self.url,
            "embedded": self.node is not None,
            "read_only": self.options.read_only,
            "pid": os.getpid(),
            "transfer_pid": self.transfer.pid if self.transfer is not None else None,
            "node_pid": self.node.pid if self.node is not None else None,
            **self.chunks.totals(),
            "cache_bytes": cache.pending_bytes + cache.cached_bytes,
            "cache_limit": cache.limit,
            **self.uploader.state(),
            "recovery_link": self.backups.latest_link(),
        }

    def _answer_sync(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Seal, then report what is pending until nothing is."""
        self.volume.seal_all()
        self.uploader.retry_now()
        while True:
            before = self.uploader.progress
            chunks, size = self.chunks.pending_total()
            yield {"pending_chunks": chunks, "pending_bytes": size, **self.uploader.state()}
            if not chunks:
                return
            self.uploader.wait_progress(0.2, since=before)

    def _answer_clear_cache(self, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"freed_bytes": self.cache.clear()}

    def _answer_links(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        inode = self.volume.tree.resolve(os.fsencode(request["path"]))
        if not inode.is_regular:
            raise UsageError("only files have links")
        for link in links_of(self.volume, inode):
            yield {"link": str(link)}

    def _answer_backup(self, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What is in the backup must be on the node: seal and upload first."""
        yield from self._answer_sync({})
        yield {"link": self.backups.save(timeout=SAVE_SECONDS)}

    def _answer_heal(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        chunk = int(request["chunk"])
        state = self.chunks.heal(chunk, found=bool(request.get("found")))
        self.uploader.requeue(chunk)
        yield {"state": state}

    def _answer_purge(self, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"purged": purge_dead(self.index)}


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def settle_node(index: Index, asked: str, *, moved: bool = False) -> str:
    """The node that holds the volume's chunks: a URL or EMBEDDED. The first mount decides; ``moved`` corrects it.

    Raises WrongNode when another is asked for.
    """
    known: str | None = index.meta("node")
    if known is None or (moved and asked):
        known = asked or EMBEDDED
        with index.transaction():
            index.set_meta("node", known)
    elif asked and asked != known:
        raise WrongNode(
            f"this volume's chunks lie on {known}, not on {asked}; use another --volume for another node,"
            " or --node-moved if it is the same one under a new address"
        )
    return known


def serve(config: Config, options: MountOptions, on_ready: Callable[[], None]) -> None:
    """Mount, serve until unmounted, and clean up. ``on_ready`` is called when the directory is usable.

    Raises VolumeError and its kind, NodeUnreachable, MountError.
    """
    _allow_open_files()
    _keep_memory_small()
    with _own_volume(config):
        mounted = MountedVolume(config, options)
        try:
            mounted.start_node()
            _serve_fuse(mounted, options, on_ready)
        finally:
            mounted.stop()


def _allow_open_files() -> None:
    """As many as we may have: every chunk that is read or written needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _sync_disk_under(folder: Path) -> None:
    """syncfs(2): sync(2) would wait for every other file system too, a hanging network mount included."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ctypes.CDLL("libc.so.6").syncfs(fd)
    except (OSError, AttributeError):  # another C library
        os.sync()
    finally:
        os.close(fd)


def _keep_memory_small() -> None:
    """Let glibc keep two arenas, not one for each libfuse thread: each would hold on to what it once needed."""
    with contextlib.suppress(OSError, AttributeError):  # another C library manages without
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 2)


def _own_volume(config: Config) -> contextlib.ExitStack:
    """The volume's lock, waiting for a session that is just ending: it answers no more. Raises VolumeBusy."""
    owned = contextlib.ExitStack()
    until = time.monotonic() + _ENDING_SECONDS
    while True:
        try:
            owned.enter_context(volume_lock(config.volume_dir, wait=0.2))
            return owned
        except VolumeBusy:
            with contextlib.suppress(MountError):
                ask_once(config.volume_dir, "mount")
                raise
            if time.monotonic() >= until:
                raise


def _serve_fuse(mounted: MountedVolume, options: MountOptions, on_ready: Callable[[], None]) -> None:
    def ready() -> None:
        mounted.start()
        threading.Thread(target=_when_usable, args=(options.mountpoint, on_ready), daemon=True).start()

    fuse = {"fsname": "metadiskfs", "subtype": "metadiskfs", "default_permissions": True, **options.fuse}
    if options.read_only:
        fuse["ro"] = True
    try:
        Operations(
            mounted.volume,
            str(options.mountpoint),
            on_ready=ready,
            statfs=mounted.statfs,
            writeback=options.writeback,
            **fuse,
        )
    except RuntimeError as error:
        raise MountError(f"FUSE could not mount {options.mountpoint} (status {error})") from error


def _when_usable(mountpoint: Path, on_ready: Callable[[], None]) -> None:
    """The first stat through the kernel: init's answer reaches it only after init returned."""
    raise_read_ahead(os.stat(mountpoint).st_dev)
    on_ready()
