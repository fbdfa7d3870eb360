"""Whether every job of the pipeline workflow did what was planned; its last job: python3 -m pipeline.workflow.conclude.

GitHub counts a required check that was skipped as passed, and skips whatever comes after a skipped job. So one job that
always runs looks at all others, and is the one that branch protection asks for. It reads `NEEDS`, the `needs` context.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

Needs = Mapping[str, Mapping[str, Any]]


def main() -> int:
    """0 if all went as planned; else 1, with every reason."""
    needs: Needs = json.loads(os.environ["NEEDS"])
    faults = shortfalls(needs)
    for fault in faults:
        print(f"::error::{fault}")
    if not faults:
        outputs = needs["image"]["outputs"]
        digest = outputs.get("promoted")
        newer = ", by a newer run" if outputs.get("superseded") == "true" else ""
        done = f"{digest} is promoted{newer}" if digest else "nothing was to be pushed"
        print(f"all jobs did what was planned; {done}")
    return 1 if faults else 0


def shortfalls(needs: Needs) -> list[str]:
    """What did not go as planned. No job may be skipped: what a run leaves out is within the job `image`."""
    faults = [f"job {name}: {job['result']}" for name, job in needs.items() if job["result"] != "success"]
    missing = {"doctor", "plan", "weights", "cache", "gates", "image"} - needs.keys()
    faults += [f"job {name}: this workflow no longer waits for it" for name in sorted(missing)]
    if faults:
        return faults
    push, outputs = needs["plan"]["outputs"].get("push"), needs["image"]["outputs"]
    if push not in ("true", "false"):
        return [f"job plan: its output push is {push!r}"]
    steps = [outputs.get(name) for name in ("pushed", "verified", "promoted")]
    if outputs.get("superseded") == "true" and steps[2]:  # a newer run's image stays, as it should
        steps[2] = steps[1]
    if push == "true" and (not steps[0] or len(set(steps)) != 1):
        faults.append("job image: what was pushed, verified and promoted are not one digest: {}, {}, {}".format(*steps))
    if push == "false" and any(steps):
        faults.append(f"job image: nothing was to be pushed, and {next(filter(None, steps))} was")
    return faults


if __name__ == "__main__":
    sys.exit(main())
