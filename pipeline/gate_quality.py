"""Judges the int4 weights: how far their predictions are from the bf16 reference's, on text neither was fitted to.

Both networks read the same windows of text. The quantized one is computed with per-token int8 activations, the
numerics of KleidiAI's kernels, so that a verdict on any machine is a verdict on Arm. Per token: KL divergence of the
reference's distribution to the quantized one's (nats), whether the likeliest token agrees, and both log-likelihoods,
from which perplexity follows. Tokens of a window are not independent, so the bootstrap draws whole windows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.artifact import manifest_digest
from model.errors import InputError
from model.llama import Network, through_layer
from model.networks import Int4Folder, float_network, quantized_network
from model.tokenizer import Tokenizer
from pipeline.configs import GateQualityConfig
from pipeline.hub_checkpoint import open_checkpoint
from pipeline.progress import track
from pipeline.statistics import Interval, bootstrap, bootstrap_quantile, column
from pipeline.verdict import Check, write_report
from pipeline.windows import WIKITEXT_2, Text, check_apart, text_windows

HEAD_WINDOWS = 2
"""Whose logits are in memory at a time; more would read the head less often."""


def run(
    config: GateQualityConfig, text: Path, calibration: Path, checkpoint: Path, int4: Path, report: Path
) -> list[Check]:
    """Writes the report and returns the checks. Raises InputError if `text` shares a passage with `calibration`."""
    gate_text = WIKITEXT_2.read() if config.text == "wikitext-2" else Text.read(text)
    check_apart(Text.read(calibration), gate_text)
    windows = text_windows(gate_text, Tokenizer.load(int4), config.window_tokens)[: config.windows_max]
    if len(windows) < 2:
        raise InputError(
            f"{gate_text.name}: {len(windows)} windows of {config.window_tokens} tokens; give more text or less per "
            "window"
        )
    quantized = quantized_network(Int4Folder(int4), as_served=True, streamed=True)
    with open_checkpoint(checkpoint) as opened:
        reference = float_network(opened, torch.float32, streamed=True)
        compared = compare(reference, read_through(reference, windows), quantized, windows)
    quality = quality_of(compared, config.confidence)
    checks = [
        Check(
            name="mean KL divergence, upper limit", value=quality.kl.upper, limit=config.kl_mean_max, bound="at most"
        ),
        Check(name="same top-1, lower limit", value=quality.top1.lower, limit=config.same_top1_min, bound="at least"),
        Check(
            name="perplexity ratio, upper limit",
            value=quality.ratio.upper,
            limit=config.perplexity_ratio_max,
            bound="at most",
        ),
    ]
    write_report(
        report,
        "quality",
        checks,
        int4_manifest=manifest_digest(int4),
        text=gate_text.name,
        tokens=sum(map(len, compared)),
        windows=len(windows),
        activations="int8 per token, emulated",
        kl_mean_nats=quality.kl.rounded(),
        kl_p999_nats=quality.kl_p999.rounded(4),
        same_top1=quality.top1.rounded(),
        perplexity_reference=quality.perplexity.rounded(4),
        perplexity_ratio=quality.ratio.rounded(),
    )
    return checks


class Quality(NamedTuple):
    """How far a quantized network is from the reference, over all tokens."""

    kl: Interval
    """Mean, in nats."""
    kl_p999: Interval
    """99.9th percentile."""
    top1: Interval
    """Share of tokens whose likeliest successor is the same."""
    ratio: Interval
    """Of perplexities, quantized over reference."""
    perplexity: Interval
    """The reference's."""


def quality_of(compared: Sequence[Tensor], confidence: float) -> Quality:
    """From `compare_logits` of every window; windows are what is independent."""
    per_window = torch.stack([tokens.mean(dim=0) for tokens in compared]).tolist()
    return Quality(
        bootstrap(column(0), per_window, confidence),
        bootstrap_quantile(0.999, [tokens[:, 0].tolist() for tokens in compared], confidence),
        bootstrap(column(1), per_window, confidence),
        bootstrap(lambda mean: np.exp(mean[..., 3] - mean[..., 2]), per_window, confidence),
        bootstrap(lambda mean: np.exp(mean[..., 2]), per_window, confidence),
    )


def read_through(network: Network, windows: Sequence[Tensor]) -> list[Tensor]:
    """What the last layer gives [T, D] for every window; of a streamed network one layer is in memory at a time."""
    with torch.inference_mode():
        states = list(network.embed(torch.cat(list(windows))).split([len(tokens) for tokens in windows]))
        for weights in track(network.layers, "reading through layers"):
            states = [through_layer(network, weights, x_TD) for x_TD in states]
    return states


def compare(
    reference: Network, reference_states: Sequence[Tensor], quantized: Network, windows: Sequence[Tensor]
) -> list[Tensor]:
    """`compare_logits` of every window; `reference_states` from `read_through`."""
    states, compared = (reference_states, read_through(quantized, windows)), []
    with torch.inference_mode():
        for start in track(range(0, len(windows), HEAD_WINDOWS), "comparing logits"):
            group = windows[start : start + HEAD_WINDOWS]
            logits = [
                network.head(torch.cat(list(of[start : start + HEAD_WINDOWS]))).split([len(tokens) for tokens in group])
                for network, of in zip((reference, quantized), states, strict=True)
            ]
            compared += [compare_logits(p, q, tokens) for p, q, tokens in zip(*logits, group, strict=True)]
    return compared


def compare_logits(reference_TV: Tensor, quantized_TV: Tensor, tokens_T: Tensor) -> Tensor:
    """[T-1, 4] in float64: KL divergence, top-1 agreement, both models' negative log-likelihood of the next token."""
    p = reference_TV[:-1].double().log_softmax(dim=-1)
    q = quantized_TV[:-1].double().log_softmax(dim=-1)
    next_T1 = tokens_T[1:, None]
    kl = (p.exp() * (p - q)).sum(dim=-1)
    agree = (p.argmax(dim=-1) == q.argmax(dim=-1)).double()
    return torch.stack([kl, agree, -p.gather(1, next_T1)[:, 0], -q.gather(1, next_T1)[:, 0]], dim=1)
