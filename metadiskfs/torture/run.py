"""A torture run: rounds of random operations, something killed in each, and everything compared after it."""

import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from metadiskfs.errors import MetadiskfsError, MountError
from metadiskfs.torture.model import Model
from metadiskfs.torture.player import Difference, Player
from metadiskfs.torture.world import TortureFailed, World

log = logging.getLogger(__name__)

_HANGING_SECONDS = 60.0
_STOPPED_SECONDS = 1.5
_FATAL = {"mount": 40, "everything": 25, "mount, SIGTERM": 8, "plain unmount": 8, "unmount": 4}
_HARMLESS = {"transfer": 12, "node": 12, "node worker": 8, "node, stopped": 5, "nothing": 3}


@dataclass(slots=True)
class Report:
    """What a run came to."""

    seed: int
    seconds: float = 0.0
    rounds: int = 0
    operations: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    compared_files: int = 0
    differences: list[str] = field(default_factory=list)
    folder: str = ""


class Torture:
    """One run. ``tell`` is called after each round with the report so far."""

    def __init__(self, seed: int, *, tell: Callable[[Report], None] = lambda _report: None) -> None:
        self.report = Report(seed)
        self._dice = random.Random(seed)
        self._tell = tell
        self._world = World()
        self._model = Model()
        self._player = Player(self._world.mountpoint, self._model, random.Random(seed + 1))
        self._busy_since = 0.0
        self._over = threading.Event()

    def run(self, seconds: float) -> Report:
        """Play rounds for so long. The world is kept where something differed, and removed otherwise."""
        started = time.monotonic()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        try:
            self._world.mount()
            while time.monotonic() - started < seconds:
                self._round()
                self.report.seconds = time.monotonic() - started
                self._tell(self.report)
        except TortureFailed as error:
            self._differ([str(error)])
        finally:
            self._over.set()
            self._player.drop_handles()
            self.report.seconds = time.monotonic() - started
            self.report.folder = str(self._world.folder) if self.report.differences else ""
            self._world.close(keep=bool(self.report.differences))
        return self.report

    # -- one round ------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        self.report.rounds += 1
        what = _draw(self._dice, _FATAL | _HARMLESS)
        delay = self._dice.choice([0.0, self._dice.uniform(0, 0.1), self._dice.uniform(0, 2.0)])
        if self._dice.random() < 0.3:
            self._clear_cache()
        hurt = threading.Thread(target=self._hurt, args=(what, delay), daemon=True)
        until = time.monotonic() + delay + self._dice.uniform(0, 0.5)
        hurt.start()
        died = False
        while not died and (hurt.is_alive() or time.monotonic() < until):
            died = not self._act()
        hurt.join()
        self.report.kills[what] = self.report.kills.get(what, 0) + 1
        if what in _FATAL:
            self._come_back(what)
        elif not died:
            self._settle_live()
        else:
            self._differ([f"the mount died of: {what}"])
            self._come_back("mount")

    def _act(self) -> bool:
        """One operation. False when the mount is gone."""
        self._busy_since = time.monotonic()
        try:
            self._player.act()
            self.report.operations += 1
        except Difference as difference:
            self._differ([str(difference)])
        except (OSError, MountError) as error:
            if self._is_gone():
                return False
            self._differ([f"an operation failed: {error!r}"])
            self._model.pending = None
        finally:
            self._busy_since = 0.0
        return True

    def _is_gone(self) -> bool:
        """An error came: from a mount that is dying?"""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if not self._world.is_alive or not os.path.ismount(self._world.mountpoint):
                return True
            time.sleep(0.01)
        return False

    def _hurt(self, what: str, delay: float) -> None:
        time.sleep(delay)
        world = self._world
        if what == "everything":
            for name in self._dice.sample(["mount", "transfer", "node", "worker"], 4):
                world.signal(name)
        elif what in ("mount", "transfer", "node"):
            world.signal(what)
        elif what == "node worker":
            world.signal("worker")
        elif what == "mount, SIGTERM":
            world.signal("mount", signal.SIGTERM)
        elif what == "node, stopped":
            world.signal("worker", signal.SIGSTOP)
            time.sleep(_STOPPED_SECONDS)
            world.signal("worker", signal.SIGCONT)

    # -- afterwards -----------------------------------------------------------------------------------------------

    def _come_back(self, what: str) -> None:
        """Mount again and compare with what was promised."""
        clean = what in ("plain unmount", "unmount")
        if clean:
            self._player.close_all()
            self._model.promise_all()
        if what == "plain unmount":
            self._world.unmount()
        elif what == "unmount":
            done = self._world.run("unmount", str(self._world.mountpoint))
            if done.returncode:
                self._differ([f"unmount: {done.stderr.strip()}"])
        else:
            self._player.drop_handles()
        self._differ(self._world.wait_for_end())
        self._world.mount()
        settle = self._model.compare_live if clean else self._model.settle
        self._differ(settle(self._world.mountpoint))
        self._count_files()
        self._differ(self._world.leftovers())
        self._check_index()

    def _settle_live(self) -> None:
        """Nothing of the file system's own died: all of it is as it was, open files as well."""
        if self._dice.random() < 0.3:
            self._player.close_all()
            self._differ(self._model.compare_live(self._world.mountpoint))
            self._count_files()
            self._check_index()

    def _check_index(self) -> None:
        self._differ(self._world.verify())
        if self._dice.random() < 0.2:
            self._world.ask("sync")
            self._model.promise_all()

    def _count_files(self) -> None:
        self.report.compared_files += len(self._model.files())
        self.report.by_kind = dict(self._player.counts.most_common())

    def _clear_cache(self) -> None:
        try:
            self._world.ask("clear_cache")
        except MetadiskfsError as error:
            self._differ([f"the cache could not be cleared: {error}"])

    def _differ(self, differences: list[str]) -> None:
        for difference in differences:
            log.error("round %d: %s", self.report.rounds, difference)
            self.report.differences.append(f"round {self.report.rounds}: {difference}")

    def _watch(self) -> None:
        """An operation that never returns is a difference too; killing the mount sets it free."""
        while not self._over.wait(1.0):
            since = self._busy_since
            if since and time.monotonic() - since > _HANGING_SECONDS:
                self._differ([f"an operation hangs for {_HANGING_SECONDS:.0f} s"])
                self._world.signal("mount")
                self._busy_since = 0.0


def _draw(dice: random.Random, weights: dict[str, int]) -> str:
    return dice.choices(list(weights), list(weights.values()))[0]
