"""The comparison: every workload on every target, in interleaved rounds."""

import dataclasses
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import processes, targets
from bench.contents import make_tarball
from bench.processes import PROJECT, Failed, cpu_seconds, say
from bench.targets import Target
from bench.workloads import KEPT, MIB, SCENARIOS, Place, Sizes, Step

STEP_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One step on one target in one round. ``figures`` as the workload names them, ``cpu`` seconds by process."""

    target: str
    step: str
    round: int
    figures: dict[str, float]
    cpu: dict[str, float]


@dataclass(slots=True)
class Results:
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)


class Comparison:
    """Runs the chosen steps, and those they build upon, on targets that stay mounted meanwhile."""

    def __init__(self, chosen: Sequence[Target], steps: Sequence[str], sizes: Sizes, base: Path) -> None:
        self._targets = list(chosen)
        self._steps = frozenset(steps)
        self._sizes = sizes
        self._tarball = base / "tree.tar"
        self._done: dict[tuple[str, str], list[str]] = {}
        self._failed: set[tuple[str, str]] = set()
        self.results = Results()
        if self._steps & {"untar", "git", "rm"}:
            make_tarball(self._tarball, sizes.tree)

    def run(self, rounds: int) -> Results:
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for scenario in SCENARIOS:
                self._run_scenario(scenario, number)
            for target in self._targets:
                target.note_memory()
        self.results.memory = {
            target.name: {**target.peaks, "mount+transfer": target.mount_memory()} for target in self._targets
        }
        return self.results

    # -- one scenario -----------------------------------------------------------------------------------------------

    def _run_scenario(self, scenario: str, number: int) -> None:
        steps = list(self._needed(scenario))
        if not steps:
            return
        order = self._targets[number % len(self._targets) :] + self._targets[: number % len(self._targets)]
        for target in order:
            if scenario not in KEPT or number == 0:
                self._done[target.name, scenario] = []
                self._failed.discard((target.name, scenario))
                self._place(target, scenario, number).directory.mkdir()
        for step in steps:
            if scenario in KEPT and step.makes and number:
                continue
            for target in order:
                if target.only is None or step.name in target.only:
                    self._try(target, scenario, step, number)
        if scenario not in KEPT:
            for target in order:
                self._discard(target, scenario, number)

    def _needed(self, scenario: str) -> Iterator[Step]:
        """The chosen steps and those that make what they need."""
        steps = SCENARIOS[scenario]
        wanted = [position for position, step in enumerate(steps) if step.name in self._steps]
        for position, step in enumerate(steps):
            needed = step.makes and wanted and position < wanted[-1] and step.name not in ("onebyte", "git")
            if step.name in self._steps or needed:
                yield step

    def _place(self, target: Target, scenario: str, number: int) -> Place:
        number = 0 if scenario in KEPT else number
        seed = 1000 * number + list(SCENARIOS).index(scenario)
        done = tuple(self._done.get((target.name, scenario), ()))
        return Place(target.mountpoint / f"{scenario}{number}", self._tarball, self._sizes, seed, done)

    def _try(self, target: Target, scenario: str, step: Step, number: int) -> None:
        """Run a step; one that fails costs this target the rest of the scenario, nothing else."""
        if (target.name, scenario) in self._failed:
            return
        try:
            self._measure(target, scenario, step, number)
        except (Failed, OSError, subprocess.SubprocessError) as error:
            self._failed.add((target.name, scenario))
            self.results.failures.append(f"{target.name}, {step.name}, round {number + 1}: {error}")
            say(f"  {target.name} failed {step.name}: {error}")

    def _measure(self, target: Target, scenario: str, step: Step, number: int) -> None:
        targets.prepare(target, step.before)
        before_bytes = target.stored_bytes() if step.name == "copy" else 0
        before_cpu = cpu_seconds(target.roots())
        place = self._place(target, scenario, number)
        answer = run_child(place, step.name, "run")
        stored = target.sync() - answer["start"]
        reap()
        after_cpu = cpu_seconds(target.roots())
        figures: dict[str, float] = dict(answer["figures"])
        figures["closed"] = answer["seconds"]
        if step.stored:
            figures["stored"] = max(stored, answer["seconds"])
        if step.name == "create":
            figures["stored_rate"] = self._sizes.small / figures["stored"]
        if step.name == "copy":
            figures["new_bytes"] = target.stored_bytes() - before_bytes
        cpu = {role: after - before_cpu.get(role, 0.0) for role, after in after_cpu.items()}
        cpu["client"] = answer["cpu"]
        if step.makes:
            self._done[target.name, scenario].append(step.name)
        if step.check is not None:
            self._check(target, scenario, step, number)
        self.results.measurements.append(Measurement(target.name, step.name, number, figures, cpu))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        say(f"  {step.name:<11}{target.name:<14}{shown}")

    def _check(self, target: Target, scenario: str, step: Step, number: int) -> None:
        """Compare contents; cold, so that what is compared is what was stored, where the step asks for it."""
        targets.prepare(target, step.check_after)
        run_child(self._place(target, scenario, number), step.name, "check")
        reap()

    def _discard(self, target: Target, scenario: str, number: int) -> None:
        try:
            targets.settle(target)
            run_child(self._place(target, scenario, number), "", "discard")
            reap()
            target.sync()
        except (Failed, OSError, subprocess.SubprocessError) as error:
            say(f"  {target.name} cannot tidy up {scenario}: {error}")


def run_child(place: Place, step: str, act: str) -> dict[str, Any]:
    """Run a step in a fresh process; returns its answer the moment it comes. Raises Failed."""
    request = {
        "step": step,
        "act": act,
        "directory": str(place.directory),
        "tarball": str(place.tarball),
        "sizes": dataclasses.asdict(place.sizes),
        "seed": place.seed,
        "done": place.done,
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.child", json.dumps(request)],
        stdout=subprocess.PIPE,
        cwd=PROJECT,
        preexec_fn=processes.end_with_parent,
    )
    _children.append(child)
    answer = _first_line(child)
    if "error" in answer:
        raise Failed(answer["error"])
    return answer


_children: list["subprocess.Popen[bytes]"] = []
"""Children whose answer has come, but who may still be ending: nobody waits for that inside a measurement."""


def _first_line(child: "subprocess.Popen[bytes]") -> dict[str, Any]:
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], STEP_SECONDS)
    line = child.stdout.readline() if ready else b""
    if not line:
        child.kill()
        raise Failed("the workload's process died" if ready else f"took longer than {STEP_SECONDS:.0f} s")
    answer: dict[str, Any] = json.loads(line)
    return answer


def reap() -> None:
    """Wait for children that have answered."""
    while _children:
        child = _children.pop()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def as_json(results: Results, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Everything, for later comparison."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": processes.machine(),
        "rounds": rounds,
        "sizes": dataclasses.asdict(sizes),
        "file_mib": sizes.file / MIB,
        "measurements": [dataclasses.asdict(measurement) for measurement in results.measurements],
        "memory": results.memory,
        "failures": results.failures,
    }
