"""What a Llama is made of: the sizes and constants that config.json declares, checked once.

Everything downstream (equations, quantizer, programs, manifest) reads these fields and nothing else of
`config.json`, so a model this network would compute wrongly is refused here, by name.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of one Llama 2, 3 or 3.1 network."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int
    rope_theta: float
    norm_eps: float
    tied_head: bool
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"architecture: {name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise InputError(f"architecture: {self.heads} heads cannot share {self.kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise InputError(f"architecture: head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def qkv_rows(self) -> int:
        """Output rows of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a checkpoint of this architecture holds, by its Hugging Face name, with its shape, in order."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
        }
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            query_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
            shapes |= {
                prefix + "input_layernorm.weight": (self.hidden,),
                prefix + "self_attn.q_proj.weight": (query_rows, self.hidden),
                prefix + "self_attn.k_proj.weight": (kv_rows, self.hidden),
                prefix + "self_attn.v_proj.weight": (kv_rows, self.hidden),
                prefix + "self_attn.o_proj.weight": (self.hidden, query_rows),
                prefix + "post_attention_layernorm.weight": (self.hidden,),
                prefix + "mlp.gate_proj.weight": (self.mlp, self.hidden),
                prefix + "mlp.up_proj.weight": (self.mlp, self.hidden),
                prefix + "mlp.down_proj.weight": (self.hidden, self.mlp),
            }
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """The manifest's form of this architecture; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Architecture":
        scaling = fields["rope_scaling"]
        return cls(**{**fields, "rope_scaling": RopeScaling(**scaling) if scaling else None})

    @classmethod
    def from_config_json(cls, config: Mapping[str, Any], origin: str) -> "Architecture":
        """Reads a Hugging Face `config.json`; `origin` names it in errors. Raises InputError for any other network."""
        _refuse_other_networks(config, origin)
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                mlp=int(config["intermediate_size"]),
                vocab=int(config["vocab_size"]),
                context=int(config["max_position_embeddings"]),
                norm_eps=float(config["rms_norm_eps"]),
                tied_head=bool(config.get("tie_word_embeddings", False)),
                rope_theta=float(_rope(config).get("rope_theta", 10000.0)),
                rope_scaling=_rope_scaling(config, origin),
            )
        except KeyError as missing:
            raise InputError(f"{origin}: no field {missing}; a Llama config.json has it") from missing

    def to_config_json(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this architecture."""
        scaling = self.rope_scaling
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "max_position_embeddings": self.context,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None
            if scaling is None
            else {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            },
            "tie_word_embeddings": self.tied_head,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab,
        }


def _refuse_other_networks(config: Mapping[str, Any], origin: str) -> None:
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in expected.items():
        found = config.get(name, value)
        if found != value:
            raise InputError(
                f"{origin}: {name} is {found!r}, and only {value!r} is supported: choose a Llama 2, 3 or 3.1 model"
            )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """RoPE's fields: flat in older files, under `rope_parameters` in those of transformers 5."""
    return config.get("rope_parameters") or config


def _rope_scaling(config: Mapping[str, Any], origin: str) -> RopeScaling | None:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{origin}: rope type {kind!r} is not supported: only 'default' and 'llama3' are")
    return RopeScaling(
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_context=int(scaling["original_max_position_embeddings"]),
    )
