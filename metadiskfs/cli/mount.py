"""``metadiskfs mount`` and ``metadiskfs unmount``."""

import argparse
import json
import logging
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from metadiskfs import control
from metadiskfs.cli.common import (
    add_mountpoint_argument,
    add_node_option,
    add_volume_option,
    find_mounts,
    load_config,
    real,
    wait_for_uploads,
)
from metadiskfs.config import Config
from metadiskfs.errors import MetadiskfsError, MountError, StillPending

_READY_SECONDS = 120.0
_END_SECONDS = 120.0
_EXIT_SECONDS = 5.0
_LOG_SIZE_MAX = 10 << 20


def register(commands: Any) -> None:
    mount = commands.add_parser("mount", help="make a volume a directory")
    add_mountpoint_argument(mount, optional=False)
    add_node_option(mount)
    add_volume_option(mount)
    mount.add_argument("--foreground", action="store_true", help="stay attached to the terminal, log to it")
    mount.add_argument("--sync", action="store_true", help="close() returns when the node has acknowledged")
    mount.add_argument("--read-only", action="store_true", help="let nothing be changed")
    mount.add_argument(
        "--cache-size", metavar="SIZE", help="what local copies and pending data may take (default 10G)"
    )
    mount.add_argument("--chunk-size", metavar="SIZE", help="for a new volume (default 4M)")
    mount.add_argument("--node-moved", action="store_true", help="--node is the volume's node under a new address")
    mount.add_argument("--recovery-file", metavar="PATH", help="write each backup's recovery link there")
    mount.add_argument("-o", dest="options", metavar="OPT,...", action="append", default=[], help="mount options")
    mount.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    mount.set_defaults(run=run_mount)
    for name in ("unmount", "umount"):
        unmount = commands.add_parser(name, help="wait for pending uploads, then end a mount")
        add_mountpoint_argument(unmount, optional=False)
        unmount.add_argument("--no-wait", action="store_true", help="leave what is pending to the next mount")
        unmount.add_argument("--timeout", type=float, metavar="S", help="give up waiting after S seconds")
        unmount.set_defaults(run=run_unmount)


def run_mount(arguments: argparse.Namespace) -> int:
    from metadiskfs.mount import MountOptions, serve
    from metadiskfs.mountpoint import parse_fuse_options, prepare_mountpoint

    config = load_config(arguments)
    fuse = parse_fuse_options(arguments.options)
    options = MountOptions(
        mountpoint=real(arguments.mountpoint),
        read_only=arguments.read_only or bool(fuse.pop("ro", False)),
        sync=arguments.sync,
        node_moved=arguments.node_moved,
        writeback=bool(fuse.pop("writeback", False)),
        atime=not fuse.pop("noatime", False),
        fuse={name: value for name, value in fuse.items() if name not in ("rw", "relatime", "atime")},
    )
    if arguments.ready_fd is None:
        prepare_mountpoint(options.mountpoint)
    if not arguments.foreground:
        return _start_daemon(arguments.argv, config, options.mountpoint)
    logging.getLogger("metadiskfs").setLevel(os.environ.get("METADISKFS_LOG", "INFO").upper())
    os.umask(0o077)
    os.chdir("/")
    if arguments.ready_fd is None:
        serve(config, options, on_ready=lambda: None)
        return 0
    with os.fdopen(arguments.ready_fd, "w") as pipe:
        return _serve_as_daemon(config, options, pipe, serve)


def _serve_as_daemon(config: Config, options: Any, pipe: Any, serve: Any) -> int:
    """Tell the waiting command what became of the mount, by the pipe it holds."""

    def tell(answer: dict[str, Any]) -> None:
        if not pipe.closed:
            pipe.write(json.dumps(answer))
            pipe.close()

    try:
        serve(config, options, on_ready=lambda: tell({"ready": True}))
    except MetadiskfsError as error:
        tell({"message": str(error), "exit_code": error.exit_code})
        raise
    return 0


def _start_daemon(argv: list[str], config: Config, mountpoint: Path) -> int:
    """Run the mount as a process of its own, exec'ed, and wait until its directory is usable."""
    log_file = config.state_dir / f"{config.volume}.log"
    config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log_file.exists() and log_file.stat().st_size > _LOG_SIZE_MAX:
        log_file.replace(log_file.with_suffix(".log.1"))
    ours, theirs = os.pipe()
    log_fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "metadiskfs", *argv, "--foreground", "--ready-fd", str(theirs)],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=[theirs],
            start_new_session=True,
        )
    finally:
        os.close(theirs)
        os.close(log_fd)
    with os.fdopen(ours) as pipe:
        ready, _, _ = select.select([pipe], [], [], _READY_SECONDS)
        text = pipe.read() if ready else ""
    if not text:
        daemon.kill()
        raise MountError(f"the mount did not come up; {log_file} says why")
    answer = json.loads(text)
    if not answer.get("ready"):
        print(f"metadiskfs: {answer['message']}", file=sys.stderr)
        daemon.wait()
        return int(answer["exit_code"])
    daemon.returncode = 0  # it goes on without us: not to be waited for, nor warned of
    return 0


def run_unmount(arguments: argparse.Namespace) -> int:
    from metadiskfs.mountpoint import detach, is_dead
    from metadiskfs.store.lock import volume_lock

    mountpoint = real(arguments.mountpoint)
    try:
        folder = find_mounts(arguments)[0]
    except MountError:
        if not is_dead(mountpoint):
            raise
        detach(mountpoint, lazy=True)
        return 0
    if not arguments.no_wait:
        answers = control.ask(folder, "sync")
        if not wait_for_uploads(answers, "uploading", timeout=arguments.timeout):
            raise StillPending(f"uploads are still pending after {arguments.timeout:g} s; {mountpoint} stays mounted")
    pid = control.ask_once(folder, "mount")["pid"]
    detach(mountpoint)
    with volume_lock(folder, wait=_END_SECONDS):
        until = time.monotonic() + _EXIT_SECONDS
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
            time.sleep(0.01)
    return 0
