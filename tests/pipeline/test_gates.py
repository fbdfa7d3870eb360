"""Every gate passes what is sound and fails, naming the check, on a fault planted in what it judges."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy.special import rel_entr, softmax

from model.artifact import MANIFEST, write_manifest
from model.errors import InputError
from model.tokenizer import Tokenizer
from pipeline import build_cache, gate_cache, gate_quality, report
from pipeline.configs import GateCacheConfig, GateQualityConfig, ReportConfig, embedded
from pipeline.gate_quality import compare_logits
from pipeline.verdict import Check
from pipeline.windows import CALIBRATION_TEXT, DOCUMENT_BREAK, Text, check_apart, text_windows
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
    assert (ended.code, ended.states) == (0, {"fetch": "unchanged", "quantize": "unchanged", "gate_quality": "ran"})


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


# The cache: our own data, then small data with faults planted


@pytest.fixture(scope="session")
def cache_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The real embedder and our own cache, built and judged once; slow."""
    build = tmp_path_factory.mktemp("cache_build")
    return build, cli("run", "gate_cache", "--build", build)


@pytest.fixture(scope="session")
def embedder(cache_build: tuple[Path, Ended]) -> Path:
    return cache_build[0] / "embedder"


def test_cache_gate_passes_our_own_data(cache_build: tuple[Path, Ended]) -> None:
    build, ended = cache_build
    assert ended.code == 0, ended.err
    assert ended.states == {"export_embedder": "ran", "build_cache": "ran", "gate_cache": "ran"}
    written = read(build / "reports/cache.json")
    assert written["passed"] is True
    assert sum(row["n"] for row in written["strata"].values()) > 100


PHRASINGS = {
    "the-wizard": [
        "Who is the Wizard?",
        "Who is the Wizard of Oz?",
        "Tell me about the Wizard",
        "I'd like to know who the Wizard is",
        "Who is that Wizard in Oz?",
        "Could you tell me who the Wizard is?",
        "the wizard of oz, who is that",
        "Who is the Wizard really?",
    ],
    "silver-shoes": [
        "What can the silver shoes do?",
        "What power do the silver shoes have?",
        "Tell me about the silver shoes",
        "I'd like to know what the silver shoes do",
        "What magic is in the silver shoes?",
        "Do the silver shoes have a power?",
        "Could you tell me what the silver shoes can do?",
        "the silver shoes, what magic do they have",
    ],
    "yellow-road": [
        "Which way does the yellow brick road lead?",
        "Tell me about the yellow brick road",
        "What is at the end of the yellow brick road?",
        "I'd like to know which way the yellow brick road leads",
        "Does the yellow brick road lead to the city?",
        "To which city does the yellow brick road lead?",
        "the yellow brick road, which city does it lead to",
        "Could you tell me which way the yellow brick road goes?",
    ],
}
PARAPHRASES = {
    "Can you tell me about the Wizard of Oz?": "the-wizard",
    "Can you tell me who the Wizard of Oz is?": "the-wizard",
    "What magic power do the silver shoes have?": "silver-shoes",
    "Please tell me about the silver shoes": "silver-shoes",
    "Which city is at the end of the yellow brick road?": "yellow-road",
    "Please tell me about the yellow brick road": "yellow-road",
}
TRAPS = {"Who is not the Wizard?": "the-wizard", "What can the silver shoes not do?": "silver-shoes"}
ELSEWHERE = ["What is 17 times 23?", "Write me a sorting function in Rust"]
LIMITS = GateCacheConfig(
    confidence=0.95,
    self_retrieval_min=1.0,
    conflicts_max=0,
    recall_min=1.0,
    paraphrases_wrong_max=0.4,  # 0 of 6
    near_misses_answered_max=0.8,  # 0 of 2
    out_of_domain_answered_max=0.8,
)


class SmallCache:
    """A tree of an author's files with three intents, to be edited, built and judged."""

    def __init__(self, root: Path, embedder: Path) -> None:
        self.root, self.embedder, self.cache = root, embedder, root / "cache"
        self.phrasings = {name: list(texts) for name, texts in PHRASINGS.items()}
        self.traps, self.elsewhere = dict(TRAPS), list(ELSEWHERE)
        self.policy = embedded().build_cache

    def build(self) -> None:
        rows = [{"id": name, "answer": "So.", "phrasings": texts} for name, texts in self.phrasings.items()]
        self._write("entries/all.yaml", rows)
        self._write("cert/paraphrases.yaml", [{"question": q, "intent": name} for q, name in PARAPHRASES.items()])
        traps = [{"question": question, "kind": "negation", "near": name} for question, name in self.traps.items()]
        self._write("cert/near_misses.yaml", traps)
        self._write("cert/out_of_domain.yaml", [{"question": text, "kind": "code"} for text in self.elsewhere])
        own = (DATA / "persona.yaml", DATA / "prologue.yaml", SCHEMAS)
        build_cache.run(self.policy, self.root / "entries", *own, self.embedder, self.cache)

    def judge(self) -> list[Check]:
        return gate_cache.run(LIMITS, self.root, SCHEMAS, self.embedder, self.cache, self.root / "cache.json")

    def judged(self) -> Report:
        return read(self.root / "cache.json")

    def _write(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        (self.root / name).parent.mkdir(exist_ok=True)
        (self.root / name).write_text(yaml.safe_dump(list(rows), sort_keys=False))


@pytest.fixture
def small(tmp_path: Path, embedder: Path) -> SmallCache:
    return SmallCache(tmp_path, embedder)


def test_cache_gate_passes_sound_small_data(small: SmallCache) -> None:
    small.build()
    assert failed(small.judge()) == []
    written = small.judged()
    assert written["passed"] is True
    assert written["served_hits"] == {"n": 6, "false": 0, "false_share_upper": pytest.approx(0.393, abs=1e-3)}
    assert written["recall"]["value"] == 1.0
    assert written["strata"]["paraphrase"] == {"n": 6, "answered": 6, "false": 0}


def test_phrasing_under_another_intent_is_a_conflict(small: SmallCache) -> None:
    moved = "Who is the Wizard of Oz?"
    small.phrasings["the-wizard"].remove(moved)
    small.phrasings["the-wizard"].append("Tell me who the Wizard is")
    small.phrasings["yellow-road"].append(moved)
    small.build()
    assert "conflicting phrasings" in failed(small.judge())
    conflict = {"phrasing": moved, "listed_under": "yellow-road", "otherwise_answered_by": "the-wizard"}
    assert conflict in small.judged()["conflicts"]


def test_swapped_answers_are_wrong_answers(small: SmallCache) -> None:
    wizard, road = small.phrasings["the-wizard"], small.phrasings["yellow-road"]
    small.phrasings |= {"the-wizard": road, "yellow-road": wizard}
    small.build()
    assert failed(small.judge()) == ["recall", "wrongly answered paraphrases, upper limit"]
    wrong = {(row["expected"], row["answered_by"]) for row in small.judged()["false_hits"]}
    assert wrong == {("the-wizard", "yellow-road"), ("yellow-road", "the-wizard")}


def test_threshold_that_nothing_reaches_answers_nothing(small: SmallCache) -> None:
    small.policy = replace(small.policy, threshold=1.0)
    small.build()
    assert failed(small.judge()) == ["recall"]
    assert small.judged()["served_hits"]["n"] == 0


def test_answered_trap_fails_the_gate(small: SmallCache) -> None:
    small.traps = {"Tell me who the Wizard of Oz is": "the-wizard"}
    small.build()
    assert failed(small.judge()) == ["answered near misses, upper limit"]


def test_answered_stranger_fails_the_gate(small: SmallCache) -> None:
    small.elsewhere = ["Tell me who the Wizard of Oz is"]
    small.build()
    assert failed(small.judge()) == ["answered out-of-domain questions, upper limit"]


def test_index_whose_rows_are_mixed_up_fails_the_gate(small: SmallCache) -> None:
    small.build()
    file = small.cache / "index.faiss"
    vectors = faiss.read_index(str(file)).reconstruct_n(0, 24)
    mixed = faiss.IndexFlatIP(vectors.shape[1])
    mixed.add(np.roll(vectors, 8, axis=0))
    faiss.write_index(mixed, str(file))
    reseal(small.cache)
    assert "self-retrieval" in failed(small.judge())


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
SAVINGS: Report = {
    "search_cpu_s": 0.004,
    "reply_cpu_s": 7.5,
    "reply_tokens_assumed": 150,
    "break_even_hit_rate": 0.000533,
    "by_hit_rate": [{"hit_rate": 0.3, "saved_share": 0.295}],
}


@pytest.mark.parametrize("latency_passed", [True, False])
def test_summary_shows_every_check_and_the_verdict(
    small: SmallCache, tiny_build: Path, text: Path, tmp_path: Path, latency_passed: bool
) -> None:
    small.build()
    small.judge()
    quality = tmp_path / "quality.json"
    gate_quality.run(QUALITY, text, APART, tiny_build / "checkpoint", tiny_build / "int4", quality)
    checks = [LATENCY["checks"][0], {**LATENCY["checks"][1], "passed": latency_passed}]
    latency, savings = tmp_path / "latency.json", tmp_path / "savings.json"
    latency.write_text(json.dumps({**LATENCY, "passed": latency_passed, "checks": checks}))
    savings.write_text(json.dumps(SAVINGS))
    int4, quantization = tiny_build / "int4", tiny_build / "reports/quantization.json"
    reports = (small.cache, tmp_path / "cache.json", quality, latency, savings)
    report.run(ReportConfig(), int4, quantization, *reports, tmp_path / "summary.md")

    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    verdict = "all gates passed" if latency_passed else "a gate failed"
    assert summary.startswith(f"# Emerald: {verdict}\n")
    for file in (tmp_path / "cache.json", quality, latency):
        judged = read(file)
        for check in judged["checks"]:
            mark = "✅" if check["passed"] else "❌"
            measured = f"{check['value']:.4g} | {check['bound']} {check['limit']:.4g}"
            assert f"| {mark} | {judged['gate']} | {check['name']} | {measured} |" in summary
    for words in ("**3 ready answers** in 24 phrasings", "41.5 tokens/s on 2 threads", "| 30% | 29.5% |"):
        assert words in summary
