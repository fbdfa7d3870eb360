"""What a scan's report means for the image: `grype.json` has one finding of every kind, in grype's own form."""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from model.errors import InputError
from pipeline.image.vulnerabilities import (
    ACCEPTED,
    Acceptance,
    Judgement,
    described,
    judge,
    main,
    read_accepted,
    trouble,
)
from tests.forge import TOKEN, forge_served

HERE = Path(__file__).parent
TODAY = date(2026, 12, 1)
DEBIAN, PYTHON, UNFIXED, LOCKED, LOW = "libssl3", "python", "zlib1g", "urllib3", "tar"
"""The packages of the report: fixed in Debian, the interpreter, not fixed, from the lock, and not severe."""
Report = dict[str, Any]


@pytest.fixture
def report() -> Report:
    return dict(json.loads((HERE / "grype.json").read_text()))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Runs the command on a report, with an empty list of acceptances unless another is given."""

    def command(content: Report | str, *options: str, accepted: str = "[]") -> int:
        (tmp_path / "accepted.yaml").write_text(accepted)
        (tmp_path / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return main([str(tmp_path / "report.json"), "--accepted", str(tmp_path / "accepted.yaml"), *options])

    return command


def of(report: Report, package: str) -> Report:
    """The match of a package."""
    return next(dict(match) for match in report["matches"] if match["artifact"]["name"] == package)


def fixed_in(report: Report, package: str, *versions: str, state: str = "fixed") -> None:
    of(report, package)["vulnerability"]["fix"] = {"versions": list(versions), "state": state}


def judged(report: Report, *accepted: Acceptance) -> Judgement:
    return judge(report, accepted, TODAY)


def groups(judgement: Judgement) -> dict[str, list[str]]:
    """{group: packages} of the groups that are not empty."""
    found = {name: [one["package"] for one in group] for name, group in asdict(judgement).items()}
    return {name: packages for name, packages in found.items() if packages}


def acceptance(identity: str, package: str, expires: date = TODAY) -> Acceptance:
    return Acceptance(id=identity, package=package, reason="never opened", expires=expires)


def test_only_what_a_rebuild_mends_stops_the_image(report: Report) -> None:
    assert groups(judged(report)) == {
        "blocking": [DEBIAN],
        "renewable": [LOCKED],
        "unfixable": [PYTHON, UNFIXED],
        "lesser": [LOW],
    }


@pytest.mark.parametrize(
    ("severity", "stops"), [("Critical", True), ("High", True), ("Medium", False), ("Unknown", False), ("", False)]
)
def test_severity_decides_whether_a_finding_counts(report: Report, severity: str, stops: bool) -> None:
    of(report, DEBIAN)["vulnerability"]["severity"] = severity
    assert bool(judged(report).blocking) is stops
    assert len(judged(report).lesser) == (1 if stops else 2)


@pytest.mark.parametrize("state", ["not-fixed", "wont-fix", "unknown", ""])
def test_debian_without_a_fix_stops_nothing(report: Report, state: str) -> None:
    fixed_in(report, DEBIAN, "3.0.17-1~deb12u3", state=state)
    assert groups(judged(report))["unfixable"] == [DEBIAN, PYTHON, UNFIXED]


@pytest.mark.parametrize("kind", ["binary", "UnknownPackage"])
@pytest.mark.parametrize(
    ("fixes", "group", "remedy"),
    [
        (["3.11.17", "3.13.13"], "renewable", "digest in `Dockerfile`"),
        (["3.13.13", "3.14.4", "3.15.0a8"], "unfixable", "moving to a newer Python"),
        (["3.1.5"], "unfixable", "moving to a newer Python"),
    ],
)
def test_interpreter_is_renewed_within_its_series_only(
    report: Report, kind: str, fixes: list[str], group: str, remedy: str
) -> None:
    fixed_in(report, PYTHON, *fixes)
    of(report, PYTHON)["artifact"]["type"] = kind
    assert PYTHON in groups(judged(report))[group]
    assert remedy in described(judged(report))


@pytest.mark.parametrize(
    ("package", "kind", "remedy"),
    [
        (LOCKED, "python", "`make lock`"),
        (LOCKED, "npm", "install a version that has the fix"),
        ("openssl", "binary", "install a version that has the fix"),
        (DEBIAN, "deb", "build the image again"),
        ("python", "deb", "build the image again"),
    ],
)
def test_every_kind_of_package_has_its_remedy(report: Report, package: str, kind: str, remedy: str) -> None:
    match = of(report, DEBIAN if package == DEBIAN else LOCKED)
    match["artifact"] |= {"name": package, "type": kind}
    assert remedy in described(judged({**report, "matches": [match]}))


def test_of_one_vulnerability_in_one_package_the_most_urgent_counts(report: Report) -> None:
    twice = json.loads(json.dumps(of(report, DEBIAN)))
    twice["vulnerability"]["fix"] = {"versions": [], "state": "wont-fix"}
    other = json.loads(json.dumps(of(report, DEBIAN)))
    other["vulnerability"]["id"] = "CVE-2026-10009"
    other["vulnerability"]["severity"] = "High"
    report["matches"] = [other, twice, of(report, DEBIAN), twice]
    assert [finding.id for finding in judged(report).blocking] == ["CVE-2026-10001", "CVE-2026-10009"]
    assert groups(judged(report)) == {"blocking": [DEBIAN, DEBIAN]}


def test_one_vulnerability_counts_in_every_package(report: Report) -> None:
    other = json.loads(json.dumps(of(report, DEBIAN)))
    other["artifact"]["name"] = "openssl"
    assert groups(judged({**report, "matches": [of(report, DEBIAN), other]})) == {"blocking": [DEBIAN, "openssl"]}


def test_accepted_findings_neither_stop_nor_warn_until_the_last_day(report: Report) -> None:
    entries = [
        acceptance("CVE-2026-10001", DEBIAN),
        acceptance("CVE-2026-10004", LOCKED),  # the scan calls it by its GHSA name
        acceptance("CVE-2026-10002", PYTHON, TODAY + timedelta(days=1)),
    ]
    one = judged(report, *entries)
    assert groups(one) == {"accepted": [DEBIAN, PYTHON, LOCKED], "unfixable": [UNFIXED], "lesser": [LOW]}
    assert (one.warnings, trouble(one)) == ([], None)
    assert "3 accepted" in described(one)


def test_an_acceptance_is_of_one_package(report: Report) -> None:
    one = judged(report, acceptance("CVE-2026-10001", "openssl"))
    assert groups(one)["blocking"] == [DEBIAN]
    assert one.warnings == ["`CVE-2026-10001` in `openssl`: accepted and no longer found; remove the entry"]


def test_an_expired_acceptance_is_named_and_its_finding_counts_again(report: Report) -> None:
    one = judged(report, acceptance("CVE-2026-10001", DEBIAN, date(2026, 11, 30)))
    assert groups(one)["blocking"] == [DEBIAN]
    assert one.warnings == ["`CVE-2026-10001` in `libssl3`: its acceptance expired on 2026-11-30; decide again"]
    for text in (described(one), trouble(one)):
        assert "has published; its acceptance expired on 2026-11-30 |" in str(text)


def test_an_acceptance_of_what_is_gone_is_named_expired_or_not(report: Report) -> None:
    for last in (TODAY, date(2020, 1, 1)):
        one = judged(report, acceptance("CVE-2020-1", "gone", last))
        assert one.warnings == ["`CVE-2020-1` in `gone`: accepted and no longer found; remove the entry"]
        assert one.warnings[0] in described(one)


def test_summary_counts_first_and_names_the_worst_without_a_fix(report: Report) -> None:
    text = described(judged(report))
    parts = [
        "1 stop the image, 1 to renew, 2 without a fix",
        "`libssl3`",
        "`urllib3`",
        "- 1: no fix yet",
        "The worst: ",
    ]
    assert sorted(parts, key=text.index) == parts
    assert "The worst: `CVE-2026-10002` in `python` (High), `CVE-2023-10003` in `zlib1g` (High)." in text
    of(report, UNFIXED)["vulnerability"]["severity"] = "Critical"
    assert "The worst: `CVE-2023-10003` in `zlib1g` (Critical)" in described(judged(report))


def test_issue_names_what_can_be_mended_in_one_order(report: Report) -> None:
    text = str(trouble(judged(report)))
    assert "`libssl3`" in text
    assert "`urllib3`" in text
    assert "`python`" not in text
    assert "`zlib1g`" not in text
    assert text == trouble(judged({**report, "matches": report["matches"][::-1]}))
    assert trouble(judged({**report, "matches": [of(report, PYTHON), of(report, UNFIXED), of(report, LOW)]})) is None


def test_many_findings_fit_into_an_issue(report: Report) -> None:
    many = [json.loads(json.dumps(of(report, DEBIAN))) for _ in range(1000)]
    for number, match in enumerate(many):
        match["vulnerability"]["id"] = f"CVE-2026-{number:05}"
    text = str(trouble(judged({**report, "matches": many})))
    assert len(text) < 65_536
    assert "And 900 more." in text


def test_words_of_others_stay_words(report: Report) -> None:
    of(report, DEBIAN)["artifact"]["name"] = "a|b`\n| c @you"
    assert "| `a\\|b' \\| c @you` |" in described(judged(report))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda report: report.pop("matches"), "'matches' is a required property"),
        (lambda report: report.update(matches=None), "None is not of type 'array'"),
        (lambda report: report["descriptor"].update(name="trivy"), "'grype' was expected"),
        (lambda report: report["matches"][0].pop("artifact"), "'artifact' is a required property"),
        (lambda report: report["matches"][1]["vulnerability"].update(severity="Bad"), "'Bad' is not one of"),
        (lambda report: report["matches"][1]["vulnerability"]["fix"].update(state="soon"), "'soon' is not one of"),
        (lambda report: report["distro"].update(name=""), "did not recognise the distribution"),
    ],
)
def test_a_foreign_report_is_refused(report: Report, change: Callable[[Report], object], says: str) -> None:
    change(report)
    with pytest.raises(InputError, match=says):
        judged(report)


def test_grype_leaves_out_what_it_does_not_know(report: Report) -> None:
    del of(report, UNFIXED)["vulnerability"]["severity"]
    of(report, UNFIXED)["vulnerability"]["fix"] = {"versions": None, "state": ""}
    assert groups(judged(report))["lesser"] == [LOW, UNFIXED]


ENTRY = "- {id: CVE-1, package: tar, reason: never opened, expires: 2026-12-31}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id: CVE-1", "no list; begin every entry with `- id:`"),
        ("", "no list"),
        ("- {id: [", "broken YAML"),
        ("- CVE-1", "entry 1: 'CVE-1' is no mapping; give it id, package, reason, expires"),
        (ENTRY.replace("reason: never opened, ", ""), r"entry 1 \(CVE-1\): no reason"),
        (ENTRY.replace("never opened", "' '"), r"entry 1 \(CVE-1\): no reason"),
        (ENTRY.replace("id: CVE-1", "name: CVE-1"), r"entry 1 \(no id\): unknown field 'name'"),
        (ENTRY.replace("2026-12-31", "31.12.2026"), "'31.12.2026' is no date; write it as 2027-05-30"),
        (ENTRY.replace("2026-12-31", "2027-05-31"), "more than 180 days ahead; write 2027-05-30 at most"),
        (ENTRY + ENTRY, "entry 2: CVE-1 in tar stands twice; keep one"),
        (ENTRY.replace("reason", "id"), "gives a field twice"),
    ],
)
def test_a_malformed_list_is_refused_by_file_and_entry(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "accepted.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"{file}: .*{says}"):
        read_accepted(file, TODAY)


def test_a_list_may_be_empty_but_not_missing(tmp_path: Path) -> None:
    (tmp_path / "accepted.yaml").write_text(ENTRY.replace("2026-12-31", "2027-05-30") + ENTRY.replace("tar", "zlib1g"))
    assert [entry.package for entry in read_accepted(tmp_path / "accepted.yaml", TODAY)] == ["tar", "zlib1g"]
    (tmp_path / "accepted.yaml").write_text("# none\n[]\n")
    assert read_accepted(tmp_path / "accepted.yaml", TODAY) == []
    with pytest.raises(InputError, match=r"gone\.yaml: missing; an empty list is `\[\]`"):
        read_accepted(tmp_path / "gone.yaml", TODAY)


def test_the_project_s_own_list_can_be_read() -> None:
    read_accepted(ACCEPTED, datetime.now(UTC).date())


def test_command_exits_by_what_stops_the_image(
    report: Report, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    assert run(report, "--summary", str(summary)) == 1
    assert summary.read_text().startswith("before\n## Vulnerabilities of the image\n\n1 stop the image")
    assert "`libssl3`" in capsys.readouterr().err
    assert run(report, accepted=f"- {{id: CVE-2026-10001, package: libssl3, reason: r, expires: {last_day()}}}") == 0
    assert run(json.loads((HERE / "grype-unfixable.json").read_text())) == 0


def last_day() -> date:
    """Of an acceptance that is valid whenever this runs."""
    return datetime.now(UTC).date() + timedelta(days=30)


@pytest.mark.parametrize(
    ("content", "says"), [('{"matches": [', "not valid JSON"), ("[]", "JSON list"), ("{}", "no report of grype's")]
)
def test_bad_input_is_named_with_its_remedy(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    assert run(content) == 2
    said = capsys.readouterr().err
    assert "report.json: " in said
    assert says in said
    assert "scan again with grype" in said


def test_a_malformed_list_is_bad_input(
    report: Report, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(report, accepted="- 1") == 2
    assert "accepted.yaml: entry 1" in capsys.readouterr().err


def test_the_issue_lives_as_long_as_something_can_be_mended(
    report: Report, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with forge_served() as forge:
        for name, value in (("API_URL", forge.url), ("REPOSITORY", "oz/emerald"), ("TOKEN", TOKEN)):
            monkeypatch.setenv(f"GITHUB_{name}", value)
        assert run(report) == 1
        assert forge.issues == []
        assert run(report, "--tell") == 1
        assert run({**report, "matches": report["matches"][::-1]}, "--tell") == 1
        assert [(issue["labels"], issue["state"]) for issue in forge.issues] == [(["vulnerabilities"], "open")]
        assert forge.comments == []
        assert run(json.loads((HERE / "grype-unfixable.json").read_text()), "--tell") == 0
        assert [issue["state"] for issue in forge.issues] == ["closed"]


def test_without_a_token_the_issue_is_bad_input(
    report: Report, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    assert run(report, "--tell") == 2


def test_the_unfixable_report_is_a_part_of_the_other(report: Report) -> None:
    unfixable = json.loads((HERE / "grype-unfixable.json").read_text())
    assert unfixable == {**report, "matches": [of(report, package) for package in (PYTHON, UNFIXED, LOW)]}
