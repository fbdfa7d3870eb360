"""The model card that goes into the image: what the weights are, what was done to them, and how well they fared."""

from pathlib import Path
from typing import Any

from model.artifact import read_json
from pipeline.licences import terms_of


def model_card(build: Path, engine: dict[str, Any], embedder: dict[str, Any]) -> str:
    """Markdown from a build's manifests and reports. Its heading begins as the licence of the weights wants."""
    recipe = engine["recipe"]
    parts = [
        f"# {_title(engine)}",
        *_badge(engine),
        f"**{engine['model_id']}** (licence: {engine['licence']}; source: `{engine['source']}`), quantized by Emerald "
        f"to `{recipe['scheme']}`, embedding {recipe['embedding_bits']} bits, head {recipe['head_bits']} bits: "
        f"{engine['bits_per_weight']:.2f} bits per weight. Compiled for `{engine['cpu']}` with torch "
        f"{engine['torch']}; its context is {engine['context']} tokens.",
        *_taught(build),
        f"Questions are compared with **{embedder['model_id']}** (licence: {embedder['licence']}), fine-tuned on the "
        "phrasings of the ready answers.",
        _verdicts(build),
        "Ready answers were written by people. What the model says was not checked by anyone: it may be wrong, and it "
        "inherits the limits and the biases of the model it was made from, whose own card describes them. "
        "`licences/` holds the licences and notices of both models.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(engine: dict[str, Any]) -> str:
    return f"{engine['model_id'].rpartition('/')[2]}, {engine['recipe']['scheme']}"


def _badge(engine: dict[str, Any]) -> list[str]:
    badge = terms_of(engine["licence"], engine["model_id"]).badge
    return [f"**{badge}**"] if badge else []


def _taught(build: Path) -> list[str]:
    """What the weights learnt before they were quantized, if this build's report says so."""
    report = build / "reports/tuning.json"
    tuning: dict[str, Any] = read_json(report) if report.exists() else {"tuned": False}
    if not tuning["tuned"]:
        return []
    if "dialogues" not in tuning:
        return [f"A given LoRA adapter is merged into its weights (SHA-256 `{tuning['adapter'][:12]}…`)."]
    return [f"It was fine-tuned (LoRA) on {tuning['dialogues']} dialogues that were written for this persona."]


def _verdicts(build: Path) -> str:
    """The gates that have judged this build; those that have not are not named."""
    reports = [read_json(path) for path in sorted((build / "reports").glob("*.json"))]
    rows = [
        f"| {report['gate']} | {check['name']} | {check['value']:.4g} | {check['bound']} {check['limit']:.4g} |"
        for report in reports
        for check in report.get("checks", ())
    ]
    return "\n".join(["| gate | check | measured | limit |", "|---|---|---:|---:|", *rows]) if rows else ""
