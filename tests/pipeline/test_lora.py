"""A network that learns in few directions, against transformers' Llama with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model.checkpoint import SafetensorsCheckpoint
from pipeline.adapter import DOWN, UP, Adapted, Adapter
from pipeline.lora import PARTS, LoraNetwork, batch_of

RANK, SCALE = 4, 2.0
Dialogue = tuple[list[int], list[bool]]


def dialogue(length: int, own: range, seed: int) -> Dialogue:
    """Random tokens after a prefix of ten that all dialogues share."""
    tokens = torch.randint(2, 258, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*range(2, 12), *tokens[10:]], [place in own for place in range(length)]


DIALOGUES = [dialogue(40, range(20, 40), 1), dialogue(64, range(30, 50), 2), dialogue(25, range(15, 20), 3)]


@pytest.fixture
def network(tiny_model: Path) -> LoraNetwork:
    """With every factor at random, where a training would begin with half of them at zero."""
    network = LoraNetwork(SafetensorsCheckpoint(tiny_model), RANK, SCALE, seed=1)
    for number, factor in enumerate(network.learned.values()):
        noise = torch.randn(factor.shape, generator=torch.Generator().manual_seed(number))
        factor.data.copy_(0.05 * noise)
    return network


def reference(tiny_model: Path, network: LoraNetwork) -> Any:
    """transformers' own, with the factors merged into its weights."""
    llama: Any = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in llama.named_parameters():
            if name + UP in network.learned:
                weight += SCALE * network.learned[name + UP] @ network.learned[name + DOWN]
    return llama


def mean_loss(llama: Any, dialogues: list[Dialogue]) -> Tensor:
    """Over the tokens that are the model's own, each dialogue computed alone."""
    losses = []
    for tokens, own in dialogues:
        logits = llama(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
        losses += [-logits[place - 1, tokens[place]] for place, mine in enumerate(own) if mine]
    return torch.stack(losses).mean()


def test_the_loss_of_packed_dialogues_is_that_of_each_alone(tiny_model: Path, network: LoraNetwork) -> None:
    expected = mean_loss(reference(tiny_model, network), DIALOGUES)
    batch = batch_of(DIALOGUES)
    assert batch.lengths == (10, 30, 54, 15)
    assert network.loss(batch).item() == pytest.approx(expected.item(), rel=2e-3)  # products in bf16


def test_dialogues_that_share_nothing_are_packed_as_well(tiny_model: Path, network: LoraNetwork) -> None:
    apart: list[Dialogue] = [([token + shift for token in DIALOGUES[0][0]], DIALOGUES[0][1]) for shift in (0, 1)]
    assert batch_of(apart).lengths[0] == 0
    expected = mean_loss(reference(tiny_model, network), apart)
    assert network.loss(batch_of(apart)).item() == pytest.approx(expected.item(), rel=2e-3)


def test_gradients_are_those_of_the_merged_weights(tiny_model: Path, network: LoraNetwork) -> None:
    llama = reference(tiny_model, network)
    mean_loss(llama, DIALOGUES).backward()
    network.loss(batch_of(DIALOGUES)).backward()
    weights = dict(llama.named_parameters())
    for part in PARTS:
        name = f"model.layers.1.{part}.weight"
        up, down = network.learned[name + UP], network.learned[name + DOWN]
        for found, expected in (
            (up.grad, SCALE * weights[name].grad @ down.detach().T),
            (down.grad, SCALE * up.detach().T @ weights[name].grad),
        ):
            assert found is not None
            assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.995
            assert found.norm().item() == pytest.approx(expected.norm().item(), rel=0.03)


def test_training_begins_with_the_base_and_the_adapter_is_what_was_learnt(
    tiny_model: Path, network: LoraNetwork
) -> None:
    checkpoint = SafetensorsCheckpoint(tiny_model)
    untouched = LoraNetwork(checkpoint, RANK, SCALE, seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    adapter = Adapter(tensors=untouched.factors(), trained_on={})
    assert torch.equal(Adapted(checkpoint, adapter).tensor(name), checkpoint.tensor(name))
    learnt = Adapted(checkpoint, Adapter(tensors=network.factors(), trained_on={}))
    expected = checkpoint.tensor(name).float() + SCALE * network.learned[name + UP] @ network.learned[name + DOWN]
    torch.testing.assert_close(learnt.tensor(name).float(), expected.detach(), rtol=0.01, atol=1e-3)
    rows = slice(3, 9)
    assert torch.equal(learnt.tensor(name, rows), learnt.tensor(name)[rows])
