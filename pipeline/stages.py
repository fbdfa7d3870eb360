"""The whole data flow as one table: every stage, what it reads and what it writes."""

from pathlib import Path

from pipeline.configs import Config
from pipeline.stage import Stage

CHECKPOINT = Path("checkpoint")
TUNED = Path("tuned")
INT4 = Path("int4")
ENGINE = Path("engine")
TRAINING_SET = Path("training_set.json")
TRAINED = Path("trained")
EMBEDDER = Path("embedder")
CACHE = Path("cache")
CERTIFICATE = Path("certificate.json")
TUNING = Path("reports/tuning.json")
QUANTIZATION = Path("reports/quantization.json")
CACHE_REPORT = Path("reports/cache.json")
QUALITY = Path("reports/quality.json")
REPLIES = Path("reports/replies.json")
LATENCY = Path("reports/latency.json")
SAVINGS = Path("reports/savings.json")
SUMMARY = Path("reports/summary.md")

CALIBRATION_TEXT = Path("pipeline/texts/calibration.txt")
GATE_TEXT = Path("pipeline/texts/gate.txt")
ENTRIES = Path("cache_data/entries")
CONTRAST = Path("cache_data/contrast")
ADAPTERS = Path("cache_data/adapters")
STORIES = Path("cache_data/stories")
VISITS = Path("cache_data/replies")
UNSAFE_WORDS = Path("pipeline/texts/unsafe_words.txt")
VALIDATION = Path("cache_data/validation")
PERSONA = Path("cache_data/persona.yaml")
PROLOGUE = Path("cache_data/prologue.yaml")
SCHEMA = Path("cache_data/schema")


def table(config: Config) -> tuple[Stage, ...]:
    """The stages of a configuration, in the order in which they run."""
    return (
        Stage(name="fetch", config=config.fetch, sources=_folder_of(config.fetch.source), outputs=(CHECKPOINT,)),
        Stage(
            name="tune",
            config=config.tune,
            sources=(STORIES, PERSONA, PROLOGUE, SCHEMA) if config.tune.trains else _folder_of(config.tune.adapter),
            inputs=(CHECKPOINT,),
            outputs=(TUNED, TUNING),
            resumable=True,
        ),
        Stage(
            name="quantize",
            config=config.quantize,
            sources=(CALIBRATION_TEXT,),
            inputs=(TUNED,),
            outputs=(INT4, QUANTIZATION),
            resumable=True,
            cores="free",
        ),
        Stage(
            name="gate_quality",
            config=config.gate_quality,
            sources=(GATE_TEXT, CALIBRATION_TEXT),
            inputs=(TUNED, INT4),
            outputs=(QUALITY,),
            cores="free",
        ),
        Stage(name="export", config=config.export, inputs=(INT4,), outputs=(ENGINE,)),
        Stage(
            name="training_set",
            config=config.training_set,
            sources=(ENTRIES, CONTRAST, SCHEMA),
            outputs=(TRAINING_SET,),
        ),
        Stage(
            name="train_embedder",
            config=config.train_embedder,
            sources=(*_folder_of(config.train_embedder.source), ADAPTERS),
            inputs=(TRAINING_SET,),
            outputs=(TRAINED,),
        ),
        Stage(name="export_embedder", config=config.export_embedder, inputs=(TRAINED,), outputs=(EMBEDDER,)),
        Stage(
            name="build_cache",
            config=config.build_cache,
            sources=(ENTRIES, CONTRAST, PERSONA, PROLOGUE, SCHEMA),
            inputs=(EMBEDDER,),
            outputs=(CACHE,),
            resumable=True,
            cores="one",
        ),
        Stage(
            name="certify_cache",
            config=config.certify_cache,
            sources=(ENTRIES, CONTRAST, VALIDATION, SCHEMA),
            inputs=(EMBEDDER, CACHE),
            outputs=(CERTIFICATE, CACHE_REPORT),
            cores="one",
        ),
        Stage(
            name="gate_replies",
            config=config.gate_replies,
            sources=(VISITS, STORIES, ENTRIES, PERSONA, PROLOGUE, SCHEMA, UNSAFE_WORDS),
            inputs=(ENGINE, EMBEDDER, *((TUNED,) if config.gate_replies.float_openings else ())),
            outputs=(REPLIES,),
        ),
        Stage(
            name="gate_latency",
            config=config.gate_latency,
            sources=(GATE_TEXT,),
            inputs=(ENGINE,),
            outputs=(LATENCY,),
            measures=True,
        ),
        Stage(
            name="savings",
            config=config.savings,
            inputs=(EMBEDDER, CACHE, ENGINE, CERTIFICATE, CACHE_REPORT),
            outputs=(SAVINGS,),
            measures=True,
        ),
        Stage(
            name="report",
            config=config.report,
            inputs=(ENGINE, TUNING, QUANTIZATION, CACHE, CACHE_REPORT, QUALITY, REPLIES, LATENCY, SAVINGS),
            outputs=(SUMMARY,),
        ),
    )


def _folder_of(source: str) -> tuple[Path, ...]:
    """A folder source is the user's and may change; packages and hubs are pinned by the configuration itself."""
    return (Path(source.removeprefix("folder:")).expanduser().resolve(),) if source.startswith("folder:") else ()
