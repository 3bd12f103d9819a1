"""Places where a test may let the process die, between two steps that belong together. Off unless asked for.

``METADISKFS_CRASH_AT=name`` kills the process (SIGKILL) when it first comes by that place. docs/CRASH.md lists the
names and what heals each window.
"""

import os
import signal

_PLACE = os.environ.get("METADISKFS_CRASH_AT", "")


def crash_point(name: str) -> None:
    """Die here, if a test asked for it."""
    if name == _PLACE:
        os.kill(os.getpid(), signal.SIGKILL)
