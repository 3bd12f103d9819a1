"""One step in a process of its own, so that its CPU time is told apart from the benchmark's.

    python -m bench.child '{"step": "write", "act": "run", ...}'

Prints one line of JSON as soon as the step ended, before anything else is tidied up.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench import workloads
from bench.workloads import STEPS, Place, Sizes


def main() -> None:
    request = json.loads(sys.argv[1])
    place = Place(
        Path(request["directory"]),
        Path(request["tarball"]),
        Sizes(**request["sizes"]),
        request["seed"],
        tuple(request["done"]),
    )
    answer: dict[str, object] = {}
    if request["act"] == "run":
        timed = STEPS[request["step"]].run(place)
        answer = {"start": timed.start, "end": timed.end, "seconds": timed.seconds, "figures": timed.figures}
    elif request["act"] == "check":
        check = STEPS[request["step"]].check
        assert check is not None
        check(place)
    else:
        workloads.discard(place)
    cpu = workloads.cpu_marks[-1] - workloads.cpu_marks[0] if workloads.cpu_marks else 0.0
    os.write(1, json.dumps({**answer, "cpu": cpu}).encode() + b"\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, workloads.Wrong, subprocess.CalledProcessError) as error:
        os.write(1, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        sys.exit(1)
