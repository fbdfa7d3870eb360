"""What tests share: the tree's root and small real models, made once per session."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model.architecture import Architecture, RopeScaling

ROOT = Path(__file__).resolve().parent.parent

TINY = Architecture(
    layers=2,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp=256,
    vocab=512,
    context=256,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tied_head=False,
)
LLAMA31_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)


def write_tiny_model(folder: Path, architecture: Architecture = TINY, seed: int = 0) -> Path:
    """A Hugging Face-style folder of random bf16 weights with a byte-level tokenizer and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape, generator=random) * 0.05).to(torch.bfloat16)
        for name, shape in architecture.tensor_shapes().items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**architecture.to_config_json(), "eos_token_id": 1}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|begin|>", "<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|begin|>{{ message['role'] }}: {{ message['content'] }}<|end|>{% endfor %}"
    )
    settings = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama as a folder source; do not write to it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def embedded_build() -> Path:
    """build/embedded with engine, embedder, cache and certificate; only what is out of date is built."""
    subprocess.run([sys.executable, "-m", "pipeline", "run", "export", "certify_cache"], cwd=ROOT, check=True)
    return ROOT / "build/embedded"
