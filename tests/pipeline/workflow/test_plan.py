"""What a run of the pipeline workflow does, by what GitHub tells its first job."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from model.errors import InputError
from pipeline.configs import named_config, with_settings
from pipeline.workflow.plan import VARIABLES, Asked, main, planned, summary

ACCOUNT = {"DOCKERHUB_USERNAME": "Dorothy"}


def asked(
    event: str = "push",
    inputs: Mapping[str, Any] | None = None,
    variables: Mapping[str, str] | None = None,
    *,
    dockerhub_token: bool = True,
    hf_token: bool = False,
    private: bool = False,
) -> Asked:
    return Asked(
        event=event,
        inputs=inputs or {},
        variables=ACCOUNT if variables is None else variables,
        dockerhub_token=dockerhub_token,
        hf_token=hf_token,
        private=private,
    )


def test_a_fresh_fork_builds_the_embedded_model_and_pushes_nothing() -> None:
    fork = asked(variables={}, dockerhub_token=False)
    plan = planned(fork)
    assert (plan.config, plan.push, plan.repository, plan.tag) == ("embedded", False, "", "latest")
    told = summary(fork, plan)
    assert "pushes nothing" in told
    for name in ("DOCKERHUB_TOKEN", "DOCKERHUB_USERNAME", "HF_TOKEN", "EMERALD_CONFIG", "AWS_ROLE"):
        assert f"| not set | {'secret' if 'TOKEN' in name else 'variable'} `{name}`" in told


def test_a_push_goes_to_the_users_own_repository() -> None:
    plan = planned(asked())
    assert (plan.push, plan.repository) == (True, "docker.io/dorothy/emerald")
    assert "pushes it to `docker.io/dorothy/emerald` and promotes it to `latest`" in summary(asked(), plan)


def test_a_registry_of_ones_own() -> None:
    plan = planned(asked(variables={**ACCOUNT, "EMERALD_IMAGE": "127.0.0.1:5000/oz/emerald"}))
    assert plan.repository == "127.0.0.1:5000/oz/emerald"


def test_a_name_without_a_registry_is_docker_hubs() -> None:
    assert planned(asked(variables={**ACCOUNT, "EMERALD_IMAGE": "oz/city"})).repository == "docker.io/oz/city"


@pytest.mark.parametrize("name", ["emerald", "docker.io/Oz/emerald", "docker.io/oz/emerald:latest", "oz/emerald; rm"])
def test_a_name_that_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="EMERALD_IMAGE"):
        planned(asked(variables={**ACCOUNT, "EMERALD_IMAGE": name}))


@pytest.mark.parametrize(("token", "account"), [(False, ACCOUNT), (True, {})])
def test_half_of_the_credentials_push_nothing(token: bool, account: Mapping[str, str]) -> None:
    assert not planned(asked(dockerhub_token=token, variables=account)).push


def test_a_dispatch_may_leave_the_image_where_it_was_built() -> None:
    assert not planned(asked("workflow_dispatch", {"push": False})).push
    assert planned(asked("workflow_dispatch", {"push": True, "tag": "v1.2"})).tag == "v1.2"


def test_programs_are_for_every_arm_server_unless_the_repository_says_otherwise() -> None:
    assert planned(asked()).settings == "export.cpu=aarch64; export_embedder.cpu=aarch64"
    assert (
        planned(asked(variables={"EMERALD_CPU": "native"})).settings == "export.cpu=native; export_embedder.cpu=native"
    )


def test_inputs_become_settings_of_the_configuration() -> None:
    inputs = {
        "config": "llama31-8b",
        "model": "meta-llama/Llama-3.2-3B-Instruct@0cb88a4f764b7a12671c53f0838cd831a0843b95",
        "scheme": "int4-channel",
        "settings": "fetch.licence=llama3.2; gate_quality.kl_mean_max=0.15; gate_latency.repetitions=9",
    }
    plan = planned(asked("workflow_dispatch", inputs, hf_token=True))
    config = with_settings(named_config(plan.config), [plan.settings])
    assert config.fetch.source == f"hub:{inputs['model']}"
    assert config.fetch.model_id == "meta-llama/Llama-3.2-3B-Instruct"
    assert config.quantize.scheme == "int4-channel"
    assert (config.gate_quality.kl_mean_max, config.gate_latency.repetitions) == (0.15, 9)


def test_a_dispatch_takes_the_repositorys_configuration_unless_it_names_one() -> None:
    variables = {"EMERALD_CONFIG": "llama31-8b"}
    for wish, config in (("as configured", "llama31-8b"), ("embedded", "embedded")):
        assert planned(asked("workflow_dispatch", {"config": wish}, variables, hf_token=True)).config == config


def test_settings_of_the_repository_come_before_those_of_a_dispatch() -> None:
    variables = {"EMERALD_CONFIG": "embedded", "EMERALD_SETTINGS": "certify_cache.risk=0.01"}
    inputs = {"scheme": "as configured", "settings": "certify_cache.risk=0.03"}
    plan = planned(asked("workflow_dispatch", inputs, variables))
    assert with_settings(named_config("embedded"), [plan.settings]).certify_cache.risk == 0.03


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        ({"config": "llama31-8b"}, "HF_TOKEN"),
        ({"config": "gpt"}, "gpt"),
        ({"model": "oz/storyteller"}, "fetch.licence"),
        ({"settings": "quantize.bits=3"}, "bits"),
        ({"settings": "certify_cache.risk=2"}, "risk"),
        ({"tag": "not a tag"}, "not a tag"),
    ],
)
def test_what_cannot_be_done_ends_the_run_at_once(inputs: Mapping[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        planned(asked("workflow_dispatch", inputs))


def environment(monkeypatch: pytest.MonkeyPatch, folder: Path, **changed: str) -> None:
    given = {
        "GITHUB_EVENT_NAME": "push",
        "INPUTS": "null",
        **ACCOUNT,
        "HAS_DOCKERHUB_TOKEN": "true",
        "HAS_HF_TOKEN": "false",
        "PRIVATE": "false",
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "summary"),
    }
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**given, **changed}.items():
        monkeypatch.setenv(name, value)


def test_outputs_and_summary_as_github_reads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, tmp_path)
    assert main() == 0
    outputs = dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
    assert outputs == {
        "config": "embedded",
        "settings": "export.cpu=aarch64; export_embedder.cpu=aarch64",
        "push": "true",
        "repository": "docker.io/dorothy/emerald",
        "registry": "docker.io",
        "tag": "latest",
        "attest": "true",
        "sign": "true",
        "retention_days": "90",
    }
    assert (tmp_path / "summary").read_text().startswith("## Plan")


def test_a_refusal_is_an_annotation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(monkeypatch, tmp_path, EMERALD_CONFIG="gpt")
    assert main() == 2
    assert capsys.readouterr().out.startswith("::error::no configuration 'gpt'")
    assert not (tmp_path / "output").exists()


def test_a_private_repository_attests_and_signs_only_when_told() -> None:
    """Attestations take a paid plan there, and a signature without a key stands in a public log."""
    plain = asked(private=True)
    plan = planned(plain)
    assert (plan.attest, plan.sign, plan.retention_days) == (False, False, 7)
    assert "Nothing is attested" in summary(plain, plan) and "Sigstore's public log" in summary(plain, plan)
    told = asked(private=True, variables={**ACCOUNT, "EMERALD_ATTEST": "true", "EMERALD_SIGN": "true"})
    assert (planned(told).attest, planned(told).sign) == (True, True)
    assert "attested" not in summary(told, planned(told))
    public = planned(asked())
    assert (public.attest, public.sign, public.retention_days) == (True, True, 90)


def test_a_private_repository_without_storage_is_refused_before_hours_of_work() -> None:
    large = {**ACCOUNT, "EMERALD_CONFIG": "llama31-8b"}
    with pytest.raises(
        InputError, match=r"keeps 4.9 GB of artifacts, and a private repository has 0.5 GB.*ARTIFACT_GB"
    ):
        planned(asked(private=True, variables=large, hf_token=True))
    paid = {**large, "EMERALD_ARTIFACT_GB": "50"}
    assert planned(asked(private=True, variables=paid, hf_token=True)).config == "llama31-8b"
    assert planned(asked(variables=large, hf_token=True)).config == "llama31-8b"
    assert planned(asked(private=True)).config == "embedded"


@pytest.mark.parametrize(
    ("name", "value"), [("EMERALD_ATTEST", "yes"), ("EMERALD_SIGN", "True"), ("EMERALD_ARTIFACT_GB", "50 GB")]
)
def test_a_variable_of_another_form_is_named(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"variable {name} = '{value}'"):
        planned(asked(private=True, variables={**ACCOUNT, name: value}))


@pytest.mark.parametrize(
    ("variables", "repository"),
    [
        ({"EMERALD_IMAGE": "ghcr.io/oz/emerald"}, "ghcr.io/oz/emerald"),
        ({"DOCKERHUB_USERNAME": "Dorothy"}, "docker.io/dorothy/emerald"),
        ({"DOCKERHUB_USERNAME": "Dorothy", "EMERALD_IMAGE": "oz/city"}, "docker.io/oz/city"),
    ],
)
def test_where_images_are_takes_no_account(
    variables: dict[str, str], repository: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Monitor, scan and return need no more than the name."""
    for name in (*VARIABLES, "GITHUB_EVENT_NAME", "INPUTS", "PRIVATE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "GITHUB_OUTPUT": str(tmp_path / "output")}.items():
        monkeypatch.setenv(name, value)
    assert main(["--published"]) == 0
    outputs = dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
    assert outputs == {"repository": repository, "registry": repository.partition("/")[0], "tag": "latest"}


def test_where_no_image_is_known_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert main(["--published"]) == 2
    assert "set the variable DOCKERHUB_USERNAME, or EMERALD_IMAGE" in capsys.readouterr().out
