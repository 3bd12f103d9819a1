"""``metadiskfs node``: run a node of one's own, look after its store and its accounts."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadiskfs import config
from metadiskfs.errors import ChunkDamaged, UsageError

if TYPE_CHECKING:
    from metadiskfs.node.accounts import Accounts
    from metadiskfs.node.settings import NodeSettings

_SECRET_VARIABLE = "METADISKFS_NODE_SECRET"


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "node",
        help="run a MetaDisk node",
        description="Run a node: an HTTP server for the MetaDisk web-core API. See docs/NODE.md.",
    )
    _add_store_flags(parser)
    _add_server_flags(parser)
    parser.set_defaults(run=_run)
    verbs = parser.add_subparsers(title="or look after one", metavar="VERB")
    check = verbs.add_parser("check", help="read every object and compare it with its name")
    _add_store_flags(check)
    check.set_defaults(run=_check)
    _register_admin(verbs.add_parser("admin", help="promo codes, prices, balances"))


def _add_store_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", metavar="DIR|URL", default=argparse.SUPPRESS, help="a folder (default), or s3://bucket/prefix"
    )
    parser.add_argument(
        "--state", metavar="DIR", default=argparse.SUPPRESS, help="where accounts lie (default: the store's folder)"
    )


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--listen", metavar="HOST:PORT", default="127.0.0.1:8014", help="default %(default)s; port 0 picks a free one"
    )
    add("--max-file-size", metavar="SIZE", default="1G", help="largest object taken (default %(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="worker processes (default %(default)s)")
    add("--threads", type=int, metavar="N", help="requests answered at once by each worker (default 128)")
    add("--client-uploads", type=int, metavar="N", help="uploads under way for each client address (default 32)")
    add("--client-requests", type=int, metavar="N", help="requests under way for each client address (default 64)")
    add("--stall-timeout", type=float, metavar="S", help="seconds after which what does not move is cut (default 60)")
    add("--stop-timeout", type=int, metavar="S", help="seconds that requests under way get at the end (default 30)")
    add("--tls-cert", type=Path, metavar="FILE", help="certificate chain (PEM); with --tls-key")
    add("--tls-key", type=Path, metavar="FILE", help="private key (PEM, PKCS#8)")
    add("--cors-origin", action="append", metavar="ORIGIN", help="pages that may use this node (default: all)")
    add("--charge", action="store_true", help="take balance for uploads and downloads")
    add("--secret-file", type=Path, metavar="FILE", help=f"secret for deposits (or ${_SECRET_VARIABLE})")
    add("--access-log", metavar="FILE|-|off", help="one line a request (default -: standard error)")
    add("--embedded", action="store_true", help="be another program's own node: see docs/NODE.md")


def _run(arguments: argparse.Namespace) -> int:
    from metadiskfs.node import process

    embedded = bool(arguments.embedded)
    token, owner_fd = _read_owner() if embedded else ("", -1)
    settings = _settings(arguments, token)
    _set_up_logging(arguments.access_log or ("off" if embedded else "-"), verbose=not embedded)
    process.serve(settings, on_ready=_print_ready if embedded else _log_ready, owner_fd=owner_fd)
    return 0


def _read_owner() -> tuple[str, int]:
    """The upload token from the first line of standard input, and a descriptor that closes when the owner does.

    Read byte by byte: nothing after the line may be lost in a buffer. Standard input itself is closed in workers.
    """
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte or len(line) > 256:
            raise UsageError("an embedded node gets its upload token as first line on standard input")
        line += byte
    token = line.decode("ascii", "replace").strip()
    if len(token) < 16 or not (token.isascii() and token.isalnum()):
        raise UsageError("an upload token has at least 16 letters and digits")
    return token, os.dup(0)


def _print_ready(url: str) -> None:
    print(json.dumps({"ready": True, "url": url}), flush=True)


def _log_ready(url: str) -> None:
    logging.getLogger(__name__).info("listening on %s", url)


def _settings(arguments: argparse.Namespace, token: str) -> "NodeSettings":
    from metadiskfs.node.settings import NodeSettings

    host, port = _parse_listen(arguments.listen)
    given = {
        name: getattr(arguments, name)
        for name in ("threads", "client_uploads", "client_requests", "stall_timeout", "stop_timeout")
        if getattr(arguments, name) is not None
    }
    if token:  # one user's own: few threads, and no client to be protected from another
        given = {"threads": 32, "client_uploads": 4096, "client_requests": 4096, "stop_timeout": 10} | given
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        raise UsageError("--tls-cert and --tls-key go together")
    if min([arguments.workers, *given.values()]) <= 0:
        raise UsageError("counts and times are greater than 0")
    store, state = _store(arguments)
    return NodeSettings(
        store=store,
        state_dir=state,
        host=host,
        port=port,
        max_file_size=config.parse_size(arguments.max_file_size),
        upload_token=token,
        secret=_read_secret(arguments.secret_file),
        charge=arguments.charge,
        cors_origins=tuple(arguments.cors_origin or (() if token else ("*",))),
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
        workers=arguments.workers,
        **given,
    )


def _store(arguments: argparse.Namespace) -> tuple[str, Path]:
    """The store's name and the folder for accounts."""
    store = getattr(arguments, "store", None) or str(config.load({}).embedded_node_dir)
    state = getattr(arguments, "state", None)
    if "://" not in store:
        store = str(Path(store).expanduser().absolute())
    elif not state:
        state = config.load({}).data_dir / ("node-" + "".join(c if c.isalnum() else "-" for c in store))
    return store, Path(state or store).expanduser().absolute()


def _parse_listen(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"not an address to listen on: {text} (127.0.0.1:8014)")
    return host.strip("[]") or "0.0.0.0", int(port)


def _read_secret(file: Path | None) -> str:
    if file is None:
        return os.environ.get(_SECRET_VARIABLE, "")
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--secret-file {file}: {error}") from error


def _set_up_logging(access: str, *, verbose: bool) -> None:
    import logging.handlers

    logging.getLogger("metadiskfs").setLevel(logging.INFO if verbose else logging.WARNING)
    logger = logging.getLogger("metadiskfs.node.access_log")
    logger.setLevel(logging.WARNING if access == "off" else logging.INFO)
    logger.propagate = False  # its lines have a format of their own
    try:
        handler = logging.StreamHandler() if access in ("-", "off") else logging.handlers.WatchedFileHandler(access)
    except OSError as error:
        raise UsageError(f"--access-log {access}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)


def _check(arguments: argparse.Namespace) -> int:
    from metadiskfs.node.engines import open_engine
    from metadiskfs.node.scrub import scrub
    from metadiskfs.node.settings import NodeSettings

    store, state = _store(arguments)
    engine = open_engine(NodeSettings(store=store, state_dir=state))
    try:
        result = scrub(engine, on_damaged=lambda filehash, why: print(f"{filehash} {why}"))
    finally:
        engine.close()
    print(f"{result.objects} objects, {result.size} bytes, {result.damaged} damaged", file=sys.stderr)
    return ChunkDamaged.exit_code if result.damaged else 0


def _register_admin(parser: argparse.ArgumentParser) -> None:
    _add_store_flags(parser)
    topics = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    promo = topics.add_parser("promo", help="set a promo code, or list them")
    promo.add_argument("code", nargs="?")
    promo.add_argument(
        "worth", nargs="?", metavar="SIZE", help="balance it gives, once to each token; 0 withdraws it"
    )
    promo.set_defaults(run=_admin, act=_promo)
    price = topics.add_parser("price", help="set what an amount of balance costs, or list prices")
    price.add_argument("amount", nargs="?", metavar="SIZE")
    price.add_argument("cents", nargs="?", type=int, help="0 withdraws it")
    price.set_defaults(run=_admin, act=_price)
    balance = topics.add_parser("balance", help="show a token's balance")
    balance.add_argument("token")
    balance.set_defaults(run=_admin, act=_balance)


def _admin(arguments: argparse.Namespace) -> int:
    from metadiskfs.node.accounts import Accounts

    accounts = Accounts(_store(arguments)[1] / "accounts.db")
    try:
        arguments.act(accounts, arguments)
    finally:
        accounts.close()
    return 0


def _promo(accounts: "Accounts", arguments: argparse.Namespace) -> None:
    if arguments.code is None:
        for code, worth in accounts.promos():
            print(f"{code} {worth}")
    elif arguments.worth is None:
        raise UsageError("what is the code worth? (promo CODE SIZE)")
    elif worth := config.parse_size(arguments.worth):
        accounts.set_promo(arguments.code, worth)
    else:
        accounts.drop_promo(arguments.code)


def _price(accounts: "Accounts", arguments: argparse.Namespace) -> None:
    if arguments.amount is None:
        for price in accounts.prices():
            print(f"{price.amount} {price.cost}")
    elif arguments.cents is None or arguments.cents < 0:
        raise UsageError("what does it cost? (price SIZE CENTS)")
    elif arguments.cents:
        accounts.set_price(config.parse_size(arguments.amount), arguments.cents)
    else:
        accounts.drop_price(config.parse_size(arguments.amount))


def _balance(accounts: "Accounts", arguments: argparse.Namespace) -> None:
    print(accounts.balance(arguments.token))
