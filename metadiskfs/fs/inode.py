"""One file, directory or link as the volume holds it in memory."""

import stat
from typing import TYPE_CHECKING

from metadiskfs.store.index import InodeRow

if TYPE_CHECKING:
    from metadiskfs.fs.content import Content


class Inode:
    """Attributes of an inode, shared by all its handles and names; times in nanoseconds, sizes in bytes.

    mode, owner, nlink and times change under ``Index.lock``; size, held and the times of a file's content under its
    content's lock. ``opens`` counts handles and is guarded by the volume's lock; ``closed`` is when (monotonic clock)
    the last one ended.
    """

    __slots__ = (
        "atime_ns",
        "closed",
        "content",
        "ctime_ns",
        "gid",
        "held",
        "mode",
        "mtime_ns",
        "nlink",
        "number",
        "opens",
        "rdev",
        "size",
        "target",
        "uid",
    )

    def __init__(self, row: InodeRow) -> None:
        (
            self.number,
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.size,
            self.held,
            self.rdev,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.target,
        ) = row
        self.opens = 0
        self.closed = 0.0
        self.content: Content | None = None

    def attributes(self) -> tuple[int, ...]:
        """In the order of StatLayout.pack() and of an InodeRow."""
        return (
            self.number, self.mode, self.uid, self.gid, self.nlink, self.size, self.held, self.rdev,
            self.atime_ns, self.mtime_ns, self.ctime_ns,
        )  # fmt: skip

    def row(self) -> InodeRow:
        return (
            self.number, self.mode, self.uid, self.gid, self.nlink, self.size, self.held, self.rdev,
            self.atime_ns, self.mtime_ns, self.ctime_ns, self.target,
        )  # fmt: skip

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_busy(self) -> bool:
        """Must stay in memory: somebody has it open."""
        return self.opens > 0 or self.content is not None
