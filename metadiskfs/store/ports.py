"""What the store needs of the transfer process: a door, so that this room knows no network."""

from typing import Protocol

from metadiskfs.metadisk.jobs import FetchJob, UploadJob


class Transfer(Protocol):
    """Hands jobs to the transfer process; results come back through the callbacks it was built with.

    MUST be safe to call from any thread and MUST NOT wait for the network. ``upload`` and ``fetch`` return False
    when the queue to the process is full; the caller keeps the jobs and tries again after a result. Uploads handed
    out together are done one after the other. When the process died and was started anew, every job without a result
    is gone: its owner is told to hand it out again.
    """

    def upload(self, *jobs: UploadJob) -> bool: ...

    def fetch(self, job: FetchJob) -> bool: ...
