"""Asks the reference and the quantized model the same questions, through EleutherAI's lm-evaluation-harness.

    make bench-tasks CONFIG=llama31-8b TASKS=arc_easy,hellaswag

The models are compared question by question and not by two averages: McNemar's exact test of those that only one of
them answers rightly. A task fails if int4 is worse beyond what chance explains. Weights stream layer by layer, so 8B
fits where its quality gate does. Multiple-choice tasks only; any folder of the harness's task files can be added. Exit
codes: 0 done, 1 a task is worse, 2 bad input. The last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from model.artifact import manifest_digest
from model.errors import InputError
from model.llama import Network
from model.networks import Int4Folder, float_network, quantized_network
from model.tokenizer import Tokenizer
from pipeline.configs import CONFIGS
from pipeline.fingerprint import ROOT
from pipeline.gate_quality import read_through
from pipeline.hub_checkpoint import open_checkpoint
from pipeline.progress import quiet_libraries, say, track
from pipeline.statistics import mcnemar
from pipeline.verdict import Check, write_report

PASS_TOKENS = 32768
"""That go through the layers together: their hidden states are in memory, and each pass reads every weight."""
HEAD_TOKENS = 512
"""Whose logits are in memory together; a streamed head is read once for each such group."""
Pair = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation, as text and as tokens."""
Tokens = tuple[tuple[int, ...], tuple[int, ...]]
"""Context and continuation as tokens."""


class Scored(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A network as the harness asks it: how likely is a continuation, and is it the likeliest."""

    def __init__(self, network: Network, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.network, self.tokens = network, tokenizer

    @property
    def eot_token_id(self) -> int:
        return min(self.tokens.stop_tokens)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.tokens.encode(string, add_special=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: list[Pair], **_: Any) -> list[tuple[float, bool]]:
        most = self.network.architecture.context
        for (context, _text), before, after in requests:
            if len(before) + len(after) > most:
                raise InputError(f"a question of {len(before) + len(after)} tokens, more than {most}: {context[:60]!r}")
        distinct = sorted({(tuple(before), tuple(after)) for _, before, after in requests}, key=_length)
        found: dict[Tokens, tuple[float, bool]] = {}
        with torch.inference_mode():
            for some in grouped(distinct, [_length(pair) for pair in distinct], PASS_TOKENS):
                states = read_through(self.network, [torch.tensor([*before, *after])[:-1] for before, after in some])
                # What comes before the first token of the continuation predicts it.
                ends = {pair: state_TD[len(pair[0]) - 1 :] for pair, state_TD in zip(some, states, strict=True)}
                parts = grouped(some, [len(after) for _, after in some], HEAD_TOKENS)
                for part in track(parts, "scoring"):
                    logits = self.network.head(torch.cat([ends[pair] for pair in part]))
                    for pair, logits_AV in zip(part, logits.split([len(after) for _, after in part]), strict=True):
                        found[pair] = _likelihood(logits_AV, torch.tensor(pair[1]))
        return [found[tuple(before), tuple(after)] for _, before, after in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise InputError("a task that measures perplexity: the quality gate does that; choose multiple-choice tasks")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise InputError("a task that generates text, which would take days here: choose multiple-choice tasks")


def _likelihood(logits_AV: Tensor, wanted_A: Tensor) -> tuple[float, bool]:
    likely_A = logits_AV.double().log_softmax(dim=-1).gather(1, wanted_A[:, None])
    return float(likely_A.sum()), bool((logits_AV.argmax(dim=-1) == wanted_A).all())


def _length(pair: Tokens) -> int:
    return len(pair[0]) + len(pair[1])


def grouped(items: Sequence[Tokens], sizes: Sequence[int], most: int) -> list[list[Tokens]]:
    """In their order, in groups of at most `most` together; what is larger is a group by itself."""
    groups: list[list[Tokens]] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += size
    return groups


def answers(
    model: Scored, tasks: Sequence[str], manager: TaskManager, limit: int | None, metric: str
) -> dict[str, dict[int, bool]]:
    """{task: {question: answered rightly}}. Raises InputError if a task does not state the metric."""
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert results is not None
    found = {}
    for task, samples in results["samples"].items():
        if not all(metric in sample for sample in samples):
            raise InputError(f"task {task} does not state {metric!r} of its questions; see --metric")
        found[task] = {sample["doc_id"]: bool(sample[metric]) for sample in samples}
    return found


def only_right(one: Mapping[int, bool], other: Mapping[int, bool]) -> int:
    """Questions that `one` answers rightly and `other` does not. Raises InputError if they were not asked the same."""
    if one.keys() != other.keys():
        raise InputError(f"{len(one.keys() ^ other.keys())} questions were put to one model only; report this task")
    return sum(right and not other[question] for question, right in one.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each task, and JSON as its last line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.tasks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--config", choices=CONFIGS, default="embedded")
    parser.add_argument("--build", type=Path, help="build folder with checkpoint and int4 (default: build/CONFIG)")
    parser.add_argument("--tasks", required=True, help="the harness's names, comma-separated: arc_easy,hellaswag")
    parser.add_argument("--include", type=Path, help="folder with task files of your own")
    parser.add_argument("--metric", default="acc", help="right or wrong of a question: acc, acc_norm (default: acc)")
    parser.add_argument("--limit", type=int, help="questions of each task (default: all)")
    parser.add_argument("--p-min", type=float, default=0.01, help="chance below which int4 counts as worse (0.01)")
    options = parser.parse_args(arguments)
    quiet_libraries()
    build = options.build or ROOT / "build" / options.config
    try:
        return compare(build, options)
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2


def compare(build: Path, options: argparse.Namespace) -> int:
    """Writes reports/tasks.json; 1 if a task is worse."""
    tokenizer = Tokenizer.load(build / "int4")
    manager = TaskManager(include_path=options.include and str(options.include))
    tasks = options.tasks.split(",")
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise InputError(f"--tasks: the harness knows no {', '.join(unknown)}; lm-eval ls tasks lists them")
    say("the reference")
    with open_checkpoint(build / "tuned") as opened:
        network = float_network(opened, torch.float32, streamed=True)
        reference = answers(Scored(network, tokenizer), tasks, manager, options.limit, options.metric)
    say("int4, as served")
    network = quantized_network(Int4Folder(build / "int4"), as_served=True, streamed=True)
    quantized = answers(Scored(network, tokenizer), tasks, manager, options.limit, options.metric)
    checks, rows = [], {}
    for task, right in reference.items():
        other = quantized[task]
        lost, won = only_right(right, other), only_right(other, right)
        p = mcnemar(lost, won)
        rows[task] = {
            "questions": len(right),
            "reference": sum(right.values()) / len(right),
            "int4": sum(other.values()) / len(right),
            "only_reference_right": lost,
            "only_int4_right": won,
            "p_worse": p,
        }
        checks.append(Check(name=f"{task}: chance of as much loss", value=p, limit=options.p_min, bound="at least"))
        say(f"{task}: reference {rows[task]['reference']:.4f}, int4 {rows[task]['int4']:.4f}; {lost} lost, {won} won")
        say(f"  {checks[-1]}")
    (build / "reports").mkdir(exist_ok=True)
    facts = {"int4_manifest": manifest_digest(build / "int4"), "metric": options.metric, "tasks": rows}
    write_report(build / "reports/tasks.json", "tasks", checks, **facts)
    print(json.dumps(rows))
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
