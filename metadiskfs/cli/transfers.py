"""``metadiskfs upload``, ``download`` and ``link``: between files and links."""

import argparse
import contextlib
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
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
    with open_client(config) as client:
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
            show = functools.partial(_show_part, progress, offset, size)
            with _published(config):
                receipt = upload_part(client, fd, offset=offset, size=length, progress=show)
                _note(config, receipt.link.filehash)
            yield str(receipt.link)


def _show_part(progress: Progress, offset: int, size: int, sent: int) -> None:
    progress.show(offset + sent, size, show_size(size))


@contextlib.contextmanager
def _published(config: Config) -> Iterator[None]:
    """What goes to the embedded node must not be swept as garbage: its link is handed out."""
    from metadiskfs.sweep import publishing

    if config.node:
        yield
    else:
        with publishing(config.embedded_node_dir):
            yield


def _note(config: Config, filehash: str) -> None:
    from metadiskfs.sweep import note_published

    if not config.node:
        note_published(config.embedded_node_dir, filehash)


def run_download(arguments: argparse.Namespace) -> int:
    from metadiskfs.metadisk.files import download
    from metadiskfs.metadisk.wire import Link

    config = load_config(arguments)
    links = [Link.parse(text) for text in arguments.links]
    server, marker, _ = arguments.links[0].strip().partition("/api/download/")
    with open_client(config, url=server if marker else "") as client, _output(arguments.output) as out:
        for link in links:
            with tempfile.TemporaryFile(dir=_folder_of(arguments.output)) as proven, Progress("fetching") as progress:
                download(client, link, proven, progress=functools.partial(_show_received, progress))
                proven.seek(0)
                shutil.copyfileobj(proven, out, 1 << 20)
    return 0


def _show_received(progress: Progress, size: int) -> None:
    progress.show(0, 1, show_size(size))


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

    config = replace(load_config(arguments), node="" if node["token"] else node["url"])
    client = Client(node["url"], token=node["token"], ca_file=config.ca_file)
    with arguments.path.open("rb") as file, Progress(arguments.path.name) as progress, _published(config):
        size = os.fstat(file.fileno()).st_size
        show = functools.partial(_show_part, progress, 0, size)
        try:
            receipt = upload_part(client, file.fileno(), size=size, progress=show)
        except ObjectTooLarge as error:
            raise ObjectTooLarge("larger than what the node takes as one object: link it without --whole") from error
        finally:
            client.close()
        _note(config, receipt.link.filehash)
    return str(receipt.link)


@contextlib.contextmanager
def open_client(config: Config, *, url: str = "") -> Iterator["Client"]:
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
    client = Client(
        url,
        token=token,
        connect_timeout=config.connect_timeout,
        read_timeout=config.read_timeout,
        ca_file=config.ca_file,
    )
    try:
        yield client
    finally:
        client.close()
        if node is not None:
            node.stop()
