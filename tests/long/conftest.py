"""Programs that take long: run by scripts/test-posix (METADISKFS_POSIX_ALL), not by the suite."""

import os

from tests.posix.conftest import disk, inside, open_folder, place, shared, user, users

__all__ = ["disk", "inside", "open_folder", "place", "shared", "user", "users"]

collect_ignore_glob = [] if "METADISKFS_POSIX_ALL" in os.environ else ["test_*.py"]
