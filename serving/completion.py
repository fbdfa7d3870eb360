"""One answer in OpenAI's shapes: whole, or as server-sent events; as a chat message, or as plain text."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import accumulate
from typing import Any

from model.engine import FinishReason, Piece
from model.sampling import TokenLogprob
from model.tokenizer import Tokenizer
from serving.energy import EnergyModel
from serving.scheduler import Ticket


class Completion:
    """What chat and plain completions share; `ticket` has the figures once the last piece has come."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, ticket: Ticket, tokenizer: Tokenizer | None, energy: EnergyModel) -> None:
        self._ticket, self._tokenizer, self._energy = ticket, tokenizer, energy
        self.finish_reason: FinishReason | None = None
        """Why the reply ended, once its last event was made."""
        self._offset = 0
        self.identity = f"{self.prefix}-{uuid.uuid4().hex}"
        self._head = {"id": self.identity, "created": int(time.time()), "model": model}
        self._chunk_head = {**self._head, "object": self.chunk_kind}

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """A completion object."""
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        known = [token for piece in pieces for token in self._known(piece)]
        choice = {**self._message(text), **self._ending(last.finish_reason), "logprobs": self._logprobs(known)}
        return {**self._head, "object": self.kind, "choices": [{"index": 0, **choice}], **self.figures()}

    async def events(self, batches: AsyncIterator[list[Piece]], *, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, closed by [DONE]: one for the pieces that come together."""
        if opening := self._opening():
            yield event(self._chunk(opening, None, None))
        async for pieces in batches:
            for chunk in self.chunks(pieces):
                yield event(chunk)
            self.finish_reason = pieces[-1].finish_reason
        if with_usage:
            yield event({**self._chunk_head, "choices": [], **self.figures()})
        yield "data: [DONE]\n\n"

    def chunks(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """Chunk objects for pieces that come together: one for their text, and one for the reply's end."""
        text, known = "".join(piece.text for piece in pieces), [one for piece in pieces for one in self._known(piece)]
        if text or known:
            yield self._chunk(self._delta(text), None, self._logprobs(known))
        if pieces[-1].finish_reason:
            yield self._chunk(self._delta(None), pieces[-1].finish_reason, None)

    def figures(self) -> dict[str, Any]:
        """Tokens, energy and times, once the last piece has come."""
        ticket = self._ticket
        usage = {
            "prompt_tokens": len(ticket.prompt),
            "completion_tokens": ticket.tokens,
            "total_tokens": len(ticket.prompt) + ticket.tokens,
            "prompt_tokens_details": {"cached_tokens": ticket.cached_tokens},
            "energy": vars(self._energy.of(ticket.cpu_seconds)),
        }
        ttft = ticket.ttft_s
        timings = {
            "ttft_ms": round(1e3 * (ttft if ttft is not None else time.perf_counter() - ticket.created), 3),
            "tokens_per_second": round(1 / ticket.tpot_s, 2) if ticket.tpot_s else None,
        }
        return {"usage": usage, "timings": timings}

    def _chunk(self, content: dict[str, Any], finish_reason: str | None, logprobs: object) -> dict[str, Any]:
        choice = {"index": 0, **content, "finish_reason": finish_reason, "logprobs": logprobs}
        return {**self._chunk_head, "choices": [choice]}

    def _known(self, piece: Piece) -> list[tuple[TokenLogprob, ...]]:
        return [piece.logprobs] if piece.logprobs else []

    def _bytes(self, token: int) -> bytes:
        assert self._tokenizer is not None, "only the model gives log probabilities"
        return self._tokenizer.token_bytes(token)

    def _opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _ending(self, reason: str | None) -> dict[str, Any]:
        return {"finish_reason": reason}

    def _logprobs(self, known: list[tuple[TokenLogprob, ...]]) -> dict[str, Any] | None:
        if self._ticket.sampling.logprobs is None:
            return None
        return {
            "content": [{**self._entry(chosen), "top_logprobs": list(map(self._entry, top))} for chosen, *top in known],
            "refusal": None,
        }

    def _entry(self, known: TokenLogprob) -> dict[str, Any]:
        spelt = self._bytes(known.token)
        return {"token": spelt.decode(errors="replace"), "logprob": known.logprob, "bytes": list(spelt)}


class TextCompletion(Completion):
    """OpenAI's older shape."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _opening(self) -> dict[str, Any]:
        return {}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, known: list[tuple[TokenLogprob, ...]]) -> dict[str, Any] | None:
        if self._ticket.sampling.logprobs is None:
            return None
        tokens = [self._spelt(chosen) for chosen, *_ in known]
        *offsets, self._offset = accumulate(map(len, tokens), initial=self._offset)
        return {
            "tokens": tokens,
            "token_logprobs": [chosen.logprob for chosen, *_ in known],
            "top_logprobs": [{self._spelt(one): one.logprob for one in top} for _, *top in known],
            "text_offset": offsets,
        }

    def _spelt(self, known: TokenLogprob) -> str:
        return self._bytes(known.token).decode(errors="replace")


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
