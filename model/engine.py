"""Text from tokens: prefill, decode, sampling and stopping, for any number of conversations at once.

`Engine.generate` yields one reply. Underneath, `open` begins a reply and `step` moves any set of open replies on by one
forward pass: each either has a piece of its prompt computed or gains a token. A reply's text does not depend on which
others are in the step.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.architecture import Architecture
from model.artifact import Progress, unwatched
from model.errors import InputError
from model.kv_cache import PAGE, Pages, Place, TokenSequence, new_caches
from model.llama import Model, rotary_table
from model.program import CompiledModel
from model.sampling import LogitsError, Sampler, Sampling, TokenLogprob, logprobs
from model.tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length"]
STEP_TOKENS = 512
"""Most tokens that one forward pass computes; longer prompts go through in pieces."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A step of a reply: text to show now (perhaps empty). The last piece carries the finish reason."""

    text: str
    tokens: int
    """Tokens generated so far, the closing stop token not counted."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """This step's token and the likeliest ones, if `Sampling.logprobs` asks; none for the closing stop token."""


class Reply:
    """A reply in progress; made by `Engine.open`, moved on by `Engine.step`, given up by `Engine.close`."""

    def __init__(self, sequence: TokenSequence, sampling: Sampling, limit: int, tokenizer: Tokenizer) -> None:
        self.sequence = sequence
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self._limit, self._stop_tokens = limit, tokenizer.stop_tokens
        self._logprobs = sampling.logprobs
        self._sampler = Sampler(sampling, sequence.tokens)
        self._stream, self._gate = TextStream(tokenizer), StopGate(sampling.stop)

    def advance(self, logits_V: Tensor) -> Piece:
        """Draws the next token and gives the text it completes."""
        token = self._sampler.next_token(logits_V)
        if token in self._stop_tokens:
            return self._end(self._gate.flush(self._stream.flush()), "stop")
        self.sequence.tokens.append(token)
        self.tokens += 1
        known = () if self._logprobs is None else logprobs(logits_V, token, self._logprobs)
        text = self._gate.push(self._stream.push(token))
        if self._gate.stopped:
            return self._end(text, "stop", known)
        if self.tokens < self._limit:
            return Piece(text=text, tokens=self.tokens, logprobs=known)
        return self.cut(text, known)

    def cut(self, text: str = "", known: tuple[TokenLogprob, ...] = ()) -> Piece:
        """Ends the reply for its length, with the text that was held back; after `text`, if that is to be shown too."""
        text += self._gate.flush(self._stream.flush())
        return self._end(text, "stop" if self._gate.stopped else "length", known)

    def _end(self, text: str, reason: FinishReason, known: tuple[TokenLogprob, ...] = ()) -> Piece:
        self.finish_reason = reason
        return Piece(text=text, tokens=self.tokens, finish_reason=reason, logprobs=known)


class Engine:
    """Runs one model; not thread-safe. `sequences` full contexts fit its KV cache at once, or more that are shorter."""

    def __init__(self, model: Model, tokenizer: Tokenizer, context: int, sequences: int = 2) -> None:
        self.model_id = "unnamed"
        self.tokenizer = tokenizer
        self.context = context
        self._model = model
        self._pages = Pages(sequences * -(-context // PAGE))
        self._rotary = rotary_table(model.architecture, context)
        self._laid_out: tuple[object, tuple[Any, ...]] = (None, ())
        self._caches = new_caches(model.architecture, self._pages.count, model.kv_dtype)

    @classmethod
    def load(cls, folder: Path, sequences: int = 2, progress: Progress = unwatched) -> "Engine":
        """Opens an exported engine folder (kind "engine"): verified, memory-mapped, nothing compiled."""
        model = CompiledModel(folder, progress)
        engine = cls(model, Tokenizer.load(folder), model.manifest["context"], sequences)
        engine.model_id = model.manifest["model_id"]
        return engine

    @property
    def architecture(self) -> Architecture:
        """The model's sizes."""
        return self._model.architecture

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads: all but the embedding table."""
        return self._model.bytes_per_token

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """Yields the reply piece by piece as it is generated. Raises InputError if the prompt leaves no room."""
        self._check(prompt, self.context - 1)
        return self._pieces(prompt, sampling)

    def open(self, prompt: Sequence[int], sampling: Sampling) -> Reply:
        """Begins a reply and reserves the cache for all of it; `close` it in the end.

        Raises InputError if the prompt is empty or leaves no room, CacheFullError if others must end first.
        """
        self._check(prompt, self.context - 1)
        limit = min(sampling.max_tokens, self.context - len(prompt))
        sequence = self.begin(prompt, len(prompt) + limit)
        try:
            return Reply(sequence, sampling, limit, self.tokenizer)
        except BaseException:
            self.end(sequence)
            raise

    def step(self, replies: Sequence[Reply]) -> list[Piece | LogitsError | None]:
        """One forward pass; a piece for each reply that gained a token, None while its prompt is not through.

        A reply whose logits are no numbers is closed, and its error stands in its piece's place.
        """
        assert all(reply.finish_reason is None for reply in replies), "a finished reply is closed, not moved on"
        logits = self.advance([reply.sequence for reply in replies])
        pieces: list[Piece | LogitsError | None] = []
        for reply, logits_V in zip(replies, logits, strict=True):
            try:
                pieces.append(None if logits_V is None else reply.advance(logits_V))
            except LogitsError as fault:
                self.close(reply)
                self.forget()  # what led here must not be taken up by another reply
                pieces.append(fault)
        return pieces

    def close(self, reply: Reply) -> None:
        """Ends a reply, finished or not; what it computed stays known for prompts that begin like it."""
        self.end(reply.sequence)

    def forget(self) -> None:
        """Drops what ended sequences left, so that the next prompt is computed from its first token."""
        self._pages.forget()

    def greedy(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """The likeliest continuation, of that many tokens whatever they are: for measurements."""
        sequence = self.begin(prompt, len(prompt) + tokens)
        try:
            for _ in range(tokens):
                logits_V = None
                while logits_V is None:
                    (logits_V,) = self.advance([sequence])
                sequence.tokens.append(int(logits_V.argmax()))
                yield sequence.tokens[-1]
        finally:
            self.end(sequence)

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits [V] of the token that follows `tokens`."""
        self._check(tokens, self.context)
        sequence = self.begin(tokens, len(tokens))
        try:
            while True:
                (logits_V,) = self.advance([sequence])
                if logits_V is not None:
                    return logits_V
        finally:
            self.end(sequence)

    def score(self, tokens: Sequence[int]) -> Tensor:
        """Log-probability [T-1], in nats, of every token after the first, given those before it: for measurements."""
        self._check(tokens, self.context)
        self.forget()  # of known tokens there would be no logits
        sequence = self.begin(tokens, len(tokens))
        scored = []
        try:
            with torch.inference_mode():
                while (start := sequence.computed) < len(tokens) - 1:
                    share = min(STEP_TOKENS, len(tokens) - 1 - start)
                    logits_TV = self._model.head(self._forward([sequence], [share])).float().log_softmax(dim=-1)
                    next_T1 = torch.tensor(tokens[start + 1 : start + share + 1])[:, None]
                    scored.append(logits_TV.gather(1, next_T1)[:, 0])
                    sequence.computed += share
        finally:
            self.end(sequence)
        return torch.cat(scored)

    def begin(self, tokens: Sequence[int], room: int) -> TokenSequence:
        """A sequence with room for that many tokens in all, sharing what is known of its beginning."""
        self._check(tokens, room)
        if room > self.context:
            raise InputError(f"a sequence of {room} tokens was asked for, and the context holds {self.context}")
        return self._pages.open(tokens, room)

    def end(self, sequence: TokenSequence) -> None:
        """Gives the sequence's room back."""
        self._pages.close(sequence)

    def advance(self, sequences: Sequence[TokenSequence]) -> list[Tensor | None]:
        """Computes tokens that sequences have and the cache has not, at most STEP_TOKENS together, the fewest first.

        Returns for each the logits [V] of the token that follows its last, or None while some are left.
        """
        for sequence in sequences:
            if not sequence.computed < len(sequence.tokens) <= sequence.room:
                raise InputError(
                    f"a sequence of {len(sequence.tokens)} tokens, {sequence.computed} of them computed, has room for "
                    f"{sequence.room}: append a token, and no more than were asked for"
                )
        shares = _shares([len(sequence.tokens) - sequence.computed for sequence in sequences])
        with torch.inference_mode():
            x_TD = self._forward(sequences, shares)
            lasts, logits = [], dict[int, Tensor]()
            for row, (sequence, share) in enumerate(zip(sequences, shares, strict=True)):
                if sequence.computed + share == len(sequence.tokens):
                    lasts.append((row, sum(shares[: row + 1]) - 1))
            if lasts:
                chosen = [last for _, last in lasts]
                logits_BV = self._model.head(x_TD if len(chosen) == len(x_TD) else x_TD[chosen])
                logits = {row: logits_V for (row, _), logits_V in zip(lasts, logits_BV, strict=True)}
        for sequence, share in zip(sequences, shares, strict=True):
            sequence.computed += share
            self._pages.publish(sequence)
        return [logits.get(row) for row in range(len(sequences))]

    def _pieces(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        reply = self.open(prompt, sampling)
        try:
            while reply.finish_reason is None:
                (piece,) = self.step([reply])
                if isinstance(piece, LogitsError):
                    raise piece
                if piece is not None:
                    yield piece
        finally:
            self.close(reply)

    def _forward(self, sequences: Sequence[TokenSequence], shares: Sequence[int]) -> Tensor:
        tokens, positions = list[int](), list[int]()
        for sequence, share in zip(sequences, shares, strict=True):
            span = range(sequence.computed, sequence.computed + share)
            tokens += sequence.tokens[span.start : span.stop]
            positions += span
        x_TD = self._model.embed(torch.tensor(tokens))
        place = Place(self._rotary, torch.tensor(positions), *self._layout(sequences, shares))
        for index, cache in enumerate(self._caches):
            x_TD = self._model.layer(index, x_TD, place, cache)
        return x_TD

    def _layout(self, sequences: Sequence[TokenSequence], shares: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows [T] and tables [B, P] of a step; kept while the same sequences decode, since they do not change then."""
        key = (tuple(shares), *map(id, sequences))
        if key != self._laid_out[0]:
            rows_T = torch.tensor([row for row, share in enumerate(shares) for _ in range(share)])
            tables_BP = torch.nn.utils.rnn.pad_sequence([one.table_P for one in sequences], batch_first=True)
            self._laid_out = key, (list(sequences), rows_T, tables_BP)
        return self._laid_out[1][1:]

    def _check(self, tokens: Sequence[int], most: int) -> None:
        if not tokens:
            raise InputError("the prompt is empty; give at least one token")
        if len(tokens) > most:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, and the context holds {self.context} with the reply: shorten it"
            )


def _shares(pending: Sequence[int]) -> list[int]:
    """How many of each sequence's pending tokens one step takes: decoding ones first, then the shortest prompts."""
    left, shares = STEP_TOKENS, [0] * len(pending)
    for row in sorted(range(len(pending)), key=pending.__getitem__):
        shares[row] = min(pending[row], left)
        left -= shares[row]
    return shares


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
        held = len(self._held)
        lengths = [
            n for stop in self._stops for n in range(1, min(len(stop), held + 1)) if self._held.endswith(stop[:n])
        ]
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
