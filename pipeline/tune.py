"""Teaches the float model to speak as the persona does, from dialogues that the author wrote.

Supervised fine-tuning in few directions (LoRA, `pipeline.lora`): every step reads some dialogues, each after the
persona's prompt and what the prologue adds to it, and learns the replies alone. AdamW, a learning rate that rises over
the first tenth and falls to nothing; some dialogues are held out, and the step at which these are told best is kept.

What was learnt is an adapter beside the base's weights, which everyone who opens the folder merges into them. Once
somebody has copied it to `cache_data/stories/`, an adapter of these very dialogues, this base and these settings is
used instead of training; any other is named with what differs, and training begins. A run that was cut short goes on
at the last step that it kept, to the same bytes: they depend on nothing but the data, the configuration, the CPU and
its number of threads.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.artifact import file_digest, files_below, link_or_copy, read_json, write_json
from model.errors import InputError
from model.tokenizer import Tokenizer
from pipeline.adapter import Adapter
from pipeline.configs import TuneConfig
from pipeline.hub_checkpoint import ADAPTER, HUB, open_checkpoint
from pipeline.lora import LoraNetwork, batch_of
from pipeline.progress import say, track
from pipeline.stories import Persona, Told, digest, read_stories
from pipeline.verdict import Check, write_report

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""
KEPT_EVERY = 10
"""Steps after which the state is put on the disk."""
PATIENCE = 2
"""Looks at the held-out dialogues without a better one after which training ends."""
PROCEDURE = "1"
"""Of the training below. Raise it with every change of what a training gives: kept adapters then count no more."""


def run(config: TuneConfig, *paths: Path) -> list[Check]:
    """Writes the tuned checkpoint and the report of its training.

    `paths` begin with stories, persona, prologue and schemas if the config trains, or with a given adapter's folder;
    then come checkpoint, tuned checkpoint and report. The check fails if held-out dialogues are told worse than before.
    """
    *sources, checkpoint, tuned, report = paths
    _link_all(checkpoint, tuned)
    if not config.trains:
        if sources:
            return _given(sources[0], checkpoint, tuned, report)
        write_report(report, "tuning", [], tuned=False)
        return []
    stories, persona, prologue, schemas = sources
    speaker, tokenizer = Persona(persona, prologue, schemas), Tokenizer.load(checkpoint)
    told = [speaker.told(dialogue, tokenizer, config.longest_tokens) for dialogue in read_stories(stories, schemas)]
    if len(told) <= config.held_out:
        raise InputError(
            f"{stories}: {len(told)} dialogues, and tune.held_out = {config.held_out}: nothing is left to learn from; "
            "write more, or hold out fewer"
        )
    trained_on = _trained_on(config, checkpoint, told)
    adapter = Adapter.kept(stories / ADAPTER.name, trained_on)
    if adapter is None:
        with open_checkpoint(checkpoint) as opened:
            network = LoraNetwork(opened, config.rank, config.scale, config.seed)
            record = _Training(config, network, told, trained_on, tuned.with_name("training.safetensors")).run()
        adapter = Adapter(tensors=network.factors(), trained_on=trained_on, record=record)
        say(f"  to train no more until the dialogues change, copy {tuned.name}/{ADAPTER} of the build to {stories}")
    _keep(adapter, tuned)
    before, after = adapter.record["perplexity_before"], adapter.record["perplexity_after"]
    ratio = after / before
    checks = [Check(name="perplexity of held-out replies, tuned over base", value=ratio, limit=1, bound="at most")]
    write_report(report, "tuning", checks, tuned=True, adapter=adapter.digest, **adapter.record)
    return checks


def _given(folder: Path, checkpoint: Path, tuned: Path, report: Path) -> list[Check]:
    """Takes somebody's adapter as it is."""
    with open_checkpoint(checkpoint) as opened:
        adapter = Adapter.of_peft(folder, opened.architecture)
    _keep(adapter, tuned)
    write_report(report, "tuning", [], tuned=True, adapter=adapter.digest, given=folder.name)
    return []


def _keep(adapter: Adapter, tuned: Path) -> None:
    """Puts the adapter beside the weights, and its digest where the model's origin is told."""
    (tuned / ADAPTER).parent.mkdir(exist_ok=True)
    adapter.write(tuned / ADAPTER)
    facts = read_json(tuned / "source.json")
    (tuned / "source.json").unlink()  # a link: the fetched one stays as it is
    write_json(tuned / "source.json", {**facts, "adapter": adapter.digest})


def _link_all(checkpoint: Path, tuned: Path) -> None:
    shutil.rmtree(tuned, ignore_errors=True)  # of a run that was cut short
    for name in files_below(checkpoint):
        (tuned / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(checkpoint / name, tuned / name)


def _trained_on(config: TuneConfig, checkpoint: Path, told: Sequence[Told]) -> dict[str, str]:
    """What an adapter depends on, by name: the dialogues as they are read, the base, every setting, the procedure."""
    weights = [HUB] if (checkpoint / HUB).exists() else sorted(path.name for path in checkpoint.glob("*.safetensors"))
    settings = {field.name: json.dumps(getattr(config, field.name)) for field in fields(config)}
    return {
        "dialogues": digest(told),
        "base": " ".join(file_digest(checkpoint / name) for name in weights),
        "procedure": PROCEDURE,
        **{f"configuration {name}": value for name, value in settings.items() if name != "adapter"},
    }


class _Training:
    """From the first step, or the last that was kept, to the last."""

    def __init__(
        self,
        config: TuneConfig,
        network: LoraNetwork,
        told: Sequence[Told],
        trained_on: Mapping[str, str],
        state: Path,
    ) -> None:
        self._config, self._network, self._trained_on, self._state = config, network, trained_on, state
        order = random.Random(config.seed).sample(range(len(told)), len(told))
        self._held_out = [told[number] for number in sorted(order[: config.held_out])]
        self._taught = [told[number] for number in sorted(order[config.held_out :])]
        self._optimizer = torch.optim.AdamW(network.learned.values(), lr=config.learning_rate, weight_decay=0.0)
        self._best = _copied(network.learned)
        self._record: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Trains, leaves the best of what was learnt in the network, and returns how it went."""
        config = self._config
        done = self._resume()
        if not self._record:
            self._record = {
                "dialogues": len(self._taught),
                "held_out": len(self._held_out),
                "replies": sum(_replies(one) for one in self._taught),
                "curve": [{"step": 0, "held_out": self._evaluate()}],
            }
        if done:
            say(f"  {done} of {config.steps} steps are done")
        for step in track(range(done, config.steps), "training"):
            loss = self._step(step)
            if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
                self._record["curve"].append({"step": step + 1, "training": loss, "held_out": self._evaluate()})
                self._take_best()
            if self._record["curve"][-1]["step"] >= self._best_step + PATIENCE * config.evaluate_every:
                say(f"  no better since step {self._best_step}: enough")
                break
            if (step + 1) % KEPT_EVERY == 0:
                self._store(step + 1)
        self._network.learned.update(self._best)
        self._state.unlink(missing_ok=True)
        losses = {point["step"]: point["held_out"] for point in self._record["curve"]}
        self._record["best_step"] = self._best_step
        self._record["perplexity_before"] = round(math.exp(losses[0]), 4)
        self._record["perplexity_after"] = round(math.exp(losses[self._best_step]), 4)
        return self._record

    @property
    def _best_step(self) -> int:
        best: int = min(self._record["curve"], key=lambda point: point["held_out"])["step"]
        return best

    def _step(self, step: int) -> float:
        config = self._config
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * _share_of_rate(step, config.steps)
        self._optimizer.zero_grad()
        loss = self._network.loss(batch_of(self._drawn(step)))
        if not loss.isfinite():
            raise InputError(
                f"tune: the loss is {loss.item()} at step {step + 1}; lower tune.learning_rate = {config.learning_rate}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._network.learned.values(), 1.0)
        self._optimizer.step()
        return round(loss.item(), 6)

    def _drawn(self, step: int) -> list[Told]:
        """The dialogues of a step: every one once before any comes again."""
        size, count = self._config.dialogues_per_step, len(self._taught)
        drawn = []
        for place in range(step * size, (step + 1) * size):
            epoch, index = divmod(place, count)
            order = random.Random(f"{self._config.seed} {epoch}").sample(range(count), count)
            drawn.append(self._taught[order[index]])
        return drawn

    def _evaluate(self) -> float:
        """Nats per token of the held-out replies."""
        size, total, said = self._config.dialogues_per_step, 0.0, 0
        with torch.no_grad():
            for start in range(0, len(self._held_out), size):
                batch = batch_of(self._held_out[start : start + size])
                total += len(batch.targets_N) * self._network.loss(batch).item()
                said += len(batch.targets_N)
        return round(total / said, 6)

    def _take_best(self) -> None:
        if self._record["curve"][-1]["step"] == self._best_step:
            self._best = _copied(self._network.learned)

    def _store(self, step: int) -> None:
        """The state after so many steps, whole or not at all."""
        tensors = {f"best {name}": factor for name, factor in self._best.items()}
        for name, factor in self._network.learned.items():
            tensors |= {f"now {name}": factor.detach()}
            tensors |= {f"{moment} {name}": self._optimizer.state[factor][moment] for moment in MOMENTS}
        partial = self._state.with_suffix(".partial")
        facts = {"step": step, "record": self._record, "trained_on": self._trained_on}
        save_file(tensors, partial, {name: json.dumps(fact) for name, fact in facts.items()})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(self._state)

    def _resume(self) -> int:
        """Takes up what an earlier run has kept; how many steps that are."""
        if not self._state.exists():
            return 0
        try:
            with safe_open(self._state, framework="pt") as file:
                facts = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
        except SafetensorError as fault:
            say(f"  {self._state} is damaged ({fault}): training from the first step")
            return 0
        if json.loads(facts["trained_on"]) != self._trained_on:
            return 0
        step = int(facts["step"])
        self._record = json.loads(facts["record"])
        for name, factor in self._network.learned.items():
            factor.data.copy_(tensors[f"now {name}"])
            moments = {moment: tensors[f"{moment} {name}"] for moment in MOMENTS}
            self._optimizer.state[factor] = {"step": torch.tensor(float(step)), **moments}
        self._best = {name: tensors[f"best {name}"] for name in self._network.learned}
        return step


MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of every factor."""


def _copied(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: factor.detach().clone() for name, factor in factors.items()}


def _replies(told: Told) -> int:
    return sum(1 for before, own in zip([False, *told.own], told.own, strict=False) if own and not before)


def _share_of_rate(step: int, steps: int) -> float:
    """Of the learning rate: rises in a line, falls as a cosine."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
