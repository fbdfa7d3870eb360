"""Runs llama.cpp on request, in an environment of its own: standard input asks, standard output answers, in JSON lines.

    python peer_worker.py MODEL.gguf THREADS      then lines like {"sequences": 8, "prompt": 128, "tokens": 48}

Uses the package's low-level interface, so that nothing of Python stands between the timings.
"""

import json
import sys
import time
from collections.abc import Sequence

import llama_cpp  # type: ignore[import-not-found, unused-ignore]  # not in this project's environment
import numpy as np

SEQUENCES, CONTEXT = 8, 8192
"""At once, and tokens of all together: each gets its part."""


def main() -> None:
    """Answers each line with prefill and decode tokens per second."""
    path, threads = sys.argv[1], int(sys.argv[2])
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = CONTEXT, 512, 512, SEQUENCES
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _measure(context, vocabulary, asked["sequences"], asked["prompt"], asked["tokens"])
        print(json.dumps(answer), flush=True)


def _measure(context: object, vocabulary: int, sequences: int, prompt: int, tokens: int) -> dict[str, float]:
    """Each sequence's prompt alone, then all decode together, greedily."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    random = np.random.default_rng(0)
    prefill = decode = 0.0
    last = []
    for sequence in range(sequences):
        piece = random.integers(1000, 10000, prompt).tolist()
        seconds, drawn = _decode(context, vocabulary, piece, range(prompt), [sequence] * prompt, logits_from=prompt - 1)
        prefill += seconds
        last += drawn
    for step in range(tokens):
        seconds, last = _decode(context, vocabulary, last, [prompt + step] * sequences, range(sequences), logits_from=0)
        decode += seconds
    return {"prefill": sequences * prompt / prefill, "decode": sequences * tokens / decode}


def _decode(
    context: object,
    vocabulary: int,
    tokens: Sequence[int],
    positions: Sequence[int],
    rows: Sequence[int],
    logits_from: int,
) -> tuple[float, list[int]]:
    """Seconds of one forward pass with greedy sampling, and the sampled tokens."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, (token, position, row) in enumerate(zip(tokens, positions, rows, strict=True)):
        batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
        batch.seq_id[index][0], batch.logits[index] = row, index >= logits_from
    start = time.perf_counter()
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama.cpp refused the batch")
    logits = [llama_cpp.llama_get_logits_ith(context, index) for index in range(logits_from, len(tokens))]
    drawn = [int(np.ctypeslib.as_array(one, (vocabulary,)).argmax()) for one in logits]
    seconds = time.perf_counter() - start
    llama_cpp.llama_batch_free(batch)
    return seconds, drawn


if __name__ == "__main__":
    main()
