"""How a model is quantized: the few decisions that set its size, speed and quality."""

from dataclasses import dataclass
from typing import Annotated, Literal

from model.fields import Checked, Range

Bits = Literal[4, 8, 16]
Scheme = Literal["int4-g32", "int4-channel"]
Method = Literal["search", "weighted-search", "gptq"]
Rotation = Literal["none", "hadamard"]


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """Recorded in the artifact's manifest, so that an artifact says how it was made."""

    scheme: Scheme
    """Symmetric int4 with one scale per 32 inputs (bf16), or one per output row (float32)."""
    embedding_bits: Bits
    """Width of the embedding table: gathered, never multiplied, so it costs memory and no time."""
    head_bits: Bits
    """Width of the output head: read whole for every token, so it costs speed."""
    method: Method = "search"
    """How the layers' int4 is found: the scales with the least error of weights; of products with calibration inputs,
    counting each input by its energy; or those scales, and roundings that make up for each other (`model.gptq`)."""
    rotation: Rotation = "none"
    """Whether the network is turned first, so that outliers are spread (`model.rotation`); unties a tied head."""
    calibration_tokens: Annotated[int, Range(256)] = 16384
    """Most tokens of the calibration text that are read, in whole windows."""
    search_steps: Annotated[int, Range(1, 64)] = 14
    """Candidate scales tried per group and sign; see `model.scale_search.search_scales`."""

    def group(self, inputs: int) -> int:
        """Inputs that share one scale in a row of `inputs`."""
        return 32 if self.scheme == "int4-g32" else inputs
