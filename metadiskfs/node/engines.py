"""Which engine a store's name stands for."""

from pathlib import Path

from metadiskfs.errors import UsageError
from metadiskfs.node.disk import DiskEngine
from metadiskfs.node.engine import Engine
from metadiskfs.node.settings import NodeSettings
from metadiskfs.node.spool import SpoolFolder


def is_folder(store: str) -> bool:
    return "://" not in store


def open_engine(settings: NodeSettings) -> Engine:
    """Open the store. Raises UsageError for a name no engine has, OSError or NodeError where it is not to be had."""
    if is_folder(settings.store):
        return DiskEngine(Path(settings.store))
    if settings.store.startswith("s3://"):
        from metadiskfs.node.s3 import S3Engine

        return S3Engine.connect(settings.store, SpoolFolder(settings.state_dir / "tmp"))
    raise UsageError(f"not a store: {settings.store} (a folder, or s3://bucket/prefix)")
