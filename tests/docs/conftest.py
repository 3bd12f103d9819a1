"""The examples run in the mount that tests/posix uses."""

from tests.posix.conftest import open_folder, shared

__all__ = ["open_folder", "shared"]
