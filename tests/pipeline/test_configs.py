"""Settings reach their field checked, and the stage table, the configurations and the stages' code agree."""

import importlib
import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from model.errors import InputError
from pipeline.configs import CONFIGS, Config, embedded, named_config, with_settings
from pipeline.stage import Stage, check_table
from pipeline.stages import table
from tests.conftest import ROOT
from tests.pipeline.conftest import Run

STAGES = table(embedded())
SCHEMES = "expected one of int4-g32, int4-channel"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("fetch.licence=MIT", "MIT"),
        ("fetch.source=folder:/models/a=b", "folder:/models/a=b"),
        ("fetch.sha256=none", None),
        ("build_cache.neighbours=3", 3),
        ("certify_cache.recall_min=0.25", 0.25),
        ("gate_latency.ttft_ms_max=120.5", 120.5),
        ("gate_latency.ttft_ms_max=none", None),
        ("quantize.scheme=int4-channel", "int4-channel"),
        ("quantize.head_bits=16", 16),
        ("savings.hit_rates=0.2,1", (0.2, 1)),
    ],
)
def test_setting_of_every_kind(setting: str, value: object) -> None:
    config = with_settings(embedded(), [setting])
    stage, _, name = setting.partition("=")[0].partition(".")
    found = getattr(getattr(config, stage), name)
    assert found == value and type(found) is type(value)
    assert replace(config, **{stage: getattr(embedded(), stage)}) == embedded()


def test_later_setting_wins() -> None:
    config = with_settings(embedded(), ["export.context_tokens=100", "export.context_tokens=200"])
    assert config.export.context_tokens == 200


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("build_cache.flat_max=few", "'few': expected a whole number of at least 0"),
        ("build_cache.flat_max=1.5", "'1.5': expected a whole number of at least 0"),
        ("build_cache.flat_max=-1", "-1: expected a whole number of at least 0"),
        ("export.context_tokens=32", "32: expected a whole number from 64 to 131072"),
        ("certify_cache.recall_min=half", "'half': expected a number from 0 to 1"),
        ("certify_cache.recall_min=1.01", "1.01: expected a number from 0 to 1"),
        ("certify_cache.recall_min=nan", "nan: expected a number from 0 to 1"),
        ("gate_latency.ttft_ms_max=-5", "expected a number of at least 0 or none"),
        ("quantize.scheme=int3", f"'int3': {SCHEMES}"),
        ("quantize.head_bits=5", "'5': expected one of 4, 8, 16"),
        ("savings.hit_rates=0.1,lots", "expected a comma-separated list, each a number from 0 to 1"),
        ("savings.hit_rates=0.1,1.1", "expected a comma-separated list, each a number from 0 to 1"),
    ],
)
def test_unfit_value_is_bad_input_and_says_what_fits(run: Run, setting: str, message: str) -> None:
    ended = run("list", "--set", setting)
    assert ended.code == 2
    assert f"error: --set {setting.partition('=')[0]} = " in ended.err
    assert message in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("quantise.scheme=int4-g32", "no stage 'quantise'; the stages are fetch, tune, quantize, export,"),
        ("quantize.schema=int4-g32", "has no field 'schema'; its fields are scheme, embedding_bits, head_bits,"),
        ("report.title=Emerald", "stage report has no field 'title'; its fields are none"),
        ("quantize.scheme", "expected STAGE.FIELD=VALUE, such as quantize.scheme=int4-channel"),
        ("scheme=int4-g32", "expected STAGE.FIELD=VALUE, such as quantize.scheme=int4-channel"),
    ],
)
def test_unknown_target_is_bad_input_and_lists_the_known(run: Run, setting: str, message: str) -> None:
    ended = run("list", "--set", setting)
    assert ended.code == 2
    assert f"error: --set {setting}: " in ended.err
    assert message in ended.err


def test_unknown_configuration_is_bad_input_and_lists_the_known(run: Run) -> None:
    ended = run("list", "--config", "llama4")
    assert ended.code == 2
    assert ended.err == "error: no configuration 'llama4'; choose one of embedded, llama31-8b\n"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_has_a_sound_table(name: str) -> None:
    stages = table(named_config(name))
    check_table(stages)
    assert {stage.name for stage in stages} == {field.name for field in fields(Config)}


@pytest.mark.parametrize("name", CONFIGS)
def test_list_shows_every_stage(run: Run, name: str) -> None:
    ended = run("list", "--config", name)
    assert ended.code == 0
    listed = {line.split()[0] for line in ended.out.splitlines() if line[:1].strip()}
    assert {stage.name for stage in STAGES} <= listed


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stage_code_takes_what_the_table_gives(stage: Stage) -> None:
    run = importlib.import_module(f"pipeline.{stage.name}").run
    config, *_ = inspect.signature(run).parameters
    assert get_type_hints(run)[config] is type(getattr(embedded(), stage.name)) is type(stage.config)
    paths = [*stage.sources, *stage.inputs, *stage.outputs]
    inspect.signature(run).bind(stage.config, *paths)
    assert stage.purpose.endswith(".")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_sources_of_the_embedded_configuration_are_in_the_tree(stage: Stage) -> None:
    for source in stage.sources:
        assert (ROOT / source).exists()


def test_folder_source_is_watched_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [fetch, *_] = table(with_settings(embedded(), ["fetch.source=folder:model"]))
    assert fetch.sources == (tmp_path / "model",)


def test_configuration_checks_itself_without_the_command_line() -> None:
    with pytest.raises(InputError, match=r"CertifyCacheConfig\.recall_min = 2: expected a number from 0 to 1"):
        replace(embedded().certify_cache, recall_min=2)
