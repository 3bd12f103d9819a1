"""Users to act as, and the folder to act in: on the disk and in a mount alike."""

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

AGENT = Path(__file__).parent / "agent.py"

ANNA, BEN, CARL = 65533, 65532, 65531
"""Users. Anna and Ben are in STAFF, each has a group of the same number."""
STAFF, GUESTS = 65500, 65501


class User:
    """Acts as one user in a process of its own (agent.py)."""

    def __init__(self, uid: int = 0, gid: int = 0, *groups: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(AGENT), *map(str, (uid, gid, *groups))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def batch(self, statements: Sequence[tuple[Path | str, str]]) -> list[Any]:
        """Execute (folder, statement) pairs in order."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump([(str(folder), statement) for folder, statement in statements], self._process.stdin)
        self._process.stdin.flush()
        answers: list[Any] = pickle.load(self._process.stdout)
        return answers

    def start(self, folder: Path | str, statement: str) -> None:
        """Begin what finish() waits for."""
        assert self._process.stdin is not None
        pickle.dump([(str(folder), statement)], self._process.stdin)
        self._process.stdin.flush()

    def finish(self) -> Any:
        assert self._process.stdout is not None
        return pickle.load(self._process.stdout)[0]

    def do(self, folder: Path | str, statement: str) -> Any:
        return self.batch([(folder, statement)])[0]

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()

    def kill(self) -> None:
        self._process.kill()
        self.end()
