"""Judges the vulnerabilities that a scan found in the image: python -m pipeline.image.vulnerabilities REPORT.

The report is grype's JSON. What a rebuild mends stops the image: the system layer takes every fix that Debian has
published, so a severe vulnerability that is fixed in Debian and still in the image shows that it was not rebuilt. What
a rebuild cannot mend stops nothing and is reported with its remedy, so that an advisory of tonight does not turn a
repository red in which nobody changed a line.

`requirements/accepted-vulnerabilities.yaml` lists those that a person has accepted, each with a reason and a last day.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from model.artifact import read_json
from model.errors import InputError
from pipeline.fingerprint import ROOT
from pipeline.progress import say
from pipeline.workflow.forge import Repository

PASSED, BLOCKED, BAD_INPUT = 0, 1, 2
ACCEPTED = ROOT / "requirements/accepted-vulnerabilities.yaml"
ACCEPTED_DAYS_MAX = 180
"""An acceptance is looked at again twice a year."""
FIELDS = ("id", "package", "reason", "expires")
SEVERITIES = ("Critical", "High", "Medium", "Low", "Negligible", "Unknown", "")
"""grype's words, worst first; it leaves the field out of what it knows nothing about."""
SEVERE = SEVERITIES[:2]
INTERPRETER_TYPES = ("binary", "UnknownPackage")
"""Types of the interpreter, which no package manager installed: in a scan of an image, and of its SPDX list."""
ROWS_MAX, WORST_MAX = 100, 5
"""Rows of a table (GitHub takes 65,536 characters for an issue), and names of what has no fix."""
LABEL, TITLE = "vulnerabilities", "The published image has vulnerabilities that can be mended"
SCAN_AGAIN = "scan again with grype, writing JSON (`grype sbom:sbom.spdx.json -o json`)"

_TEXT = {"type": "string"}
_NAMED = {"type": "object", "required": ["id"], "properties": {"id": _TEXT}}
_MATCH = {
    "type": "object",
    "required": ["vulnerability", "artifact"],
    "properties": {
        "vulnerability": {
            "type": "object",
            "required": ["id", "fix"],
            "properties": {
                "id": _TEXT,
                "severity": {"enum": SEVERITIES},
                "fix": {
                    "type": "object",
                    "required": ["state", "versions"],
                    "properties": {
                        "state": {"enum": ["fixed", "not-fixed", "wont-fix", "unknown", ""]},
                        "versions": {"type": ["array", "null"], "items": _TEXT},
                    },
                },
            },
        },
        "relatedVulnerabilities": {"type": "array", "items": _NAMED},
        "artifact": {
            "type": "object",
            "required": ["name", "version", "type"],
            "properties": {"name": _TEXT, "version": _TEXT, "type": _TEXT},
        },
    },
}
_REPORT = jsonschema.Draft202012Validator({
    "type": "object",
    "required": ["matches", "distro", "descriptor"],
    "properties": {
        "matches": {"type": "array", "items": _MATCH},
        "distro": {"type": "object", "required": ["name"], "properties": {"name": _TEXT}},
        "descriptor": {"type": "object", "required": ["name"], "properties": {"name": {"const": "grype"}}},
    },
})  # fmt: skip
"""What is read of grype's report, as grype/presenter/models writes it."""


class Remedy(Enum):
    """What mends a vulnerability, most urgent first."""

    REBUILD = (
        "build the image again (`--no-cache`, where layers are kept): it takes every fix that Debian has published"
    )
    LOCK = "`make lock` takes newer versions; Dependabot does so weekly"
    BASE = "renew the base image's digest in `Dockerfile`; Dependabot's docker ecosystem opens that pull request"
    PACKAGE = "install a version that has the fix"
    SERIES = "no fix for this Python's series; moving to a newer Python is what mends it"
    NONE = "no fix yet"


REMEDIES = list(Remedy)
RENEWABLE = (Remedy.LOCK, Remedy.BASE, Remedy.PACKAGE)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One vulnerability in one package."""

    id: str
    aliases: frozenset[str]
    """What other databases call it."""
    severity: str
    package: str
    version: str
    type: str
    fixed: bool
    fixes: tuple[str, ...]
    """Versions that have the fix."""

    @property
    def severe(self) -> bool:
        return self.severity in SEVERE

    @property
    def remedy(self) -> Remedy:
        if not self.fixed:
            return Remedy.NONE
        if self.package == "python" and self.type in INTERPRETER_TYPES:
            own = _series(self.version)
            return Remedy.BASE if own in map(_series, self.fixes) else Remedy.SERIES
        return {"deb": Remedy.REBUILD, "python": Remedy.LOCK}.get(self.type, Remedy.PACKAGE)

    @property
    def rank(self) -> int:
        """Of its severity: 0 is the worst."""
        return SEVERITIES.index(self.severity)


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """An entry of the reviewed list: this vulnerability of this package is accepted up to and including a day."""

    id: str
    package: str
    reason: str
    expires: date

    def covers(self, finding: Finding) -> bool:
        """Whether it is about this finding, by whichever of its names."""
        return self.package == finding.package and self.id in {finding.id, *finding.aliases}

    def __str__(self) -> str:
        return f"{_code(self.id)} in {_code(self.package)}"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The findings by what follows from them, each group in order."""

    blocking: tuple[Finding, ...]
    renewable: tuple[Finding, ...]
    unfixable: tuple[Finding, ...]
    lesser: tuple[Finding, ...]
    """Below High: counted only."""
    accepted: tuple[Finding, ...]
    expired: tuple[Acceptance, ...]
    """Their findings count again."""
    unused: tuple[Acceptance, ...]
    """About nothing that was found."""

    @property
    def warnings(self) -> list[str]:
        """What is to be done about the list of acceptances."""
        expired = (f"{entry}: its acceptance expired on {entry.expires}; decide again" for entry in self.expired)
        unused = (f"{entry}: accepted and no longer found; remove the entry" for entry in self.unused)
        return [*expired, *unused]


def judge(report: Mapping[str, Any], accepted: Sequence[Acceptance], today: date) -> Judgement:
    """Sorts the findings of grype's report. Raises InputError for anything else than such a report."""
    findings = _findings(report)
    valid = [entry for entry in accepted if today <= entry.expires]
    severe = [finding for finding in findings if finding.severe]
    excused = [finding for finding in severe if any(entry.covers(finding) for entry in valid)]
    counted = [finding for finding in severe if finding not in excused]
    used = [entry for entry in accepted if any(entry.covers(finding) for finding in findings)]
    return Judgement(
        blocking=tuple(finding for finding in counted if finding.remedy is Remedy.REBUILD),
        renewable=tuple(finding for finding in counted if finding.remedy in RENEWABLE),
        unfixable=tuple(finding for finding in counted if finding.remedy in (Remedy.SERIES, Remedy.NONE)),
        lesser=tuple(finding for finding in findings if not finding.severe),
        accepted=tuple(excused),
        expired=tuple(entry for entry in used if entry not in valid),
        unused=tuple(entry for entry in accepted if entry not in used),
    )


def _findings(report: Mapping[str, Any]) -> list[Finding]:
    """Worst first; of several about one vulnerability of one package, the most urgent."""
    fault = jsonschema.exceptions.best_match(_REPORT.iter_errors(report))
    if fault is not None:
        raise InputError(f"{fault.json_path}: {fault.message[:200]}, so this is no report of grype's; {SCAN_AGAIN}")
    if not report["distro"]["name"]:
        raise InputError(
            "$.distro.name is empty: grype did not recognise the distribution and judged none of its packages; "
            "list the image's packages again, so that each names its distribution"
        )
    found: dict[tuple[str, str], Finding] = {}
    for finding in sorted(map(_finding, report["matches"]), key=_urgency):
        found.setdefault((finding.id, finding.package), finding)
    return sorted(found.values(), key=lambda one: (one.rank, one.package, one.id))


def _urgency(finding: Finding) -> tuple[bool, int, int, tuple[str, ...]]:
    """Lowest for what stops the image, and never the same for two that differ in what is shown."""
    return not finding.severe, REMEDIES.index(finding.remedy), finding.rank, (finding.version, *finding.fixes)


def _finding(match: Mapping[str, Any]) -> Finding:
    vulnerability, artifact = match["vulnerability"], match["artifact"]
    return Finding(
        id=vulnerability["id"],
        aliases=frozenset(related["id"] for related in match.get("relatedVulnerabilities", ())),
        severity=vulnerability.get("severity", ""),
        package=artifact["name"],
        version=artifact["version"],
        type=artifact["type"],
        fixed=vulnerability["fix"]["state"] == "fixed",
        fixes=tuple(vulnerability["fix"]["versions"] or ()),
    )


def _series(version: str) -> list[str]:
    """Such as ["3", "11"] of 3.11.16: a series gets fixes for five years, and none of a later one's versions."""
    return version.split(".")[:2]


class _Loader(yaml.BaseLoader):
    """All scalars are text; a field given twice, as where a dash is missing, is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if len(set(names)) < len(names):
            raise yaml.constructor.ConstructorError(None, None, "an entry gives a field twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_accepted(file: Path, today: date) -> list[Acceptance]:
    """The reviewed list. Raises InputError that names the entry and what to do about it."""
    try:
        rows = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{file}: missing; an empty list is `[]`") from None
    except (UnicodeDecodeError, yaml.YAMLError) as fault:
        raise InputError(f"{file}: broken YAML ({fault}); check dashes, indentation and colons") from fault
    if not isinstance(rows, list):
        raise InputError(f"{file}: no list; begin every entry with `- id:`, and write `[]` for none")
    entries: dict[tuple[str, str], Acceptance] = {}
    for number, row in enumerate(rows, start=1):
        entry = _acceptance(row, f"{file}: entry {number}", today)
        if (entry.id, entry.package) in entries:
            raise InputError(f"{file}: entry {number}: {entry.id} in {entry.package} stands twice; keep one")
        entries[entry.id, entry.package] = entry
    return list(entries.values())


def _acceptance(row: object, place: str, today: date) -> Acceptance:
    fields = ", ".join(FIELDS)
    if not isinstance(row, dict):
        raise InputError(f"{place}: {row!r} is no mapping; give it {fields}")
    place = f"{place} ({row.get('id', 'no id')})"
    unknown = [name for name in row if name not in FIELDS]
    if unknown:
        raise InputError(f"{place}: unknown field {unknown[0]!r}; an entry has {fields}")
    missing = [name for name in FIELDS if not isinstance(row.get(name), str) or not row[name].strip()]
    if missing:
        raise InputError(f"{place}: no {missing[0]}; an entry has {fields}")
    return Acceptance(**{**row, "expires": _last_day(row["expires"], place, today)})


def _last_day(text: str, place: str, today: date) -> date:
    latest = today + timedelta(days=ACCEPTED_DAYS_MAX)
    try:
        day = datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise InputError(f"{place}: expires {text!r} is no date; write it as {latest}") from None
    if day > latest:
        raise InputError(f"{place}: expires {day} is more than {ACCEPTED_DAYS_MAX} days ahead; write {latest} at most")
    return day


def described(judgement: Judgement) -> str:
    """A judgement as Markdown: counts, what stops the image, what to renew, and how much has no fix."""
    one = judgement
    counts = (
        f"{len(one.blocking)} stop the image, {len(one.renewable)} to renew, {len(one.unfixable)} without a fix, "
        f"{len(one.accepted)} accepted; {len(one.lesser)} below High."
    )
    blocks = [
        "## Vulnerabilities of the image",
        counts,
        *_section("Stops the image: a rebuild mends it", one.blocking, one.expired),
        *_section("To renew: a rebuild does not mend it", one.renewable, one.expired),
        *_without_fix(one.unfixable),
        "\n".join(f"- {warning}" for warning in one.warnings),
    ]
    return "\n\n".join(block for block in blocks if block)


def trouble(judgement: Judgement) -> str | None:
    """What can be mended now, as the text of an issue; the same for the same findings, on whatever day."""
    mendable = (*judgement.blocking, *judgement.renewable)
    return "\n\n".join(_section("To mend", mendable, judgement.expired)) or None


def _section(heading: str, findings: Sequence[Finding], expired: Sequence[Acceptance]) -> list[str]:
    if not findings:
        return []
    rows = ["| severity | vulnerability | package | installed | fixed in | remedy |", "|---|---|---|---|---|---|"]
    rows += [_row(finding, expired) for finding in findings[:ROWS_MAX]]
    more = len(findings) - ROWS_MAX
    return [f"### {heading}", "\n".join(rows), *([f"And {more} more."] if more > 0 else [])]


def _row(finding: Finding, expired: Sequence[Acceptance]) -> str:
    lapsed = [f"; its acceptance expired on {entry.expires}" for entry in expired if entry.covers(finding)]
    fixes = ", ".join(map(_code, finding.fixes))
    names = " | ".join(map(_code, (finding.id, finding.package, finding.version)))
    return f"| {finding.severity} | {names} | {fixes} | {finding.remedy.value}{''.join(lapsed[:1])} |"


def _without_fix(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    counts = Counter(finding.remedy for finding in findings)
    lines = [f"- {counts[remedy]}: {remedy.value}" for remedy in REMEDIES if counts[remedy]]
    named = ", ".join(f"{_code(one.id)} in {_code(one.package)} ({one.severity})" for one in findings[:WORST_MAX])
    return ["### Without a fix", "\n".join(lines), f"The worst: {named}."]


def _code(text: str) -> str:
    """Text of others as code: no table, mention or link comes of it."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"


def judge_file(report: Path, accepted: Path, today: date) -> Judgement:
    """Judges the report in one file by the list in another."""
    content, entries = read_json(report, SCAN_AGAIN), read_accepted(accepted, today)
    try:
        return judge(content, entries, today)
    except InputError as fault:
        raise InputError(f"{report}: {fault}") from fault


def main(arguments: Sequence[str] | None = None) -> int:
    """0 nothing stops the image, 1 something does, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        judgement = judge_file(options.report, options.accepted, datetime.now(UTC).date())
        _publish(judgement, options.summary)
        if options.tell:
            say(Repository.of_this_run().tell(LABEL, TITLE, trouble(judgement)))
    except InputError as fault:
        say(f"error: {fault}")
        return BAD_INPUT
    return BLOCKED if judgement.blocking else PASSED


def _publish(judgement: Judgement, summary: Path | None) -> None:
    text = described(judgement)
    say(text)
    if summary is not None:
        with summary.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.image.vulnerabilities",
        description="Judges grype's report: exits 1 if the image has severe vulnerabilities that a rebuild mends.",
    )
    parser.add_argument("report", type=Path, metavar="REPORT", help="grype's, as JSON")
    parser.add_argument(
        "--accepted",
        type=Path,
        default=ACCEPTED,
        metavar="FILE",
        help="default: requirements/accepted-vulnerabilities.yaml",
    )
    parser.add_argument("--summary", type=Path, metavar="FILE", help="Markdown to append to, such as a job's summary")
    parser.add_argument("--tell", action="store_true", help="open, renew or close the issue about what can be mended")
    return parser


if __name__ == "__main__":
    sys.exit(main())
