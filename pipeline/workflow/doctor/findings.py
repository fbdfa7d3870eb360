"""What a check of `doctor` finds, and how findings are told: as a list, as annotations, and as a Markdown table.

Like __main__.py, this file is also read by Pythons that are too old for the rest of the project, down to 3.9.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

Level = Literal["ok", "warning", "error"]
MARKS: "dict[Level, str]" = {"ok": "✅", "warning": "⚠️", "error": "❌"}
"""In the order in which findings are told: errors last, which is where a terminal ends."""


class Finding(NamedTuple):
    """The result of one check. An error will certainly make the build fail; a warning may cost something later."""

    level: Level
    thing: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.thing}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def ok(thing: str, found: str) -> Finding:
    return Finding("ok", thing, found)


def warning(thing: str, found: str, remedy: str = "") -> Finding:
    return Finding("warning", thing, found, remedy)


def error(thing: str, found: str, remedy: str = "") -> Finding:
    return Finding("error", thing, found, remedy)


def tell(findings: Sequence[Finding]) -> int:
    """Prints the findings; in GitHub Actions also annotates the run and adds to its summary. Returns the exit code."""
    ordered = [finding for level in MARKS for finding in findings if finding.level == level]
    print(listed(ordered))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print("\n".join(annotation(finding) for finding in ordered if finding.level != "ok"), flush=True)
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(table(ordered))
    return 2 if counted(findings, "error") else 0


def listed(findings: Sequence[Finding]) -> str:
    """One line for each finding, its remedy below it, and a conclusion."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.thing}: {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<8} -> {finding.remedy}")
    return "\n".join([*lines, "", _conclusion(findings)])


def annotation(finding: Finding) -> str:
    """As GitHub Actions reads it from the log; it ends a command at a line break, and decodes %25, %0D and %0A."""
    text = str(finding).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{finding.level}::{text}"


def table(findings: Sequence[Finding]) -> str:
    """The findings as Markdown, for a job's summary."""
    rows = [
        f"| {MARKS[level]} | {_cell(thing)} | {_cell(found)} | {_cell(remedy)} |"
        for level, thing, found, remedy in findings
    ]
    lines = ["## Doctor", "", _conclusion(findings), "", "| | | found | what to do |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def counted(findings: Sequence[Finding], level: Level) -> int:
    return sum(1 for finding in findings if finding.level == level)


def _conclusion(findings: Sequence[Finding]) -> str:
    errors, warnings = counted(findings, "error"), counted(findings, "warning")
    verdict = "the build will fail until the errors are mended" if errors else "nothing here stops the build"
    return f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}: {verdict}"


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
