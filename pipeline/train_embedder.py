"""Fine-tunes the sentence embedder on the author's phrasings, and away from the questions that no answer fits.

Out of the box MiniLM puts "What are you not capable of?" nearer to "What are you capable of?" than most paraphrases
are. Here every step draws some intents, in clusters of those that are hardest to tell apart, with a few phrasings
each, near misses of theirs, and out-of-domain questions. The supervised contrastive loss (Khosla et al. 2020, eq. 2)
pulls phrasings of one intent together, away from all else; a contrast question is a class of its own that pulls
nothing. The word embeddings stay as they are, so that words which no author used keep their places.

What training changed is kept as a low-rank adapter, in the output and, once somebody has copied it there, in
`cache_data/adapters/`. An adapter of these very phrasings, this base and these settings is used instead of training,
which takes minutes; any other is named with what differs, and training begins. Either way the embedder is the base
with the adapter, to the bit. What a training gives depends on nothing but the data, the configuration, the CPU and its
number of threads.
"""

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.artifact import file_digest, write_json
from model.errors import InputError
from pipeline.adapter import Adapter
from pipeline.configs import TrainEmbedderConfig
from pipeline.licences import copy_licences
from pipeline.progress import say, track
from pipeline.sources import locate

CLUSTER = 3
"""Intents that are drawn together: one at random and those nearest to it."""
REMAPPED_EVERY = 64
"""Steps after which the distances between intents are measured again."""
BUCKETS = 4
"""A step's texts run in this many batches of similar length, so that little is computed on padding."""
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""
LONGEST = 64
"""Tokens of a text that training reads."""
ADAPTER = "embedder.safetensors"
"""Name of the adapter, in the output and among those that are kept."""
PROCEDURE = "1"
"""Of the training below. Raise it with every change of what a training gives: kept adapters then count no more."""


def run(config: TrainEmbedderConfig, *paths: Path) -> None:
    """Writes a sentence-transformers folder, with the adapter in it.

    `paths` ends with the folder of kept adapters, the training set and the folder to write; a folder source stands
    first, as the config says.
    """
    *_, kept, training_set, trained = paths
    source = locate(config.source, config.sha256)
    model = _base_model(config, source)
    network: Any = model[0].auto_model
    base = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    trained_on = _trained_on(config, source, training_set)
    adapter = Adapter.kept(kept / ADAPTER, trained_on)
    if adapter is None:
        _train(model, config, _Lessons(config, json.loads(training_set.read_text(encoding="utf-8"))))
        adapter = Adapter.between(base, network.state_dict(), config.adapter_rank, trained_on)
        say(f"  to train no more until the phrasings change, copy trained/{ADAPTER} of the build folder to {kept}")
    network.load_state_dict(adapter.merged(base))
    model.save(str(trained), create_model_card=False)
    adapter.write(trained / ADAPTER)
    copy_licences(source, trained)
    write_json(trained / "source.json", {name: getattr(config, name) for name in ("source", "model_id", "licence")})


def _base_model(config: TrainEmbedderConfig, source: Path) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(config.seed)
    model = SentenceTransformer(str(source), device="cpu")
    network: Any = model[0].auto_model
    if not 1 <= config.layers <= len(network.encoder.layer):
        raise InputError(
            f"train_embedder.layers = {config.layers}: {config.source} has {len(network.encoder.layer)}; choose fewer"
        )
    network.encoder.layer = network.encoder.layer[: config.layers]
    network.config.num_hidden_layers = config.layers
    network.embeddings.requires_grad_(False)
    return model


def _trained_on(config: TrainEmbedderConfig, source: Path, training_set: Path) -> dict[str, str]:
    """What an adapter depends on, by name: the data, the base, every setting, and the procedure."""
    settings = {field.name: json.dumps(getattr(config, field.name)) for field in fields(config)}
    places = {"source", "sha256"}  # where the base lies; its content is what counts
    return {
        "training set": file_digest(training_set),
        "base": file_digest(source / "model.safetensors"),
        "procedure": PROCEDURE,
        **{f"configuration {name}": value for name, value in settings.items() if name not in places},
    }


class _Lessons:
    """Draws the texts of each step, with the class of each."""

    def __init__(self, config: TrainEmbedderConfig, texts: Mapping[str, Any]) -> None:
        self._config = config
        self._random = random.Random(config.seed)
        self.phrasings: list[list[str]] = texts["phrasings"]
        self._near_misses: list[list[str]] = texts["near_misses"]
        self._out_of_domain: list[str] = texts["out_of_domain"]

    def draw(self, neighbours: Tensor) -> tuple[list[str], Tensor]:
        """Texts and their classes, phrasings first; `neighbours` [intents, CLUSTER] starts with each intent itself."""
        texts: list[str] = []
        classes: list[int] = []
        intents = self._intents(neighbours)
        for intent in intents:
            drawn = self._some(self.phrasings[intent], self._config.phrasings_per_intent)
            texts += drawn
            classes += [intent] * len(drawn)
        for intent in intents:
            texts += self._some(self._near_misses[intent], self._config.near_misses_per_intent)
        texts += self._some(self._out_of_domain, self._config.out_of_domain_per_step)
        alone = range(len(self.phrasings), len(self.phrasings) + len(texts) - len(classes))
        return texts, torch.tensor([*classes, *alone])

    def sample(self, count: int) -> list[list[str]]:
        """Some phrasings of every intent."""
        return [self._some(phrasings, count) for phrasings in self.phrasings]

    def _intents(self, neighbours: Tensor) -> list[int]:
        wanted = min(self._config.intents_per_step, len(self.phrasings))
        chosen: dict[int, None] = {}
        while len(chosen) < wanted:
            chosen |= dict.fromkeys(neighbours[self._random.randrange(len(neighbours))].tolist())
        return list(chosen)[:wanted]

    def _some(self, texts: Sequence[str], count: int) -> list[str]:
        return self._random.sample(texts, min(count, len(texts)))


def _train(model: Any, config: TrainEmbedderConfig, lessons: _Lessons) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=WARM_UP
    )
    for step in track(range(config.steps), "training"):
        if step % REMAPPED_EVERY == 0:
            neighbours = _neighbours(model, lessons)
        texts, classes = lessons.draw(neighbours)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            vectors = _embed(model, texts)
        loss = contrastive_loss(vectors.float(), classes, len(lessons.phrasings), config.temperature)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def contrastive_loss(vectors: Tensor, classes: Tensor, intents: int, temperature: float) -> Tensor:
    """Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2, over the anchors whose class is below `intents`.

    `vectors` [N, D] are unit vectors, `classes` [N]. An anchor alone in its class has nothing to be pulled to, and
    is left out of the mean.
    """
    anchors = classes < intents
    likeness = (vectors[anchors] @ vectors.T) / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool)[anchors]
    same = (classes[anchors][:, None] == classes[None]) & ~itself
    log_share = likeness.masked_fill(itself, -torch.inf).log_softmax(dim=1).masked_fill(itself, 0)
    paired = same.any(dim=1)
    loss: Tensor = -((log_share * same).sum(dim=1)[paired] / same.sum(dim=1)[paired]).mean()
    return loss


def _embed(model: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors [N, D] of the texts, in their order."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    parts = [part.tolist() for part in torch.tensor(order).chunk(BUCKETS)]
    vectors = torch.cat([_vectors(model, [texts[index] for index in part]) for part in parts])
    return vectors[torch.tensor(order).argsort()]


def _vectors(model: Any, texts: list[str]) -> Tensor:
    tokens = model.tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    vectors: Tensor = model(dict(tokens))["sentence_embedding"]
    return torch.nn.functional.normalize(vectors, dim=-1)


def _neighbours(model: Any, lessons: _Lessons) -> Tensor:
    """[intents, CLUSTER]: each intent and those whose phrasings lie nearest to its own."""
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        centres = torch.stack([_embed(model, texts).float().mean(dim=0) for texts in lessons.sample(6)])
    centres = torch.nn.functional.normalize(centres, dim=-1)
    return (centres @ centres.T).topk(min(CLUSTER, len(centres)), dim=1).indices
