"""Whom AWS trusts: this repository's main branch, in both forms of its subject, and nobody else."""

import json

import pytest

from pipeline.workflow.oidc import main
from tests.forge import OURS, OWNER, forge_served

AUDIENCE, SUBJECT = (f"token.actions.githubusercontent.com:{name}" for name in ("aud", "sub"))


def test_the_policy_accepts_both_forms_of_the_subject(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with forge_served() as forge:
        monkeypatch.setenv("GITHUB_API_URL", forge.url)
        monkeypatch.setenv("GITHUB_TOKEN", "token-of-the-run")
        assert main(["oz/emerald", "--account", "123456789012"]) == 0
    (statement,) = json.loads(capsys.readouterr().out)["Statement"]
    assert statement["Principal"]["Federated"].startswith("arn:aws:iam::123456789012:oidc-provider/")
    assert statement["Condition"] == {
        "StringEquals": {
            AUDIENCE: "sts.amazonaws.com",
            SUBJECT: [
                "repo:oz/emerald:ref:refs/heads/main",
                f"repo:oz@{OWNER}/emerald@{OURS}:ref:refs/heads/main",
            ],
        }
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["emerald", "--account", "123456789012"], "'emerald' is no repository: give OWNER/NAME"),
        (["https://github.com/oz/emerald", "--account", "123456789012"], "give OWNER/NAME"),
        (["oz/emerald", "--account", "1234-5678-9012"], "an AWS account has 12 digits"),
    ],
)
def test_what_is_wrong_is_named(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with forge_served() as forge:
        monkeypatch.setenv("GITHUB_API_URL", forge.url)
        monkeypatch.setenv("GITHUB_TOKEN", "token-of-the-run")
        assert main(arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_private_repository_takes_a_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with forge_served() as forge:
        monkeypatch.setenv("GITHUB_API_URL", forge.url)
        monkeypatch.delenv("GITHUB_TOKEN", raising=False)
        assert main(["oz/emerald", "--account", "123456789012"]) == 2
    assert "GITHUB_TOKEN, if the repository is private" in " ".join(capsys.readouterr().err.split())
