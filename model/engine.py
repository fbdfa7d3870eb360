"""Text from tokens: prefill, decode, sampling and stopping for one conversation at a time.

The engine keeps the KV cache of the last sequence, so a prompt that begins like the previous one (the persona, the
conversation so far) is only prefilled from where it differs.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.errors import InputError
from model.llama import KVCache, Model, rotary_table
from model.program import PREFILL_TOKENS, SLOTS_STEP, CompiledModel
from model.sampling import Sampler, Sampling
from model.tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A step of a reply: text to show now (perhaps empty). The last piece carries the finish reason."""

    text: str
    tokens: int
    """Tokens generated so far, the closing stop token not counted."""
    finish_reason: FinishReason | None = None


class Engine:
    """Runs one model; not thread-safe, one generation at a time."""

    def __init__(self, model: Model, tokenizer: Tokenizer, context: int) -> None:
        self.model_id = "unnamed"
        self.tokenizer = tokenizer
        self.context = context
        self.reused_tokens = 0
        self._model = model
        arch = model.architecture
        slots = -(-context // SLOTS_STEP) * SLOTS_STEP
        self._rotary = rotary_table(arch, slots)
        self._cache = [
            KVCache(*torch.zeros(2, slots, arch.kv_heads, arch.head_dim, dtype=model.dtype)) for _ in range(arch.layers)
        ]
        self._cached: list[int] = []

    @classmethod
    def load(cls, folder: Path) -> "Engine":
        """Opens an exported engine folder (kind "engine"): verified, memory-mapped, nothing compiled."""
        model = CompiledModel(folder)
        engine = cls(model, Tokenizer.load(folder), model.manifest["context"])
        engine.model_id = model.manifest["model_id"]
        return engine

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """Yields the reply piece by piece as it is generated. Raises InputError if the prompt leaves no room."""
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if len(prompt) >= self.context:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, and the context holds {self.context} with the reply: shorten it"
            )
        return self._reply(list(prompt), sampling)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads: all but the embedding table."""
        return self._model.bytes_per_token

    def forget(self) -> None:
        """Drops the cached sequence, so that the next prompt is computed from its first token."""
        self._cached = []

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits [V] of the token that follows `tokens`, computing only what the cache does not hold."""
        self.reused_tokens = self._shared_prefix(tokens)
        start = self.reused_tokens
        self._cached = list(tokens[:start])
        with torch.inference_mode():
            while start < len(tokens):
                piece = torch.tensor(tokens[start : start + PREFILL_TOKENS])
                x_TD = self._forward(piece, start)
                start += len(piece)
                self._cached += piece.tolist()
            return self._model.head(x_TD[-1:])[0]

    def _reply(self, tokens: list[int], sampling: Sampling) -> Iterator[Piece]:
        sampler, stream, gate = Sampler(sampling), TextStream(self.tokenizer), StopGate(sampling.stop)
        limit = min(sampling.max_tokens, self.context - len(tokens))
        for count in range(1, limit + 1):
            token = sampler.next_token(self.next_logits(tokens))
            if token in self.tokenizer.stop_tokens:
                yield Piece(text=gate.flush(stream.flush()), tokens=count - 1, finish_reason="stop")
                return
            tokens.append(token)
            text = gate.push(stream.push(token))
            if gate.stopped:
                yield Piece(text=text, tokens=count, finish_reason="stop")
                return
            if count < limit:
                yield Piece(text=text, tokens=count)
        text += gate.flush(stream.flush())
        yield Piece(text=text, tokens=limit, finish_reason="stop" if gate.stopped else "length")

    def _forward(self, tokens_T: Tensor, start: int) -> Tensor:
        end = start + len(tokens_T)
        slots = -(-end // SLOTS_STEP) * SLOTS_STEP
        positions_T, rotary_T2H = torch.arange(start, end), self._rotary[start:end]
        x_TD = self._model.embed(tokens_T)
        for index, (keys, values) in enumerate(self._cache):
            x_TD = self._model.layer(index, x_TD, rotary_T2H, positions_T, KVCache(keys[:slots], values[:slots]))
        return x_TD

    def _shared_prefix(self, tokens: Sequence[int]) -> int:
        """How many leading tokens the cache already holds; the last token is always computed, for its logits."""
        pairs = zip(self._cached, tokens[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class StopGate:
    """Holds back text that may be the beginning of a stop text, and ends the reply when one is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now that `text` has come."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._undecided())

    def flush(self, text: str) -> str:
        """What may be shown when nothing follows."""
        shown = self.push(text)
        return shown if self.stopped else shown + self._release(len(self._held))

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        lengths = [n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        return max(lengths, default=0)

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], "" if self.stopped else self._held[length:]
        return shown


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Speed of one reply, by the field's definitions."""

    ttft_s: float
    """Time to first token: from the request to the first generated token."""
    tpot_s: float
    """Time per output token after the first; 0 when there was only one."""
    tokens: int


def timed(pieces: Iterator[Piece]) -> Iterator[tuple[Piece, Timing]]:
    """Passes pieces through, each with the timing so far."""
    start = time.perf_counter()
    first = None
    for piece in pieces:
        now = time.perf_counter()
        first = first or now
        rest = (now - first) / (piece.tokens - 1) if piece.tokens > 1 else 0.0
        yield piece, Timing(ttft_s=first - start, tpot_s=rest, tokens=piece.tokens)
