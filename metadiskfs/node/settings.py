"""What a node is told at its start. Frozen; safe to hand to every worker process."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """Sizes in bytes, times in seconds.

    ``store`` is a folder or ``s3://bucket/prefix``; ``state_dir`` holds accounts and, for stores that are no folder,
    the spool. ``upload_token``: only uploads with this token are taken ("": all are); it makes the node an embedded
    one. ``secret`` allows deposits and withdrawals ("": none are). ``tls_cert`` and ``tls_key`` go together.
    """

    store: str
    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 8014
    max_file_size: int = 1 << 30
    upload_token: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    charge: bool = False
    cors_origins: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    workers: int = 1
    threads: int = 128
    client_uploads: int = 32
    client_requests: int = 64
    stall_timeout: float = 60.0
    header_timeout: float = 30.0
    stop_timeout: int = 30
    memory: int = 96 << 20
    web_page: bool = True
