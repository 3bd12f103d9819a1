"""The engine for any S3-compatible store: Storj's gateway, Ceph, MinIO, AWS. Needs the extra ``s3`` (obstore).

Objects are keys ``prefix/<filehash>``, the facts user metadata beside them. Settings come from where every S3 tool
looks: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or a profile
(AWS_PROFILE, AWS_SHARED_CREDENTIALS_FILE); none of it from the command line, where `ps` would show it.

What a put overwrites has the same name and so the same bytes; S3 replaces atomically. So an object that exists is
simply written again: that heals it, renews its time, and needs no reading back.
"""

import configparser
import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from metadiskfs.errors import ContentMismatch, NodeRefused, NodeUnreachable, ObjectMissing, UsageError
from metadiskfs.metadisk import wire
from metadiskfs.node.engine import PIECE, Entry, Facts, StoredObject, Usage
from metadiskfs.node.spool import Spool, SpoolFolder

try:
    import obstore
    from obstore import exceptions
    from obstore.store import S3Store
except ImportError as error:
    raise UsageError("an s3:// store needs obstore: pip install 'metadiskfs[s3]'") from error

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import S3Config

log = logging.getLogger(__name__)

_WINDOW = 8 << 20
"""Bytes asked for at once from a large object, and beyond which an upload goes in parts."""
_NAME, _TIME = "metadisk-name", "metadisk-time"
_CONNECT_TIMEOUT, _TIMEOUT, _RETRY_FOR = timedelta(seconds=5), timedelta(seconds=60), timedelta(seconds=20)


class S3Engine:
    """See Engine for the obligations.

    One of them S3 cannot keep: between the look at an object's time and its deletion there is no lock. So delete() is
    for stores that no one uploads to meanwhile. The embedded node, which alone sweeps garbage, is on a disk.
    """

    label = "s3"

    def __init__(self, store: S3Store, prefix: str, spools: SpoolFolder) -> None:
        self.spools = spools
        self._store = store
        self._prefix = prefix
        self._creates = self._probe()

    @classmethod
    def connect(cls, url: str, spools: SpoolFolder) -> "S3Engine":
        """Open ``s3://bucket/prefix``. Raises UsageError where settings are missing, NodeError where it refuses."""
        parts = urlsplit(url)
        if not parts.netloc:
            raise UsageError(f"{url} names no bucket")
        plain_http = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        with _translated(url):
            store = S3Store(
                parts.netloc,
                config=_credentials(),
                client_options={"allow_http": plain_http, "connect_timeout": _CONNECT_TIMEOUT, "timeout": _TIMEOUT},
                retry_config={"max_retries": 3, "retry_timeout": _RETRY_FOR},
            )
        prefix = parts.path.strip("/")
        return cls(store, f"{prefix}/" if prefix else "", spools)

    def put(self, filehash: str, content: bytes | memoryview | Spool, facts: Facts) -> bool:
        path = self._path(filehash)
        attributes = {_NAME: facts.name, _TIME: str(facts.stored_at)}
        with _translated(filehash):
            small = not isinstance(content, Spool) or content.size <= _WINDOW
            if small and self._creates:
                data = content.read_all() if isinstance(content, Spool) else content
                with contextlib.suppress(exceptions.AlreadyExistsError):
                    obstore.put(self._store, path, data, attributes=attributes, mode="create", use_multipart=False)
                    return True
            new = not self._creates and not self._exists(path) if small else not self._exists(path)
            source = Path(content.path) if isinstance(content, Spool) else content
            obstore.put(self._store, path, source, attributes=attributes, use_multipart=not small, chunk_size=_WINDOW)
        return new

    def open(self, filehash: str) -> StoredObject:
        path = self._path(filehash)
        with _translated(filehash):
            return _S3Object(self._store, path, obstore.get(self._store, path))

    def delete(self, filehash: str, *, not_newer_than_ns: int) -> bool:
        path = self._path(filehash)
        try:
            with _translated(filehash):
                if _mtime_ns(obstore.head(self._store, path)["last_modified"].timestamp()) > not_newer_than_ns:
                    return False
                obstore.delete(self._store, path)
        except ObjectMissing:
            return False
        return True

    def list(self) -> Iterator[Entry]:
        with _translated("list"):
            for page in obstore.list(self._store, prefix=self._prefix.rstrip("/") or None):
                for item in page:
                    name = item["path"].removeprefix(self._prefix)
                    if wire.is_filehash(name):
                        yield Entry(name, item["size"], _mtime_ns(item["last_modified"].timestamp()))

    def usage(self) -> Usage:
        return Usage(0, 0)

    def close(self) -> None:
        self.spools.close()

    def _path(self, filehash: str) -> str:
        if not wire.is_filehash(filehash):
            raise ObjectMissing("not a filehash")
        return self._prefix + filehash

    def _exists(self, path: str) -> bool:
        try:
            obstore.head(self._store, path)
        except (exceptions.NotFoundError, FileNotFoundError):
            return False
        return True

    def _probe(self) -> bool:
        """Find out whether this server keeps a create-only put's promise; some refuse it, some ignore it.

        It also tells at the start what is wrong with bucket and credentials.
        """
        path = f"{self._prefix}probe-{secrets.token_hex(8)}"
        with _translated("the bucket"):
            try:
                for _ in range(2):
                    obstore.put(self._store, path, b"", mode="create", use_multipart=False)
            except exceptions.AlreadyExistsError:
                return True
            except (exceptions.GenericError, exceptions.NotSupportedError) as error:
                obstore.put(self._store, path, b"", use_multipart=False)  # or it is not this that it refuses
                log.info("the store refuses create-only puts: %s", type(error).__name__)
            finally:
                with contextlib.suppress(exceptions.BaseError, FileNotFoundError):
                    obstore.delete(self._store, path)
        log.info("the store has no create-only puts; looking before each put instead")
        return False


class _S3Object(StoredObject):
    """Opened by a GET whose body is taken only if it is wanted whole and small: one request for most downloads."""

    def __init__(self, store: S3Store, path: str, answer: "GetResult") -> None:
        self._store, self._path = store, path
        self._answer: GetResult | None = answer
        self._attributes = dict(answer.attributes)
        self.size = answer.meta["size"]
        self._modified = answer.meta["last_modified"].timestamp()
        self.version = f"{answer.meta.get('e_tag')}.{self._modified}"

    def facts(self) -> Facts:
        try:
            return Facts(str(self._attributes.get(_NAME, "")), int(str(self._attributes[_TIME])))
        except (KeyError, ValueError):
            return Facts("", int(self._modified))

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        answer, self._answer = self._answer, None
        for at in range(start, stop, _WINDOW):
            end = min(at + _WINDOW, stop)
            with _translated(self._path):
                if answer is not None and (start, stop) == (0, self.size) and self.size <= _WINDOW:
                    data = memoryview(answer.bytes())
                else:
                    data = memoryview(obstore.get_range(self._store, self._path, start=at, end=end))
            if len(data) != end - at:
                raise ContentMismatch(f"{self._path}: {len(data)} bytes came instead of {end - at}")
            for first in range(0, len(data), PIECE):
                yield bytes(data[first : first + PIECE])

    def close(self) -> None:
        self._answer = None


def _mtime_ns(seconds: float) -> int:
    """S3 tells whole seconds, rounded down. The end of that second is the latest that the put can have been."""
    return int(seconds + 1) * 10**9


def _credentials() -> "S3Config":
    """Keys from the environment are obstore's own business; a profile's are read here, because it reads none."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    profile = os.environ.get("AWS_PROFILE", "default")
    parser = configparser.RawConfigParser()
    try:
        parser.read(file)
    except configparser.Error as error:
        raise UsageError(f"{file} cannot be read: {type(error).__name__}") from error
    if not parser.has_section(profile):
        if "AWS_PROFILE" in os.environ:
            raise UsageError(f"{file} has no profile {profile}")
        return {}
    wanted = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    found = {name: parser[profile][name] for name in wanted if name in parser[profile]}
    return cast("S3Config", found)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Where obstore's exceptions end. Their texts are not passed on: they may quote a request with its signature."""
    try:
        yield
    except (exceptions.NotFoundError, FileNotFoundError) as error:
        raise ObjectMissing(f"{what} is not in the store") from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError) as error:
        raise NodeRefused(f"{what}: the store refuses these credentials") from error
    except exceptions.UnknownConfigurationKeyError as error:
        raise UsageError("an S3 setting in the environment is unknown") from error
    except exceptions.BaseError as error:
        raise NodeUnreachable(f"{what}: the store does not answer as it should ({type(error).__name__})") from error
