"""The pipeline's commands: run | list | settings | explain | status | key | check-data | doctor."""

import argparse
import os
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from rich.console import Console
from rich.table import Table

from model.errors import InputError
from model.fields import describe
from pipeline.configs import CONFIGS, Config, named_config, with_settings
from pipeline.fingerprint import ROOT
from pipeline.progress import quiet_libraries, say
from pipeline.stage import Build, Outcome
from pipeline.stages import table
from pipeline.verdict import Check

STAGES = [field.name for field in fields(Config)]
DONE, GATE_FAILED, BAD_INPUT, CRASHED = 0, 1, 2, 3

EPILOG = """examples:
  python -m pipeline run                                   everything, on the embedded model
  python -m pipeline run quantize --set quantize.scheme=int4-channel
  python -m pipeline run --config llama31-8b               Llama 3.1 8B, with HF_TOKEN set
  python -m pipeline explain build_cache                   what changed since it last ran
  python -m pipeline check-data                            what is wrong or doubtful in cache_data

exit codes: 0 done, 1 a gate failed, 2 bad input, 3 a defect of the pipeline itself"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; see `EPILOG`."""
    options = _parser().parse_args(arguments)
    quiet_libraries()
    try:
        config = with_settings(named_config(options.config), options.settings)
        folder = Path(options.build) if options.build else ROOT / "build" / options.config
        return int(options.command(Build(folder.resolve(), table(config)), options))
    except InputError as fault:
        say(f"error: {fault}")
        return BAD_INPUT
    except KeyboardInterrupt:
        say("stopped; finished stages are kept, run again to go on")
        return 130
    except Exception:
        traceback.print_exc()
        say("this is a defect of the pipeline, not of your input; please report it with the lines above")
        return CRASHED


def run(build: Build, options: argparse.Namespace) -> int:
    """Brings stages up to date and prints what each did."""
    if options.check:
        return _check(build, options.stages)
    outcomes = []
    for outcome in build.run(options.stages, force=options.force):
        outcomes.append(outcome)
        if outcome.state != "unchanged":
            say(f"  {outcome.state} in {outcome.seconds:.1f} s")
    _print_outcomes(outcomes)
    last = outcomes[-1]
    for check in last.failed:
        say(f"gate {last.stage} failed: {check}")
    if last.failed:
        say(f"see {build.folder / build.stage(last.stage).outputs[0]}; no later stage ran")
    return GATE_FAILED if last.failed else DONE


def _check(build: Build, names: Sequence[str]) -> int:
    outdated = build.outdated(names)
    for name, reasons in outdated.items():
        say(f"{name} is out of date: {'; '.join(reasons[:3])}")
    say("nothing was run" if outdated else "all is up to date")
    return GATE_FAILED if outdated else DONE


def list_stages(build: Build, _options: argparse.Namespace) -> int:
    """Prints every stage with what it reads and writes."""
    rows = Table("stage", "what it does", "reads", "writes", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for stage in build.stages:
        reads, writes = (*stage.sources, *stage.inputs), stage.outputs
        rows.add_row(stage.name, stage.purpose, "\n".join(map(str, reads)), "\n".join(map(str, writes)))
    Console(width=_width()).print(rows)
    return DONE


def settings(build: Build, _options: argparse.Namespace) -> int:
    """Prints every field that --set can change, its value and what it may be."""
    rows = Table("field", "value", "may be", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for stage in build.stages:
        for name, annotation in get_type_hints(type(stage.config), include_extras=True).items():
            rows.add_row(f"{stage.name}.{name}", str(getattr(stage.config, name)), describe(annotation))
    Console(width=_width()).print(rows)
    return DONE


def explain(build: Build, options: argparse.Namespace) -> int:
    """Prints why a stage would run, and every reason."""
    reasons = build.reasons(build.stage(options.stage))
    print(f"{options.stage} would run:" if reasons else f"{options.stage} is up to date")
    for reason in reasons:
        print(f"  {reason}")
    return DONE


def status(build: Build, options: argparse.Namespace) -> int:
    """Prints where every stage stands."""
    if options.markdown:
        print(_verdicts(build))
        return DONE
    rows = Table("stage", "state", "seconds", "checks", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for stage in build.stages:
        receipt, reasons = build.receipt(stage), build.reasons(stage)
        seconds = f"{receipt['seconds']:.1f}" if receipt else ""
        checks = f"{sum(1 for check in receipt['checks'])}" if receipt else ""
        rows.add_row(stage.name, "up to date" if not reasons else f"to run: {reasons[0]}", seconds, checks)
    Console(width=_width()).print(rows)
    return DONE


def _verdicts(build: Build) -> str:
    """What each stage that has run found, as a Markdown table."""
    lines = ["| | stage | seconds | found | limit |", "|---|---|---:|---:|---:|"]
    for stage in build.stages:
        receipt = build.receipt(stage)
        if receipt is None:
            continue
        checks = [Check(**row) for row in receipt["checks"]]
        lines.append(f"| {'✅' if receipt['passed'] else '❌'} | **{stage.name}** | {receipt['seconds']:.1f} | | |")
        for check in checks:
            mark = "✅" if check.passed else "❌"
            lines.append(f"| {mark} | {check.name} | | {check.value:.4g} | {check.bound} {check.limit:.4g} |")
    return "\n".join(lines)


def key(build: Build, options: argparse.Namespace) -> int:
    """Prints a digest of all that these stages' outputs depend on, and what to keep of them under it, a path a line."""
    digest = build.key(options.stages, options.given)
    paths = [os.path.relpath(path) for path in build.published(options.stages, options.given)]
    print(digest)
    print("\n".join(paths))
    if options.github_output:
        lines = [f"key={digest}", "paths<<END_OF_PATHS", *paths, "END_OF_PATHS"]
        with options.github_output.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    return DONE


def check_data(build: Build, options: argparse.Namespace) -> int:
    """Prints what is wrong in cache_data, with file and line, what is doubtful, and what would be worth adding."""
    from pipeline.check_data import check  # faiss and torch, which no other command needs

    found = check(Path(options.data), build.folder, options.misses)
    for kind, lines in found._asdict().items():
        for line in lines:
            print(f"{kind.removesuffix('s')}: {line}")
    say(", ".join(f"{len(lines)} {kind}" for kind, lines in found._asdict().items()))
    return BAD_INPUT if found.errors else DONE


def _print_outcomes(outcomes: Sequence[Outcome]) -> None:
    rows = Table("stage", "state", "seconds", "verdict", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for outcome in outcomes:
        verdict = "\n".join(f"{'pass' if check.passed else 'FAIL'}  {check}" for check in outcome.checks)
        rows.add_row(outcome.stage, outcome.state, f"{outcome.seconds:.1f}", verdict)
    Console(stderr=True, highlight=False, width=_width()).print(rows)


def _width() -> int:
    """The terminal's width; wide enough for a log line elsewhere."""
    return shutil.get_terminal_size((140, 24)).columns


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Builds the chatbot: fetch, quantize, export, cache, gates, report. A stage runs only when "
        "something it depends on has changed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", default="embedded", metavar="NAME", help=f"one of {', '.join(CONFIGS)} (default: embedded)"
    )
    common.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="change a field; repeatable, or several separated by semicolons; the command settings lists them",
    )
    common.add_argument("--build", metavar="FOLDER", help="where to build (default: build/NAME)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="say what this machine or fork lacks (works before anything is installed)")
    for command, name, what in (
        (run, "run", "bring stages up to date"),
        (list_stages, "list", "print the stages, what they read and write"),
        (settings, "settings", "print every field that --set can change, and its range"),
        (explain, "explain", "say why a stage would run"),
        (status, "status", "say where every stage stands"),
        (key, "key", "say what stages' outputs depend on, as one digest, and what to keep of them"),
        (check_data, "check-data", "say what is wrong or doubtful in cache_data"),
    ):
        chosen = commands.add_parser(name, parents=[common], help=what, description=command.__doc__)
        chosen.set_defaults(command=command)
        if command in (run, key):
            chosen.add_argument(
                "stages",
                nargs="*",
                metavar="STAGE",
                help=f"only these and what they need (default: all): {', '.join(STAGES)}",
            )
        if command is key:
            chosen.add_argument(
                "--given",
                nargs="*",
                default=[],
                metavar="STAGE",
                help="stages that are done, with all they need: what they wrote enters by its content",
            )
            chosen.add_argument(
                "--github-output",
                type=Path,
                metavar="FILE",
                help="also write `key` and `paths` there, as a GitHub Actions step's outputs",
            )
        if command is run:
            chosen.add_argument("--check", action="store_true", help="run nothing; exit 1 if anything is out of date")
            chosen.add_argument("--force", action="store_true", help="run them even if nothing changed")
        if command is status:
            chosen.add_argument("--markdown", action="store_true", help="what each gate found, as a Markdown table")
        if command is check_data:
            chosen.add_argument("--data", default="cache_data", metavar="FOLDER", help="default: cache_data")
            chosen.add_argument(
                "--misses", type=Path, metavar="FILE", help="missed questions, one a line, to suggest phrasings from"
            )
        if command is explain:
            chosen.add_argument("stage", metavar="STAGE")
    return parser
