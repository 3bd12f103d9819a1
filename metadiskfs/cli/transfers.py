"""``metadiskfs upload``, ``download`` and ``link``: between files and links."""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from metadiskfs import control
from metadiskfs.cli.common import (
    Progress,
    add_node_option,
    find_containing,
    load_config,
    show_size,
)
from metadiskfs.config import Config
from metadiskfs.errors import ObjectTooLarge, UsageError

if TYPE_CHECKING:
    from metadiskfs.metadisk.client import Client


def register(commands: Any) -> None:
    upload = commands.add_parser("upload", help="put files on the node, print their links")
    upload.add_argument("files", metavar="FILE", nargs="+", type=Path)
    add_node_option(upload)
    upload.set_defaults(run=run_upload)
    download = commands.add_parser("download", help="fetch what links name, in order, to stdout or a file")
    download.add_argument("links", metavar="LINK", nargs="+", help="<filehash>?key=<key>, or a whole URL")
    download.add_argument("-o", dest="output", metavar="FILE", type=Path, help="write there instead of stdout")
    add_node_option(download)
    download.set_defaults(run=run_download)
    link = commands.add_parser("link", help="the links of a mounted file, one a chunk")
    link.add_argument("path", metavar="PATH", type=Path)
    link.add_argument("--url", action="store_true", help="whole URLs instead of bare links")
    link.add_argument(
        "--whole", action="store_true", help="put the file on the node as one object, print its one link"
    )
    link.set_defaults(run=run_link)


def run_upload(arguments: argparse.Namespace) -> int:
    config = load_config(arguments)
    with _client(config) as client:
        for path in arguments.files:
            try:
                with path.open("rb") as file:
                    for link in _upload_file(client, config, file.fileno(), path.name):
                        print(link, flush=True)
            except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                raise UsageError(f"{path}: {error.strerror}") from error
    return 0


def _upload_file(client: "Client", config: Config, fd: int, label: str) -> Iterator[str]:
    """Upload one file, as one object where the node's limit allows, else in chunks; yields the links in order."""
    from metadiskfs.metadisk.files import upload_part

    size = os.fstat(fd).st_size
    limit = int(client.status().get("storage", {}).get("max_file_size") or 0)
    parts = [(0, size)]
    if limit and size > limit:
        step = min(limit, config.chunk_size)
        parts = [(offset, min(step, size - offset)) for offset in range(0, size, step)]
    with Progress(label) as progress:
        for offset, length in parts:
            receipt = upload_part(
                client,
                fd,
                offset=offset,
                size=length,
                progress=lambda sent, offset=offset: progress.show(offset + sent, size, show_size(size)),
            )
            _note_published(config, receipt.link.filehash)
            yield str(receipt.link)


def _note_published(config: Config, filehash: str) -> None:
    """Let the sweep of the embedded node (gc) know that a link to this object was handed out."""
    if config.node or not config.embedded_node_dir.exists():
        return
    fd = os.open(config.embedded_node_dir / "published", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(f"{filehash}\n")


def run_download(arguments: argparse.Namespace) -> int:
    from metadiskfs.metadisk.files import download
    from metadiskfs.metadisk.wire import Link

    config = load_config(arguments)
    links = [Link.parse(text) for text in arguments.links]
    server, marker, _ = arguments.links[0].strip().partition("/api/download/")
    with _client(config, url=server if marker else "") as client, _output(arguments.output) as out:
        for link in links:
            with tempfile.TemporaryFile(dir=_folder_of(arguments.output)) as proven, Progress("fetching") as progress:
                download(
                    client, link, proven, progress=lambda size: progress.show(0, 1, show_size(size))  # type: ignore[arg-type]
                )  # fmt: skip
                proven.seek(0)
                shutil.copyfileobj(proven, out, 1 << 20)
    return 0


def _folder_of(output: Path | None) -> Path | None:
    return None if output is None else output.absolute().parent


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[BinaryIO]:
    """Standard output, or a file that gets its name when it is whole."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            yield file
        part.replace(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such folder") from error
    finally:
        part.unlink(missing_ok=True)


def run_link(arguments: argparse.Namespace) -> int:
    folder, path = find_containing(arguments.path, arguments)
    node = control.ask_once(folder, "node")
    prefix = f"{node['url']}/api/download/" if arguments.url else ""
    if arguments.whole:
        print(prefix + _whole_link(arguments, node))
        return 0
    for answer in control.ask(folder, "links", path=path):
        print(prefix + answer["link"])
    return 0


def _whole_link(arguments: argparse.Namespace, node: dict[str, Any]) -> str:
    """Put the file on the node as one object; read through the mount like anyone would."""
    from metadiskfs.metadisk.client import Client
    from metadiskfs.metadisk.files import upload_part

    config = load_config(arguments)
    with arguments.path.open("rb") as file, Progress(arguments.path.name) as progress:
        size = os.fstat(file.fileno()).st_size
        client = Client(node["url"], token=node["token"])
        try:
            receipt = upload_part(
                client, file.fileno(), size=size, progress=lambda sent: progress.show(sent, size, show_size(size))
            )
        except ObjectTooLarge as error:
            raise ObjectTooLarge(
                "the file is larger than the node takes as one object; link without --whole"
            ) from error
        finally:
            client.close()
    if node["token"]:
        _note_published(config, receipt.link.filehash)
    return str(receipt.link)


@contextlib.contextmanager
def _client(config: Config, *, url: str = "") -> Iterator["Client"]:
    """The node meant: --node, else the one a URL names, else the embedded one, started if no mount runs it."""
    from metadiskfs.embedded import EmbeddedNode
    from metadiskfs.metadisk.client import Client

    url, token, node = config.node or url, "", None
    if not url:
        for folder, _ in control.mounted_volumes(config.data_dir):
            answer = control.ask_once(folder, "node")
            if answer["token"]:
                url, token = answer["url"], answer["token"]
                break
        else:
            node = EmbeddedNode(config.embedded_node_dir)
            node.start()
            url, token = node.url, node.token
    client = Client(url, token=token, connect_timeout=config.connect_timeout, read_timeout=config.read_timeout)
    try:
        yield client
    finally:
        client.close()
        if node is not None:
            node.stop()
