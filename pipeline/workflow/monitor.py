"""The published image as its users get it: python -m pipeline.workflow.monitor check | tell | pull.

`check` pulls what a tag names today, runs every check of `python -m pipeline.image verify` on it, and compares how fast
it speaks with what its latency gate measured when it was built. `tell` opens, renews or closes the one issue about it.
`pull` only pulls it, for others to look at.
So a registry that lost a layer, a certificate that no longer fits, a base that was swapped or a generation of runners
that halves the speed is found by the maintainer before it is found by a visitor.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.artifact import read_json
from model.errors import InputError
from pipeline.image.contents import read_contents
from pipeline.image.engine import engine
from pipeline.image.promotion import history
from pipeline.image.registry import Registry, Repository, RepositoryUnavailableError, check_tag
from pipeline.image.transfer import pull
from pipeline.image.verify import Verdict, verify
from pipeline.progress import say
from pipeline.verdict import Check, write_report
from pipeline.workflow.find_artifact import MAIN
from pipeline.workflow.forge import Repository as Forge

DONE, FAILED, BAD_INPUT = 0, 1, 2
SPEED_SHARE_MIN = 0.5
"""Of the decode speed at the gate. Runners are shared and differ; a program that took a slow path loses more."""
VERIFIED = "verified"
"""The artifact in which image.yml keeps the report on every image that it has pushed."""
LABEL, TITLE = "canary", "The published image does not pass its checks"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 all is well, 1 a check failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except InputError as fault:
        say(f"error: {fault}")
        return BAD_INPUT


def check(options: argparse.Namespace) -> int:
    """Pulls what a tag names, checks it, and writes the report."""
    name, _, tag = options.image.rpartition(":")
    digest = _promoted(Registry(Repository.parse(name)), check_tag(tag))
    if digest is None:
        write_report(options.report, "canary", [], reasons=[], image=options.image, digest=None)  # no trouble to tell
        _publish(options, f"Nothing was promoted to `{options.image}` yet.")
        return DONE
    with engine() as client:
        image = pull(client, f"{name}@{digest}", None)
        verdict = verify(client, image, digest, cpuinfo=None, patience=options.patience)
        gate = read_contents(client, image).json("build/reports/latency.json")
    compare_speed(verdict, gate)
    write_report(options.report, "canary", verdict.checks, reasons=verdict.reasons, image=options.image, digest=digest)
    _publish(options, described(read_json(options.report)))
    return DONE if verdict.passed else FAILED


def pull_published(options: argparse.Namespace) -> int:
    """Pulls what a tag names, and writes by what name the engine holds it; nothing if nothing was promoted yet."""
    name, _, tag = options.image.rpartition(":")
    digest = _promoted(Registry(Repository.parse(name)), check_tag(tag))
    if digest is None:
        say(f"Nothing was promoted to {options.image} yet.")
        return DONE
    with engine() as client:
        pull(client, f"{name}@{digest}", None)
    print(f"{name}@{digest}")
    if options.github_output:
        with options.github_output.open("a", encoding="utf-8") as file:
            file.write(f"image={name}@{digest}\n")
    return DONE


def _promoted(registry: Registry, tag: str) -> str | None:
    """What a tag names; None if nothing was promoted to it yet. Raises InputError if something was, and is gone."""
    try:
        digest = registry.digest_of(tag)
    except RepositoryUnavailableError:
        if _may_have_been_pushed():
            raise
        return None
    if digest is None and history(registry, tag):
        raise InputError(
            f"{registry.repository}:{tag}: the tag is gone, and images were promoted to it; promote one of them again"
        )
    return digest


def _may_have_been_pushed() -> bool:
    """Whether a workflow here has verified a pushed image, or GitHub cannot be asked about that."""
    return not os.environ.get("GITHUB_TOKEN") or Forge.of_this_run().keeper(VERIFIED, {MAIN}) is not None


def _publish(options: argparse.Namespace, text: str) -> None:
    say(text)
    if options.summary:
        with options.summary.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def compare_speed(verdict: Verdict, gate: dict[str, Any]) -> None:
    """Adds the check of decode speed against what the latency gate measured, in tokens per second."""
    now = verdict.facts.get("answers", {}).get("miss", {}).get("tokens_per_second")
    if now is None:
        return  # it never was ready or said nothing, which is a check that failed already
    then = gate["decode_tokens_per_s"]
    verdict.checks.append(
        Check(name="decode speed, share of its gate's", value=now / then, limit=SPEED_SHARE_MIN, bound="at least")
    )
    if now / then < SPEED_SHARE_MIN:
        verdict.reasons.append(f"it decodes {now:.1f} tokens/s, and {then:.1f} when it was built")


def described(report: dict[str, Any]) -> str:
    """A report as Markdown: what failed and why, or that nothing did."""
    failed = [check for check in report["checks"] if not check["passed"]]
    lines = [f"`{report['image']}` is `{report['digest']}`.", ""]
    if not failed:
        return "\n".join([*lines, f"All {len(report['checks'])} checks passed."])
    lines += ["| failed | found | limit |", "|---|---:|---:|"]
    lines += [f"| {one['name']} | {one['value']:.4g} | {one['bound']} {one['limit']:.4g} |" for one in failed]
    return "\n".join([*lines, "", *(f"- {reason}" for reason in report["reasons"])])


def tell(options: argparse.Namespace) -> int:
    """Opens, renews or closes the issue; without a report the check itself came to nothing, which is trouble too."""
    if options.report.exists():
        report = read_json(options.report)
        trouble = None if report["passed"] else described(report)
    else:
        trouble = "The check came to no verdict: its job's log says why."
    say(Forge.of_this_run().tell(LABEL, TITLE, trouble))
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.workflow.monitor", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    checked = commands.add_parser("check", help="pull, check, compare", description=check.__doc__)
    checked.set_defaults(command=check)
    checked.add_argument("image", help="REPOSITORY:TAG")
    checked.add_argument(
        "--report", type=Path, required=True, metavar="FILE", help="where to write every check, as JSON"
    )
    checked.add_argument("--summary", type=Path, metavar="FILE", help="Markdown to append to, such as a job's summary")
    checked.add_argument("--patience", type=float, default=600, metavar="SECONDS", help="for loading (default: 600)")
    pulled = commands.add_parser("pull", help="only pull", description=pull_published.__doc__)
    pulled.set_defaults(command=pull_published)
    pulled.add_argument("image", help="REPOSITORY:TAG")
    pulled.add_argument("--github-output", type=Path, metavar="FILE", help="write `image` there, as a step's output")
    told = commands.add_parser("tell", help="open, renew or close the issue", description=tell.__doc__)
    told.set_defaults(command=tell)
    told.add_argument("report", type=Path, help="what check wrote")
    return parser


if __name__ == "__main__":
    sys.exit(main())
