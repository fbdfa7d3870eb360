"""A build for Graviton 2, made where /sys is and served where it is not: by AWS Lambda's handler, on Neoverse N1.

    tests/arm64/run.sh max python3 -m tests.arm64.lambda_function build >build/arm64/function.tar
    tests/arm64/run.sh --without-sys neoverse-n1 python3 -m tests.arm64.lambda_function answer <build/arm64/function.tar

Without /sys, as on Lambda, torch finds no Arm features: what is packed there is the slow reference. The build has to
bring KleidiAI's packing with it, and to give the text that it gave where it was made. Its model, embedder and cache are
tiny, since compiling is slow under emulation. On other machines the same goes for the oldest family of theirs.
"""

import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

import pipeline.export
from model.cpu import family
from model.engine import Engine
from model.int4_linear import kernel
from model.recipe import Recipe
from model.sampling import Sampling
from pipeline import build_cache, export_embedder
from pipeline.configs import ExportConfig, embedded
from serving.embedder import Embedder
from tests.conftest import ROOT, TINY
from tests.lambda_ import events
from tests.lambda_.management import managing
from tests.model.conftest import write_int4, write_random_model

CONTEXT, TOKENS = 512, 24
QUESTION, STORY = "Where does the road lead?", "I walk on."
POSSIBLE = Path("/sys/devices/system/cpu/possible")
OLDEST = {"aarch64": "aarch64", "x86_64": "x86-64-v3"}


def build() -> None:
    """The build folder, and what it answers here, as a tar archive on standard output."""
    assert POSSIBLE.exists(), "packing needs /sys"
    oldest = OLDEST[platform.machine()]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_random_model(folder / "model", replace(TINY, tied_head=True, context=CONTEXT))
        int4 = write_int4(model, Recipe(scheme="int4-g32", embedding_bits=8, head_bits=8), folder / "float")
        made = folder / "build"
        made.mkdir()
        pipeline.export.run(ExportConfig(context_tokens=CONTEXT, cpu=oldest), int4, made / "engine")
        write_cache(write_embedder(folder / "trained"), folder / "data", made, oldest)
        engine = Engine.load(made / "engine")
        prompt = engine.tokenizer.encode_chat(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": STORY}]
        )
        text = "".join(piece.text for piece in engine.generate(prompt, Sampling(temperature=0, max_tokens=TOKENS)))
        vector = Embedder(made / "embedder").embed(QUESTION).tolist()
        (folder / "expected.json").write_text(json.dumps({"made on": family(), "text": text, "vector": vector}))
        with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
            archive.add(made, "build")
            archive.add(folder / "expected.json", "expected.json")


def write_embedder(folder: Path) -> Path:
    """A sentence-transformers model of one random layer, on words and letters."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    bert = folder / "bert"
    bert.mkdir(parents=True)
    letters = [chr(letter) for letter in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(bert)
    size = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    BertModel(size).save_pretrained(bert)
    layer = Transformer(str(bert), max_seq_length=128)
    SentenceTransformer(modules=[layer, Pooling(64, pooling_mode="mean")], device="cpu").save(str(folder / "whole"))
    (folder / "whole/source.json").write_text(json.dumps({"model_id": "tiny", "licence": "none"}))
    return folder / "whole"


def write_cache(trained: Path, data: Path, made: Path, cpu: str) -> None:
    """Embedder and cache folders of one intent."""
    (data / "entries").mkdir(parents=True)
    (data / "contrast").mkdir()
    entry = {"id": "road", "answer": "To the city.", "phrasings": [QUESTION, *(f"Road {n}?" for n in range(8))]}
    documents: dict[str, object] = {
        "entries/road.yaml": [entry],
        "contrast/near_misses.yaml": [{"question": "Whose road is it?", "kind": "question-type", "near": "road"}],
        "contrast/out_of_domain.yaml": [{"question": "Good morning!", "kind": "chit-chat"}],
        "persona.yaml": {"name": "Tiny", "greeting": "Hello.", "system_prompt": "Be brief."},
        "prologue.yaml": {"title": "A road", "scenes": [{"id": "start", "text": "You wake up."}]},
    }
    for name, content in documents.items():
        (data / name).write_text(yaml.safe_dump(content))
    config = embedded()
    export_embedder.run(replace(config.export_embedder, cpu=cpu), trained, made / "embedder")
    build_cache.run(
        config.build_cache,
        entries=data / "entries",
        contrast=data / "contrast",
        persona=data / "persona.yaml",
        prologue=data / "prologue.yaml",
        schemas=ROOT / "cache_data/schema",
        embedder=made / "embedder",
        cache=made / "cache",
    )


class Invocation:
    """Lambda's context."""

    def get_remaining_time_in_millis(self) -> int:
        return 900_000


def answer() -> None:
    """Serves the archive on standard input through Lambda's handler, and compares."""
    with tempfile.TemporaryDirectory() as scratch, managing() as management:
        with tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read())) as archive:
            archive.extractall(scratch)  # our own archive; Debian's Python 3.11.2 knows no filter
        expected = json.loads((Path(scratch) / "expected.json").read_text())
        os.environ |= {
            "EMERALD_BUILD": f"{scratch}/build",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "example",
            "AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI": management.url,
        }
        check_the_trap()
        from serving.lambda_handler import handler

        def asked(event: events.Event) -> list[dict[str, Any]]:
            before = len(management.frames["arm"])
            assert handler(event, Invocation()) == {"statusCode": 200}
            return management.received("arm")[before:]

        assert handler(events.websocket("$connect", "arm", headers={}), Invocation()) == {"statusCode": 200}
        start = time.monotonic()
        shown = asked(events.prologue("arm"))
        assert [shown[0]["type"], shown[1]["type"], shown[-1]["type"]] == ["prologue", "scene", "ready"], shown
        hit = asked(events.chat("arm", QUESTION))
        assert (hit[0]["entry"], hit[-1]["type"]) == ("road", "done"), hit
        told = asked(events.chat("arm", STORY, max_tokens=TOKENS, emerald={"cache": False}))
        chunks = [frame["data"]["choices"][0]["delta"].get("content", "") for frame in told if frame["type"] == "chunk"]
        assert "".join(chunks) == expected["text"], ("".join(chunks), expected["text"])
        found = Embedder(Path(scratch) / "build/embedder").embed(QUESTION)
        cosine = float(found @ torch.tensor(expected["vector"]).numpy())
        assert cosine > 0.99999, cosine
        assert management.faults == []
        manifest = json.loads((Path(scratch) / "build/engine/manifest.json").read_text())
        packing, seconds = manifest["packing"], time.monotonic() - start
    place = "with /sys" if POSSIBLE.exists() else "without /sys"
    print(
        f"made on {expected['made on']}, served on {family()} {place} in {seconds:.0f} s: {packing} packing, "
        f"{len(expected['text'])} characters as they were there, embedder's cosine {cosine:.7f}"
    )


def check_the_trap() -> None:
    """That this place is as Lambda is: torch says nothing and packs the slow reference here."""
    if kernel() == "kleidiai":
        assert not POSSIBLE.exists(), "start it with --without-sys"
        values, scales = torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32, 2, dtype=torch.bfloat16)
        packed = torch.ops.aten._dyn_quant_pack_4bit_weight(values, scales, None, 32, 64, 32)
        assert packed.dtype == torch.float32, "torch reached KleidiAI: this is no stand-in for Lambda any more"


if __name__ == "__main__":
    {"build": build, "answer": answer}[sys.argv[1]]()
