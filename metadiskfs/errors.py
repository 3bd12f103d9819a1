"""Every error this project raises on purpose, with its errno and its exit code.

The class is the only place where either is decided::

    MetadiskfsError                EIO     1
    ├── UsageError                 EINVAL  2   what was asked for makes no sense
    ├── NodeError                  EIO     3   the node did not do its part
    │   ├── NodeUnreachable                    refused, timed out, cut off: worth another try
    │   ├── NodeBusy                           429 or 5xx: worth another try, perhaps at a named time
    │   ├── NodeRefused                        an answer no retry will change (other 4xx, not MetaDisk at all)
    │   ├── ObjectMissing                      404 for a filehash
    │   ├── BalanceInsufficient    EDQUOT      402
    │   ├── ObjectTooLarge         EFBIG       413
    │   └── ContentMismatch                    bytes or a receipt that do not prove
    ├── ChunkDamaged               EIO     4   a local chunk file is not what its name says
    ├── CacheFull                  ENOSPC  5   nothing can be evicted: all of it waits for upload
    ├── VolumeError                EIO     6
    │   ├── VolumeBusy             EBUSY       mounted by another process
    │   ├── WrongNode                          its chunks lie on another node
    │   ├── IndexTooNew                        written by a later program
    │   └── IndexDamaged
    ├── MountError                 EIO     7   the mountpoint or FUSE itself
    ├── StillPending               EAGAIN  8   time ran out with uploads pending
    └── DamageFound                EIO     9   verify found what it could not, or was not to, repair

POSIX answers of the file system (ENOENT, EEXIST, ...) are plain ``OSError``: the errno is the message.
"""

import errno as _errno
from typing import ClassVar


class MetadiskfsError(Exception):
    """Root of the tree. ``str()`` of it is one line fit for a user."""

    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1


class UsageError(MetadiskfsError):
    errno = _errno.EINVAL
    exit_code = 2


class NodeError(MetadiskfsError):
    """The node did not do its part.

    ``retry_after`` is in seconds where the node named a time, else None.
    """

    exit_code = 3
    transient: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NodeUnreachable(NodeError):
    transient = True


class NodeBusy(NodeError):
    transient = True


class NodeRefused(NodeError):
    pass


class ObjectMissing(NodeError):
    pass


class BalanceInsufficient(NodeError):
    errno = _errno.EDQUOT


class ObjectTooLarge(NodeError):
    errno = _errno.EFBIG


class ContentMismatch(NodeError):
    pass


class ChunkDamaged(MetadiskfsError):
    exit_code = 4


class CacheFull(MetadiskfsError):
    errno = _errno.ENOSPC
    exit_code = 5


class VolumeError(MetadiskfsError):
    exit_code = 6


class VolumeBusy(VolumeError):
    errno = _errno.EBUSY


class WrongNode(VolumeError):
    pass


class IndexTooNew(VolumeError):
    pass


class IndexDamaged(VolumeError):
    pass


class MountError(MetadiskfsError):
    exit_code = 7


class StillPending(MetadiskfsError):
    errno = _errno.EAGAIN
    exit_code = 8


class DamageFound(MetadiskfsError):
    exit_code = 9
