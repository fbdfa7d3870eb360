"""Every gate passes what is sound and fails, naming the check, on a fault planted in what it judges."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import rel_entr, softmax

from model.artifact import MANIFEST, write_manifest
from model.errors import InputError
from model.tokenizer import Tokenizer
from pipeline import gate_quality, report
from pipeline.configs import GateQualityConfig, ReportConfig
from pipeline.gate_quality import compare_logits
from pipeline.stages import CALIBRATION_TEXT
from pipeline.verdict import Check
from pipeline.windows import DOCUMENT_BREAK, Text, check_apart, text_windows
from tests.conftest import ROOT
from tests.pipeline.conftest import Ended, Run, cli, from_folder

DATA = ROOT / "cache_data"
SCHEMAS = DATA / "schema"
APART = ROOT / CALIBRATION_TEXT
Report = dict[str, Any]


def failed(checks: Sequence[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def read(path: Path) -> Report:
    content: Report = json.loads(path.read_text(encoding="utf-8"))
    return content


def reseal(folder: Path) -> None:
    """Makes a tampered folder's manifest true again, so that only a gate can notice."""
    manifest = read(folder / MANIFEST)
    kind = manifest.pop("kind")
    write_manifest(folder, kind, {name: manifest[name] for name in manifest if name not in ("format", "files")})


@pytest.mark.parametrize(
    ("value", "limit", "bound", "passes"),
    [
        (0.5, 0.5, "at most", True),
        (0.5, 0.5, "at least", True),
        (0.6, 0.5, "at most", False),
        (0.4, 0.5, "at least", False),
        (float("nan"), 0.5, "at most", False),
        (float("nan"), 0.5, "at least", False),
    ],
)
def test_check_holds_up_to_its_limit_and_never_without_a_number(
    value: float, limit: float, bound: Any, passes: bool
) -> None:
    assert Check(name="share", value=value, limit=limit, bound=bound).passed == passes


# Quality: int4 against bf16


@pytest.fixture(scope="session")
def tiny_build(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with the tiny model fetched and quantized; copy it before changing it."""
    build = tmp_path_factory.mktemp("tiny_build")
    ended = cli("run", "quantize", "--build", build, *from_folder(tiny_model))
    assert ended.code == 0, ended.err
    return build


UNTIL_QUALITY = {"fetch": "unchanged", "tune": "unchanged", "quantize": "unchanged", "gate_quality": "ran"}
QUALITY = GateQualityConfig(
    text="own",
    window_tokens=32,
    windows_max=8,
    confidence=0.95,
    kl_mean_max=0.01,
    same_top1_min=0.5,
    perplexity_ratio_max=1.05,
)
"""What the tiny random model keeps: its mean KL divergence is about a third of this limit."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Twelve windows of text, at a token a byte."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The road was paved with {count} yellow bricks. " for count in range(10)))
    return path


def test_quality_gate_passes_what_the_quantizer_made(tiny_build: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality.json"
    checks = gate_quality.run(QUALITY, text, APART, tiny_build / "checkpoint", tiny_build / "int4", out)
    assert failed(checks) == []
    written = read(out)
    assert written["gate"] == "quality" and written["passed"] is True
    assert (written["windows"], written["tokens"]) == (8, 8 * 31)
    assert 0 < written["kl_mean_nats"]["value"] < written["kl_mean_nats"]["upper"] == round(checks[0].value, 6)


@pytest.mark.parametrize("tensor", ["model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_quality_gate_notices_a_zeroed_tensor(tiny_build: Path, text: Path, tmp_path: Path, tensor: str) -> None:
    int4 = shutil.copytree(tiny_build / "int4", tmp_path / "int4")
    [shard] = int4.glob("*.safetensors")
    tensors = load_file(shard)
    tensors[f"{tensor}.values"].fill_(0x88)  # two nibbles of value + 8
    save_file(tensors, shard)
    reseal(int4)
    checks = gate_quality.run(QUALITY, text, APART, tiny_build / "checkpoint", int4, tmp_path / "quality.json")
    assert "mean KL divergence, upper limit" in failed(checks)
    assert read(tmp_path / "quality.json")["passed"] is False


def test_quality_gate_refuses_a_folder_that_was_tampered_with(tiny_build: Path, text: Path, tmp_path: Path) -> None:
    int4 = shutil.copytree(tiny_build / "int4", tmp_path / "int4")
    [shard] = int4.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=f"{shard}: SHA-256 .* found"):
        gate_quality.run(QUALITY, text, APART, tiny_build / "checkpoint", int4, tmp_path / "quality.json")


def test_quality_gate_refuses_too_little_text(tiny_build: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x" * 63)
    with pytest.raises(InputError, match="1 windows of 32 tokens; give more text or less per window"):
        gate_quality.run(
            QUALITY,
            tmp_path / "text.txt",
            APART,
            tiny_build / "checkpoint",
            tiny_build / "int4",
            tmp_path / "quality.json",
        )


def test_quality_gate_refuses_text_that_models_are_calibrated_with(
    tiny_build: Path, text: Path, tmp_path: Path
) -> None:
    """A passage of eight words, however it is broken into lines."""
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("Once the road was\npaved with 3 yellow bricks. And then?")
    with pytest.raises(InputError, match=r"share 'the road was paved with 3 yellow bricks\.': take it out of one"):
        gate_quality.run(QUALITY, text, calibration, tiny_build / "checkpoint", tiny_build / "int4", tmp_path / "out")
    calibration.write_text("Once the road was\npaved with 3 yellow stones. And then?")
    check_apart(Text.read(calibration), Text.read(text))


def quality_run(run: Run, model: Path, build: Path, **limits: float) -> Ended:
    settings = {"window_tokens": 32, "windows_max": 4, "same_top1_min": 0.3, **limits}
    chosen = [word for name, value in settings.items() for word in ("--set", f"gate_quality.{name}={value}")]
    return run("run", "gate_quality", "--build", build, *from_folder(model), *chosen)


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        ({"kl_mean_max": 0}, "mean KL divergence, upper limit"),
        ({"same_top1_min": 1}, "same top-1, lower limit"),
        ({"perplexity_ratio_max": 0.5}, "perplexity ratio, upper limit"),
    ],
)
def test_failed_quality_gate_exits_1_and_names_its_check(
    run: Run, tiny_model: Path, tiny_build: Path, tmp_path: Path, limit: dict[str, float], name: str
) -> None:
    build = shutil.copytree(tiny_build, tmp_path / "build")
    ended = quality_run(run, tiny_model, build, **limit)
    assert ended.code == 1
    assert ended.states["gate_quality"] == "failed"
    assert f"gate gate_quality failed: {name}" in ended.err
    assert f"see {build / 'reports/quality.json'}" in ended.err
    written = read(build / "reports/quality.json")
    assert [check["name"] for check in written["checks"] if not check["passed"]] == [name]


def test_passed_quality_gate_exits_0(run: Run, tiny_model: Path, tiny_build: Path, tmp_path: Path) -> None:
    build = shutil.copytree(tiny_build, tmp_path / "build")
    ended = quality_run(run, tiny_model, build)
    assert (ended.code, ended.states) == (0, UNTIL_QUALITY)


def test_compared_logits_are_scipys() -> None:
    random = np.random.default_rng(5)
    reference, quantized = random.normal(0, 3, (2, 9, 50)).astype(np.float32)
    tokens = random.integers(0, 50, 9)
    found = compare_logits(torch.tensor(reference), torch.tensor(quantized), torch.tensor(tokens)).numpy()
    p, q = (softmax(logits[:-1].astype(np.float64), axis=1) for logits in (reference, quantized))
    rows, following = np.arange(8), tokens[1:]
    expected = np.stack(
        [
            rel_entr(p, q).sum(axis=1),
            p.argmax(axis=1) == q.argmax(axis=1),
            -np.log(p[rows, following]),
            -np.log(q[rows, following]),
        ],
        axis=1,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert set(found[:, 1]) == {0.0, 1.0} or set(found[:, 1]) == {0.0}


def test_equal_logits_do_not_diverge() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    found = compare_logits(logits, logits.clone(), torch.arange(6))
    assert torch.equal(found[:, 0], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(found[:, 1], torch.ones(5, dtype=torch.float64))
    assert torch.equal(found[:, 2], found[:, 3])


def test_windows_are_full_and_stay_within_one_document(tiny_build: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_build / "int4")
    text = tmp_path / "text.txt"
    text.write_text(f"aaaaaaaa\n{DOCUMENT_BREAK}\nbbbbbbb\n{DOCUMENT_BREAK}\ncccc")
    windows = text_windows(Text.read(text), tokenizer, 4)
    assert [tokenizer.decode(window.tolist()) for window in windows] == ["aaaa", "aaaa", "bbbb", "cccc"]


# The report


LATENCY: Report = {
    "gate": "latency",
    "passed": True,
    "checks": [
        {"name": "decode speedup, lower limit", "value": 2.125, "limit": 1.5, "bound": "at least", "passed": True},
        {"name": "TTFT ratio, upper limit", "value": 3.25, "limit": 4.0, "bound": "at most", "passed": True},
    ],
    "threads": 2,
    "prompt_tokens": 128,
    "ttft_s": {"value": 0.5, "lower": 0.4, "upper": 0.6},
    "decode_tokens_per_s": 41.5,
    "unquantized": {"decode_tokens_per_s": 19.25},
    "decode_speedup": {"value": 2.25, "lower": 2.125, "upper": 2.5},
    "ceiling": {
        "read_bandwidth_gb_s": 20.5,
        "bytes_per_token": 90_000_000,
        "decode_tokens_per_s": 227.8,
        "reached": 0.18,
    },
}
CERTIFIED: Report = {
    "gate": "cache",
    "passed": True,
    "checks": [{"name": "recall", "value": 0.7812, "limit": 0.65, "bound": "at least", "passed": True}],
    "certified": True,
    "reason": None,
    "chosen": {
        "hits": 500,
        "false": 3,
        "upper": 0.0154,
        "recall": {"n": 600, "value": 0.7812, "lower": 0.7511},
        "out_of_domain_rejected": {"n": 500, "value": 1.0, "lower": 0.994},
        "strata": {"near_misses/negation": {"n": 40, "hits": 1, "false": 1, "false_upper": 0.11}},
    },
}
SAVINGS: Report = {
    "search_cpu_s": 0.004,
    "reply_cpu_s": 7.5,
    "reply_tokens_assumed": 150,
    "break_even_hit_rate": 0.000533,
    "by_hit_rate": [{"hit_rate": 0.3, "saved_share": 0.295}],
}


@pytest.mark.parametrize("latency_passed", [True, False])
def test_summary_shows_every_check_and_the_verdict(
    tiny_build: Path, text: Path, tmp_path: Path, latency_passed: bool
) -> None:
    quality = tmp_path / "quality.json"
    gate_quality.run(QUALITY, text, APART, tiny_build / "checkpoint", tiny_build / "int4", quality)
    checks = [LATENCY["checks"][0], {**LATENCY["checks"][1], "passed": latency_passed}]
    summary = _summary(
        tiny_build, quality, tmp_path, CERTIFIED, {**LATENCY, "passed": latency_passed, "checks": checks}
    )
    verdict = "all gates passed" if latency_passed else "a gate failed"
    assert summary.startswith(f"# Emerald: {verdict}\n")
    for file in (tmp_path / "cache.json", quality, tmp_path / "latency.json"):
        judged = read(file)
        for check in judged["checks"]:
            mark = "✅" if check["passed"] else "❌"
            measured = f"{check['value']:.4g} | {check['bound']} {check['limit']:.4g}"
            assert f"| {mark} | {judged['gate']} | {check['name']} | {measured} |" in summary
    for words in ("**3 ready answers** in 24 phrasings", "41.5 tokens/s on 2 threads", "| 30% | 29.5% |"):
        assert words in summary
    assert "**Certified: of the answers given by likeness at most 1.54% are wrong** (3 of 500 were" in summary


def test_summary_says_why_a_cache_is_not_certified(tiny_build: Path, text: Path, tmp_path: Path) -> None:
    quality = tmp_path / "quality.json"
    gate_quality.run(QUALITY, text, APART, tiny_build / "checkpoint", tiny_build / "int4", quality)
    uncertified = {**CERTIFIED, "certified": False, "reason": "guard 'negation' objected to no near miss"}
    summary = _summary(tiny_build, quality, tmp_path, uncertified, LATENCY)
    assert "**Not certified**, so only exact matches are answered: guard 'negation' objected" in summary


REPLIES = {
    "gate": "replies",
    "passed": True,
    "checks": [{"name": "loops, upper limit", "value": 0.01, "limit": 0.05, "bound": "at most", "passed": True}],
    "replies": 240,
    "tokens": 19000,
    "distinct_2": 0.9,
    "distinct_3": 0.98,
    "perplexity": 18.5,
    "measures": {
        "all": {"loops": {"of": 240, "share": 0.0042, "lower": 0.0, "upper": 0.02}},
        "float, some first replies": {"loops": {"of": 0, "share": 0.0, "lower": 0.0, "upper": 1.0}},
    },
    "worst": [{"move": "I look up", "reply": "You look\nup.", "turn": 1, "seed": 7, "faults": ["ends in a choice"]}],
}
TUNING = {
    "gate": "tuning",
    "passed": True,
    "checks": [],
    "tuned": True,
    "dialogues": 400,
    "replies": 1400,
    "held_out": 20,
    "curve": [{"step": 0, "held_out": 4.0}, {"step": 28, "held_out": 3.0}],
    "best_step": 28,
    "perplexity_before": 54.6,
    "perplexity_after": 20.1,
}


def test_summary_tells_of_replies_word_for_word(tiny_build: Path, text: Path, tmp_path: Path) -> None:
    quality = tmp_path / "quality.json"
    gate_quality.run(QUALITY, text, APART, tiny_build / "checkpoint", tiny_build / "int4", quality)
    summary = _summary(tiny_build, quality, tmp_path, CERTIFIED, LATENCY)
    for words in (
        "perplexity 18.5.",
        "| loops | 0.4% | n/a |",
        "**I look up** (turn 1, seed 7: ends in a choice)\n\n> You look up.",
        "went from 54.6 to 20.1, best after 28 steps",
        "line [4.00, 3.00]",
    ):
        assert words in summary


def _summary(tiny_build: Path, quality: Path, folder: Path, cache: Report, latency: Report) -> str:
    contents = {"cache": cache, "latency": latency, "savings": SAVINGS, "tuning": TUNING, "replies": REPLIES}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "built").mkdir()
    write_manifest(folder / "built", "cache", {"entries": 3, "phrasings": 24})
    engine, quantization = folder / "engine", tiny_build / "reports/quantization.json"
    shutil.copytree(tiny_build / "int4", engine)
    facts = read(engine / "manifest.json")
    write_manifest(
        engine, "engine", {name: facts[name] for name in ("model_id", "licence", "recipe", "bits_per_weight")}
    )
    first, rest = ("tuning", "cache"), ("replies", "latency", "savings")
    tuning, told = (folder / f"{name}.json" for name in first)
    replies, measured, saved = (folder / f"{name}.json" for name in rest)
    report.run(
        ReportConfig(),
        engine,
        tuning,
        quantization,
        folder / "built",
        told,
        quality,
        replies,
        measured,
        saved,
        folder / "summary.md",
    )
    return (folder / "summary.md").read_text(encoding="utf-8")
