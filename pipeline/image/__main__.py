"""The image's command line: python -m pipeline.image build | verify | push | promote | rollback | predicate."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from model.errors import InputError
from pipeline.fingerprint import ROOT
from pipeline.image.build import build as build_image
from pipeline.image.engine import engine, local_image
from pipeline.image.predicate import predicate as statement_of
from pipeline.image.promotion import PROMOTED, Entry
from pipeline.image.promotion import promote as promote_digest
from pipeline.image.promotion import rollback as roll_back
from pipeline.image.registry import Registry, Repository, parse_digest
from pipeline.image.transfer import licence_faults, pull
from pipeline.image.transfer import push as push_image
from pipeline.image.verify import verify as verify_image
from pipeline.progress import say
from pipeline.verdict import write_report

DONE, FAILED, BAD_INPUT, CRASHED = 0, 1, 2, 3
EPILOG = """examples:
  python -m pipeline.image build
  python -m pipeline.image verify emerald:embedded --report build/embedded/reports/image.json
  python -m pipeline.image push emerald:embedded user/emerald             prints the digest
  python -m pipeline.image promote user/emerald@sha256:... latest --verdict report.json
  python -m pipeline.image rollback user/emerald latest

credentials are those of docker login; the engine is DOCKER_HOST's, or this machine's
exit codes: 0 done, 1 a check failed, 2 bad input, 3 a defect of the pipeline itself"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; see `EPILOG`."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except InputError as fault:
        say(f"error: {fault}")
        return BAD_INPUT
    except KeyboardInterrupt:
        say("stopped; nothing was promoted that is not said to be above")
        return 130
    except Exception:
        traceback.print_exc()
        say("this is a defect of the pipeline, not of your input; please report it with the lines above")
        return CRASHED


def build(options: argparse.Namespace) -> int:
    """Builds the image of a build folder; its id on standard output."""
    suffix = "" if options.target == "serve" else f"-{options.target}"
    with engine() as client:
        print(
            build_image(
                client,
                options.build.resolve(),
                target=options.target,
                tag=options.tag or f"emerald:{options.build.resolve().name}{suffix}",
                platform=options.platform,
                base=options.base,
                builder=options.builder,
                network=options.network,
                afresh=options.no_cache,
            )
        )
    return DONE


def verify(options: argparse.Namespace) -> int:
    """Runs an image as strictly as it may be run, asks it, and writes every check."""
    digest = options.image.partition("@")[2]
    with engine() as client:
        image = pull(client, options.image, None) if digest else local_image(client, options.image)
        verdict = verify_image(client, image, digest or None, cpuinfo=options.emulated, patience=options.patience)
    for check in verdict.checks:
        say(f"  {'pass' if check.passed else 'FAIL'}  {check}")
    for reason in verdict.reasons:
        say(f"because {reason}")
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        write_report(options.report, "image", verdict.checks, reasons=verdict.reasons, **verdict.facts)
    say(f"{options.image}: {'verified' if verdict.passed else 'not fit to be shown to anyone'}")
    return DONE if verdict.passed else FAILED


def push(options: argparse.Namespace) -> int:
    """Pushes an image under a candidate's tag, if its licences allow; its digest on standard output."""
    Repository.parse(options.repository)
    with engine() as client:
        image = local_image(client, options.image)
        faults = licence_faults(client, image)
        for fault in faults:
            say(f"licence gate: {options.image} lacks, of its {fault}")
        if faults:
            return FAILED
        print(push_image(client, image, options.repository, options.tag, options.after))
    return DONE


def promote(options: argparse.Namespace) -> int:
    """Points a tag to a verified digest, in the registry, and records it; the tag's digest on standard output."""
    repository, digest = parse_digest(options.image)
    outcome = promote_digest(Registry(repository), digest, options.tag, options.verdict, options.run)
    for fault in outcome.faults:
        say(f"not promoted: {fault}")
    if outcome.faults:
        return FAILED
    if outcome.superseded_by is not None:
        say(f"not promoted: {_superseded(options.run, outcome.superseded_by)}")
    print(outcome.digest or "")
    return DONE


def _superseded(run: int | None, newer: Entry) -> str:
    older = run is not None and run < newer.run
    why = f"run {run} is older than run {newer.run}" if older else f"meanwhile came the record {newer.tag}"
    did = "promoted" if newer.kind == PROMOTED else "went back to"
    return f"{why}, which {did} {newer.digest}; roll back, or start a new run, to go back on purpose"


def rollback(options: argparse.Namespace) -> int:
    """Points a tag back to the digest before, or to a recorded one; the tag's digest on standard output."""
    print(roll_back(Registry(Repository.parse(options.repository)), options.tag, options.to, options.run))
    return DONE


def predicate(options: argparse.Namespace) -> int:
    """The verdicts of all gates as one JSON predicate, on standard output."""
    statement, faults = statement_of(options.build, options.reports, options.digest)
    for fault in faults:
        say(f"not to be attested: {fault}")
    if faults:
        return FAILED
    print(json.dumps(statement, indent=2, ensure_ascii=False))
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.image",
        description="Builds the serving image, tests that very image, and promotes it by its digest.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chosen = {}
    for command in (build, verify, push, promote, rollback, predicate):
        what = (command.__doc__ or "").splitlines()[0]
        chosen[command] = commands.add_parser(command.__name__, help=what, description=what)
        chosen[command].set_defaults(command=command)
    for command in (build, predicate):
        chosen[command].add_argument(
            "--build", type=Path, default=ROOT / "build/embedded", metavar="FOLDER", help="default: build/embedded"
        )
    _add_build_options(chosen[build])
    chosen[verify].add_argument("image", help="a local image, or REPOSITORY@sha256:… to be pulled anew")
    chosen[verify].add_argument("--report", type=Path, metavar="FILE", help="where to write every check, as JSON")
    chosen[verify].add_argument(
        "--emulated",
        type=Path,
        metavar="CPUINFO",
        help="run another architecture's image, emulated, with this file as /proc/cpuinfo",
    )
    chosen[verify].add_argument(
        "--patience", type=float, default=600, metavar="SECONDS", help="how long loading may take (default: 600)"
    )
    chosen[push].add_argument("image", help="a local image")
    chosen[push].add_argument("repository", help="user/name on Docker Hub, or host/name")
    chosen[push].add_argument("--as", dest="tag", metavar="TAG", help="default: candidate- and the image's id")
    chosen[push].add_argument("--after", metavar="TAG", help="pull this tag first, and push only layers it has not")
    chosen[promote].add_argument("image", help="REPOSITORY@sha256:…")
    chosen[promote].add_argument("tag")
    chosen[promote].add_argument("--verdict", type=Path, metavar="FILE", help="the report of verifying that digest")
    chosen[rollback].add_argument("repository")
    chosen[rollback].add_argument("tag")
    chosen[rollback].add_argument("--to", metavar="DIGEST", help="a recorded digest (default: the one before)")
    for command in (promote, rollback):
        chosen[command].add_argument(
            "--run",
            type=_run_id,
            default=os.environ.get("GITHUB_RUN_ID") or None,
            metavar="ID",
            help="the GitHub run that asks; no promotion replaces a newer run's (default: GITHUB_RUN_ID, if it is set)",
        )
    chosen[predicate].add_argument("--digest", metavar="DIGEST", help="the one that is to be attested")
    chosen[predicate].add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="reports of verify")
    return parser


def _run_id(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no run of GitHub: give the digits of GITHUB_RUN_ID")
    return int(text)


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=["serve", "lambda"], default="serve", help="default: serve")
    parser.add_argument("--tag", metavar="NAME", help="default: emerald: and the build folder's name")
    parser.add_argument("--base", metavar="IMAGE", help="default: the Dockerfile's, by its digest")
    parser.add_argument(
        "--builder",
        metavar="IMAGE",
        help="image to install packages in; it needs the base's Python (default: the base)",
    )
    parser.add_argument("--network", metavar="NAME", help="network of the build, such as host")
    parser.add_argument("--no-cache", action="store_true", help="make every layer anew")
    parser.add_argument("--platform", metavar="NAME", help="such as linux/arm64, where Docker emulates it")


if __name__ == "__main__":
    sys.exit(main())
