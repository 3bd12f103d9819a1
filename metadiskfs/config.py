"""One frozen Config from four places: flags, then METADISKFS_* variables, then the file, then defaults.

Folders come from platformdirs, so that XDG_* variables move them. Nothing here creates anything on disk.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import platformdirs

from metadiskfs.errors import UsageError

APP = "metadiskfs"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE)
_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def parse_size(text: str | int) -> int:
    """Read ``10G``, ``512 MiB``, ``4096``: bytes, multiples of 1024. Raises UsageError."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"not a size: {text!r} (try 512M or 10G)")
    return int(float(match[1]) * 1024 ** " KMGTP".index(match[2].upper() or " "))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a command works with. Sizes in bytes, times in seconds.

    ``node`` is a URL, or "" for the embedded node. ``chunk_size`` counts when a volume is created; afterwards the
    volume's own is used. ``ca_file`` replaces the usual authorities of an https node. ``sweep_below_size``: free disk
    space under which the embedded node is swept by itself.
    """

    node: str = ""
    volume: str = "default"
    cache_size: int = 10 << 30
    chunk_size: int = 4 << 20
    ca_file: str = ""
    connect_timeout: float = 5.0
    read_timeout: float = 20.0
    read_deadline: float = 30.0
    backup_interval: float = 600.0
    recovery_file: str = ""
    sweep_below_size: int = 1 << 30
    data_dir: Path = Path()
    cache_dir: Path = Path()
    state_dir: Path = Path()

    @property
    def volume_dir(self) -> Path:
        """Index, work files and pending chunks of the volume: what must not be lost."""
        return self.data_dir / "volumes" / self.volume

    @property
    def volume_cache_dir(self) -> Path:
        """Stored chunks kept for speed: what may be deleted at any time."""
        return self.cache_dir / "volumes" / self.volume

    @property
    def embedded_node_dir(self) -> Path:
        """Objects of the user's own node, shared by all the user's volumes that have no other node."""
        return self.data_dir / "node"


def load(flags: Mapping[str, Any]) -> Config:
    """Build the Config; ``flags`` holds what the command line gave (None counts as not given).

    Raises UsageError on a value that makes no sense, wherever it stands.
    """
    values: dict[str, Any] = {}
    names = {field.name: field.default for field in fields(Config)}
    config_file = Path(os.environ.get("METADISKFS_CONFIG") or platformdirs.user_config_path(APP) / "config.toml")
    if config_file.is_file():
        values.update(_read_file(config_file, names))
    for name in names:
        if text := os.environ.get(f"METADISKFS_{name.upper()}"):
            values[name] = text
    values.update({name: value for name, value in flags.items() if name in names and value is not None})
    values.setdefault("data_dir", platformdirs.user_data_path(APP))
    values.setdefault("cache_dir", platformdirs.user_cache_path(APP))
    values.setdefault("state_dir", platformdirs.user_state_path(APP))
    return _checked(replace(Config(), **{name: _typed(name, value, names[name]) for name, value in values.items()}))


def _read_file(path: Path, names: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    if unknown := content.keys() - names.keys():
        raise UsageError(f"{path}: unknown setting {', '.join(sorted(unknown))}")
    return content


def _typed(name: str, value: Any, default: Any) -> Any:
    try:
        if name.endswith("_size"):
            return parse_size(value)
        if isinstance(default, float):
            return float(value)
        if isinstance(default, Path):
            return Path(value).expanduser().absolute()
        return str(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {value!r} makes no sense") from error


def _checked(config: Config) -> Config:
    if not _VOLUME_NAME.fullmatch(config.volume):
        raise UsageError(
            "a volume name has 1 to 64 letters, digits, '.', '_' or '-' and starts with a letter or digit"
        )
    if config.node and not re.match(r"https?://[^/]", config.node):
        raise UsageError(f"not a node's URL: {config.node!r} (http://host:port or https://...)")
    if not (64 << 10) <= config.chunk_size <= (64 << 20) or config.chunk_size % (64 << 10):
        raise UsageError("the chunk size lies between 64 KiB and 64 MiB and is a multiple of 64 KiB")
    return replace(config, node=config.node.rstrip("/"))
