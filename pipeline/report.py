"""Writes the summary of a build: verdicts first, then the figures, as Markdown that reads well as a job summary."""

import json
import statistics
from pathlib import Path
from typing import Any

from model.artifact import read_manifest
from pipeline.configs import ReportConfig

Report = dict[str, Any]


def run(
    _config: ReportConfig,
    engine: Path,
    tuning: Path,
    quantization: Path,
    cache: Path,
    cache_report: Path,
    quality: Path,
    replies: Path,
    latency: Path,
    savings: Path,
    summary: Path,
) -> None:
    """Writes summary.md from the other stages' reports."""
    reports = (cache_report, quality, latency, tuning, replies)
    read = [json.loads(path.read_text(encoding="utf-8")) for path in reports]
    model, content = read_manifest(engine, "engine"), read_manifest(cache, "cache")
    errors = json.loads(quantization.read_text(encoding="utf-8"))["tensors"]
    parts = [
        _heading(model, content, read),
        _verdicts(read),
        _quality(read[1], errors),
        _replies(read[4], read[3]),
        _speed(read[2]),
        _cache(read[0]),
        _savings(json.loads(savings.read_text(encoding="utf-8"))),
    ]
    summary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _heading(model: Report, cache: Report, reports: list[Report]) -> str:
    verdict = "all gates passed" if all(report["passed"] for report in reports) else "a gate failed"
    recipe = model["recipe"]
    return (
        f"# Emerald: {verdict}\n\n"
        f"**{model['model_id']}** ({model['licence']}), {recipe['scheme']}, embedding {recipe['embedding_bits']} bits, "
        f"head {recipe['head_bits']} bits: {model['bits_per_weight']:.2f} bits per weight. "
        f"**{cache['entries']} ready answers** in {cache['phrasings']} phrasings."
    )


def _verdicts(reports: list[Report]) -> str:
    rows = [
        f"| {'✅' if check['passed'] else '❌'} | {report['gate']} | {check['name']} | {check['value']:.4g} "
        f"| {check['bound']} {check['limit']:.4g} |"
        for report in reports
        for check in report["checks"]
    ]
    return "\n".join(["| | gate | check | measured | limit |", "|---|---|---|---:|---:|", *rows])


def _quality(quality: Report, errors: Report) -> str:
    kl, top1, ratio = quality["kl_mean_nats"], quality["same_top1"], quality["perplexity_ratio"]
    sqnr = [error["sqnr_db"] for error in errors.values()]
    worst = min(errors, key=lambda name: float(errors[name]["sqnr_db"]))
    return (
        f"## Quality\n\nAgainst the bf16 reference on {quality['tokens']} held-out tokens (95 % intervals): mean KL "
        f"divergence {kl['value']:.4f} nats ({kl['lower']:.4f} to {kl['upper']:.4f}), same top-1 {top1['value']:.1%} "
        f"({top1['lower']:.1%} to {top1['upper']:.1%}), perplexity x {ratio['value']:.3f} ({ratio['lower']:.3f} to "
        f"{ratio['upper']:.3f}). Weights: {statistics.median(sqnr):.1f} dB signal to noise in the median tensor, "
        f"{min(sqnr):.1f} dB in the worst (`{worst}`)."
    )


def _replies(replies: Report, tuning: Report) -> str:
    measured = replies["measures"]
    rows = [f"| {name} | {' | '.join(_share(of.get(name)) for of in measured.values())} |" for name in measured["all"]]
    table = "\n".join([f"| share of replies | {' | '.join(measured)} |", f"|---|{'---:|' * len(measured)}", *rows])
    worst = "\n\n".join(
        f"**{one['move']}** (turn {one['turn']}, seed {one['seed']}: {', '.join(one['faults']) or 'no fault'})\n\n"
        f"> {' '.join(one['reply'].split())}"
        for one in replies["worst"]
    )
    sentences = (
        f"{replies['replies']} replies to moves that no dialogue taught, {replies['tokens']} tokens.",
        f"Replies that an author wrote and sealed: perplexity {replies['perplexity']:.1f}.",
        f"Variety beside written replies: distinct-2 {replies['distinct_2']:.2f}, distinct-3 "
        f"{replies['distinct_3']:.2f}.",
    )
    details = f"<details><summary>The worst replies, word for word</summary>\n\n{worst}\n\n</details>"
    return f"## Replies\n\n{' '.join(sentences)}\n\n{table}\n\n{details}\n\n{_tuning(tuning)}"


def _share(figure: Report | None) -> str:
    return f"{figure['share']:.1%}" if figure and figure["of"] else "n/a"


def _tuning(tuning: Report) -> str:
    if not tuning["tuned"]:
        return "The model speaks as it came: no dialogues were taught."
    if "curve" not in tuning:
        return f"The model speaks with a given adapter, `{tuning['given']}`."
    curve = [(point["step"], point["held_out"]) for point in tuning["curve"]]
    top = max(loss for _, loss in curve)
    return (
        f"Taught by {tuning['dialogues']} dialogues ({tuning['replies']} replies): the perplexity of "
        f"{tuning['held_out']} held-out ones went from {tuning['perplexity_before']:.1f} to "
        f"{tuning['perplexity_after']:.1f}, best after {tuning['best_step']} steps.\n\n"
        "```mermaid\nxychart-beta\n"
        '    title "Held-out replies, nats per token"\n'
        f'    x-axis "steps" [{", ".join(str(step) for step, _ in curve)}]\n'
        f"    y-axis 0 --> {top:.1f}\n"
        f"    line [{', '.join(f'{loss:.2f}' for _, loss in curve)}]\n```"
    )


def _speed(latency: Report) -> str:
    ours, plain, ceiling = latency["decode_tokens_per_s"], latency["unquantized"], latency["ceiling"]
    speedup = latency["decode_speedup"]
    top = max(ceiling["decode_tokens_per_s"], ours)
    chart = (
        "```mermaid\nxychart-beta\n"
        '    title "Decoding, tokens per second"\n'
        '    x-axis ["unquantized", "this engine", "memory limit"]\n'
        f"    y-axis 0 --> {top:.0f}\n"
        f"    bar [{plain['decode_tokens_per_s']:.1f}, {ours:.1f}, {ceiling['decode_tokens_per_s']:.1f}]\n```"
    )
    sentences = (
        f"{ours:.1f} tokens/s on {latency['threads']} threads, {speedup['value']:.2f} times the unquantized model "
        f"({speedup['lower']:.2f} to {speedup['upper']:.2f}).",
        f"First token of a {latency['prompt_tokens']}-token prompt after {1e3 * latency['ttft_s']['value']:.0f} ms.",
        f"Each token reads {ceiling['bytes_per_token'] / 1e6:.0f} MB of weights; at the measured "
        f"{ceiling['read_bandwidth_gb_s']:.1f} GB/s that allows {ceiling['decode_tokens_per_s']:.0f} tokens/s, "
        f"of which {ceiling['reached']:.0%} is reached.",
    )
    return f"## Speed\n\n{' '.join(sentences)}\n\n{chart}"


def _cache(cache: Report) -> str:
    chosen = cache["chosen"]
    rows = [f"| {name} | {row['n']} | {row['hits']} | {row['false']} |" for name, row in chosen["strata"].items()]
    recall, elsewhere = chosen["recall"], chosen["out_of_domain_rejected"]
    table = "\n".join(["| questions | asked | answered | wrongly |", "|---|---:|---:|---:|", *rows])
    verdict = (
        f"**Certified: of the answers given by likeness at most {chosen['upper']:.2%} are wrong** "
        f"({chosen['false']} of {chosen['hits']} were, traps included)."
        if cache["certified"]
        else f"**Not certified**, so only exact matches are answered: {cache['reason']}."
    )
    sentences = (
        verdict,
        f"Of unseen phrasings {recall['value']:.1%} are answered rightly (at least {recall['lower']:.1%}).",
        f"Of out-of-domain questions {elsewhere['value']:.1%} go to the model (at least {elsewhere['lower']:.1%}).",
    )
    details = f"<details><summary>By kind of question</summary>\n\n{table}\n\n</details>"
    return f"## Cache\n\n{' '.join(sentences)}\n\n{details}"


def _savings(savings: Report) -> str:
    rows = [f"| {row['hit_rate']:.0%} | {row['saved_share']:.1%} |" for row in savings["by_hit_rate"]]
    table = "\n".join(["| hit rate | CPU time saved |", "|---:|---:|", *rows])
    even = savings["break_even_hit_rate"]
    return (
        f"## Savings\n\nA search costs {1e3 * savings['search_cpu_s']:.0f} ms of CPU time, a reply of "
        f"{savings['reply_tokens_assumed']} tokens {savings['reply_cpu_s']:.1f} s. The cache pays from a hit rate of "
        f"{'never' if even is None else format(even, '.1%')}.\n\n{table}"
    )
