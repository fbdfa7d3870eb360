"""What the cache saves: the CPU time of a search against that of a generated reply, and where it breaks even.

The source article's formula, savings = share of queries * (LLM cost - search cost), forgets that a miss pays for its
search too, and that a wrong answer is asked again. Per query, with h the hit rate, f the share of hits that are wrong,
and C the costs in CPU seconds:

    saved = h * (1 - f) * C_LLM - C_search          break-even: h * (1 - f) = C_search / C_LLM

Building the index is paid once and named beside it. All costs are measured here; only the reply's length is assumed.
"""

import json
import time
from pathlib import Path

from model.artifact import write_json
from model.engine import Engine
from pipeline.configs import SavingsConfig
from serving.cache import Cache
from serving.certificate import admit
from serving.embedder import Embedder

SEARCHES = 50
TOKENS = 48


def run(
    config: SavingsConfig,
    embedder_folder: Path,
    cache_folder: Path,
    engine_folder: Path,
    certificate: Path,
    cache_report: Path,
    report: Path,
) -> None:
    """Writes the savings report."""
    cache = Cache(cache_folder, Embedder(embedder_folder))
    admit(cache, certificate)
    engine = Engine.load(engine_folder)
    search = _search_cost(cache)
    prompt_cost, token_cost = _reply_costs(engine, cache)
    reply = prompt_cost + config.reply_tokens * token_cost
    chosen = json.loads(cache_report.read_text(encoding="utf-8"))["chosen"]
    wrong = chosen["false"] / chosen["hits"] if chosen["hits"] else 0.0
    rows = [{"hit_rate": h, "saved_share": round(h * (1 - wrong) - search / reply, 4)} for h in config.hit_rates]
    write_json(
        report,
        {
            "search_cpu_s": round(search, 6),
            "reply_cpu_s": round(reply, 4),
            "reply_tokens_assumed": config.reply_tokens,
            "wrong_share_of_hits": round(wrong, 4),
            "break_even_hit_rate": round(search / reply / (1 - wrong), 6) if wrong < 1 else None,
            "index_build_cpu_s": round(search * len(cache.phrasings), 2),
            "by_hit_rate": rows,
        },
    )


def _search_cost(cache: Cache) -> float:
    """CPU seconds of one lookup that goes all the way: embedding, search and decision."""
    questions = [f"{text} indeed" for _, text in cache.phrasings[:SEARCHES]]
    cache.lookup(questions[0])
    start = time.process_time()
    for question in questions:
        cache.lookup(question)
    return (time.process_time() - start) / len(questions)


def _reply_costs(engine: Engine, cache: Cache) -> tuple[float, float]:
    """CPU seconds of a prompt after the persona, which is computed once, and of a generated token."""
    persona = {"role": "system", "content": cache.persona["system_prompt"]}
    tokens = engine.tokenizer.encode_chat([persona, {"role": "user", "content": "I greet the guard."}])
    engine.next_logits(tokens)
    asked = {"role": "user", "content": "I walk through the gates and look up."}
    reply = engine.greedy(engine.tokenizer.encode_chat([persona, asked]), TOKENS + 1)
    start = time.process_time()
    next(reply)
    first = time.process_time()
    for _ in reply:
        pass
    return first - start, (time.process_time() - first) / TOKENS
