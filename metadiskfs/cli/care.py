"""``metadiskfs verify``, ``backup``, ``restore`` and ``gc``: keeping a volume whole and its store lean."""

import argparse
import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadiskfs import control
from metadiskfs.cli.common import (
    Progress,
    add_mountpoint_argument,
    add_node_option,
    add_volume_option,
    find_mounts,
    load_config,
    show_size,
    wait_for_uploads,
)
from metadiskfs.cli.transfers import open_client
from metadiskfs.config import Config
from metadiskfs.errors import ContentMismatch, DamageFound, IndexDamaged, MountError, ObjectMissing, VolumeError

if TYPE_CHECKING:
    import sqlite3

    from metadiskfs.metadisk.client import Client
    from metadiskfs.store.chunks import ChunkRow
    from metadiskfs.store.fsck import Finding
    from metadiskfs.store.verify import ChunkProblem


def register(commands: Any) -> None:
    verify = commands.add_parser("verify", help="check the index and ask the node for every chunk")
    add_mountpoint_argument(verify)
    add_volume_option(verify)
    add_node_option(verify)
    verify.add_argument("--data", action="store_true", help="fetch every chunk and prove it, not only ask for it")
    verify.add_argument("--repair", action="store_true", help="heal lost chunks; mend the index (unmounted only)")
    verify.add_argument("--restart", action="store_true", help="begin anew where an earlier run was interrupted")
    verify.add_argument("--json", action="store_true", help="for programs")
    verify.set_defaults(run=run_verify)
    backup = commands.add_parser("backup", help="save the index to the node now, print the recovery link")
    add_mountpoint_argument(backup)
    backup.set_defaults(run=run_backup)
    restore = commands.add_parser("restore", help="bring a volume back from a recovery link")
    restore.add_argument("link", metavar="LINK", help="as printed by backup and status")
    add_volume_option(restore)
    add_node_option(restore)
    restore.set_defaults(run=run_restore)
    collect = commands.add_parser("gc", help="free what nothing needs on the embedded node")
    collect.add_argument("--forget", metavar="VOLUME", default="", help="give up a volume whose index is gone")
    collect.set_defaults(run=run_gc)


# -- verify ---------------------------------------------------------------------------------------------------------


def run_verify(arguments: argparse.Namespace) -> int:
    config = load_config(arguments)
    folder, mounted = _volume_meant(arguments, config)
    with contextlib.ExitStack() as stack:
        if not mounted:
            from metadiskfs.store.lock import volume_lock

            stack.enter_context(volume_lock(folder))
        report = _Report(arguments.json)
        _verify_index(folder, mounted, arguments.repair, report)
        _verify_chunks(folder, mounted, arguments, config, report)
    return report.conclude()


def _volume_meant(arguments: argparse.Namespace, config: Config) -> tuple[Path, bool]:
    """The volume's folder, and whether it is mounted."""
    if arguments.mountpoint is not None:
        return find_mounts(arguments)[0], True
    folder = config.volume_dir
    if not (folder / "index.db").exists():
        raise VolumeError(f"there is no volume {config.volume!r}")
    try:
        control.ask_once(folder, "mount")
    except MountError:
        return folder, False
    return folder, True


class _Report:
    """Collects findings, prints them as they come, and knows the exit code."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._findings: list[dict[str, Any]] = []
        self.checked = 0

    def add(self, kind: str, message: str, *, path: str = "", repaired: bool = False) -> None:
        self._findings.append({"kind": kind, "message": message, "path": path, "repaired": repaired})
        if not self._as_json:
            print(f"{kind}: {message}" + (f": {path}" if path else "") + (" (repaired)" if repaired else ""))

    def conclude(self) -> int:
        left = [finding for finding in self._findings if not finding["repaired"]]
        if self._as_json:
            summary = {"chunks_checked": self.checked, "ok": not left, "findings": self._findings}
            print(json.dumps(summary, indent=2))
            return DamageFound.exit_code if left else 0
        print(f"{self.checked} chunks checked, {len(self._findings)} findings, {len(left)} left")
        if left:
            raise DamageFound(f"{len(left)} findings are not repaired")
        return 0


def _verify_index(folder: Path, mounted: bool, repair: bool, report: _Report) -> None:
    from metadiskfs.store import fsck
    from metadiskfs.store.index import Index, read_only

    mend = repair and not mounted
    if mend:
        index = Index(folder / "index.db", chunk_size=0)
        db: sqlite3.Connection = index.db
    else:
        db = read_only(folder / "index.db")
    with contextlib.closing(db):
        findings: list[Finding] = []
        if not mend:
            db.execute("BEGIN")  # one state of an index that a mount may be changing
        for _ in range(3 if mend else 1):  # mending one thing may bring another to light
            found = list(fsck.check_index(db, repair=mend))
            findings += found
            if not found:
                break
    for finding in findings:
        report.add(**asdict(finding))


def _verify_chunks(
    folder: Path, mounted: bool, arguments: argparse.Namespace, config: Config, report: _Report
) -> None:
    from metadiskfs.store.fsck import Paths
    from metadiskfs.store.index import read_only
    from metadiskfs.store.verify import ChunkCheck, files_with

    cache_dir = config.cache_dir / "volumes" / folder.name
    memory = folder / f"verify-{'data' if arguments.data else 'head'}.json"
    with (
        contextlib.closing(read_only(folder / "index.db")) as db,
        _volume_client(folder, mounted, config, db) as client,
        Progress("verifying") as progress,
    ):
        prove = functools.partial(_prove_data if arguments.data else _prove_presence, client)
        check = ChunkCheck(db, prove, functools.partial(_has_file, folder, cache_dir), memory)
        paths = Paths(db)
        for problem in check.run(resume=not arguments.restart):
            report.checked += 1
            progress.show(check.done, check.total, f"{check.done} of {check.total} chunks")
            if problem is None or _is_settled(db, problem):
                continue
            state = _heal(folder, mounted, config, problem) if arguments.repair else ""
            files = [path for inode in files_with(db, problem.chunk.id) if (path := paths.of(inode))] or [""]
            message = f"chunk {problem.chunk.sha256.hex()}, object {problem.chunk.filehash or 'unknown'}"
            for path in files:
                report.add(problem.kind, message, path=path, repaired=state in ("pending", "stored"))


def _is_settled(db: "sqlite3.Connection", problem: "ChunkProblem") -> bool:
    """Whether a mount stored or dropped a pending chunk while it was looked at."""
    row = db.execute("SELECT state FROM chunk WHERE id = ?", (problem.chunk.id,)).fetchone()
    return problem.kind == "unsent" and (row is None or row[0] != 0)


def _has_file(folder: Path, cache_dir: Path, sha256: bytes) -> bool:
    name = sha256.hex()
    return (folder / "sealed" / name[:2] / name).exists() or (cache_dir / name[:2] / name).exists()


def _prove_presence(client: "Client", chunk: "ChunkRow") -> None:
    if not client.exists(chunk.filehash):
        raise ObjectMissing(chunk.filehash)


def _prove_data(client: "Client", chunk: "ChunkRow") -> None:
    from metadiskfs.metadisk.files import download
    from metadiskfs.metadisk.wire import Link

    with tempfile.TemporaryFile() as out:
        download(client, Link(chunk.filehash, chunk.key), out, limit=chunk.size)
        if out.tell() != chunk.size:
            raise ContentMismatch(chunk.filehash)


def _heal(folder: Path, mounted: bool, config: Config, problem: "ChunkProblem") -> str:
    found = problem.kind == "found"
    if mounted:
        return str(control.ask_once(folder, "heal", chunk=problem.chunk.id, found=found)["state"])
    from metadiskfs.store.cache import Cache
    from metadiskfs.store.chunks import Chunks
    from metadiskfs.store.index import Index

    index = Index(folder / "index.db", chunk_size=0)
    try:
        cache = Cache(folder, config.cache_dir / "volumes" / folder.name, limit=config.cache_size)
        return Chunks(index, cache).heal(problem.chunk.id, found=found)
    finally:
        index.close()


@contextlib.contextmanager
def _volume_client(folder: Path, mounted: bool, config: Config, db: "sqlite3.Connection") -> Iterator["Client"]:
    """A client of the node that holds the volume's chunks."""
    from metadiskfs.mount import EMBEDDED

    if mounted:
        url = control.ask_once(folder, "node")["url"]
    else:
        row = db.execute("SELECT value FROM meta WHERE key = 'node'").fetchone()
        url = config.node or ("" if row is None or row[0] == EMBEDDED else row[0])
    with open_client(replace(config, node=url)) as client:
        yield client


# -- backup and restore ---------------------------------------------------------------------------------------------


def run_backup(arguments: argparse.Namespace) -> int:
    for folder in find_mounts(arguments):
        link = ""

        def pending(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            nonlocal link
            for answer in answers:
                link = answer.get("link", "")
                if not link:
                    yield answer

        wait_for_uploads(pending(control.ask(folder, "backup")), "uploading")
        print(link)
    return 0


def run_restore(arguments: argparse.Namespace) -> int:
    from metadiskfs.metadisk.wire import Link
    from metadiskfs.store.lock import volume_lock

    config = load_config(arguments)
    link = Link.parse(arguments.link)
    with volume_lock(config.volume_dir):
        target = config.volume_dir / "index.db"
        if target.exists():
            raise VolumeError(f"the volume {config.volume!r} exists already: restore into another --volume")
        part = config.volume_dir / "index.restore"
        part.unlink(missing_ok=True)
        try:
            with open_client(config) as client, Progress("restoring") as progress:
                lost = _restore_index(functools.partial(_fetch, client), link, part, config, progress)
            part.rename(target)
        finally:
            for leftover in config.volume_dir.glob("index.restore*"):
                leftover.unlink()
    print(
        f"restored the volume {config.volume!r}; mount it with: metadiskfs mount MOUNTPOINT --volume {config.volume}"
    )
    if lost:
        print(f"{lost} chunks were not on the node yet when this backup was made: files with them are incomplete")
    return 0


def _restore_index(fetch: "Callable[[Any], bytes]", link: Any, part: Path, config: Config, progress: Progress) -> int:
    """Put the index together at ``part`` and make it this machine's; returns how many chunks were never sent."""
    from metadiskfs.mount import EMBEDDED
    from metadiskfs.store.backup import Manifest, adopt_index, fetch_index

    manifest = Manifest.decode(fetch(link))
    done = 0

    def fetch_block(block: Any) -> bytes:
        nonlocal done
        done += 1
        progress.show(done, len(manifest.blocks), show_size(manifest.size))
        return fetch(block)

    fetch_index(manifest, fetch_block, part)
    try:
        return adopt_index(part, config.node or EMBEDDED)
    except IndexDamaged as error:
        raise IndexDamaged(f"the backup holds no usable index: {error}") from error


def _fetch(client: "Client", link: Any) -> bytes:
    from metadiskfs.metadisk.files import download

    with tempfile.TemporaryFile() as out:
        download(client, link, out, limit=64 << 20)
        out.seek(0)
        return out.read()


# -- gc -------------------------------------------------------------------------------------------------------------


def run_gc(arguments: argparse.Namespace) -> int:
    from metadiskfs.sweep import sweep

    swept = sweep(load_config(arguments), forget=arguments.forget)
    print(f"freed {show_size(swept.bytes)} in {swept.objects} objects; {swept.kept_objects} are needed")
    return 0
