"""Mixtures of experts made from nothing, in the layout of Qwen3-MoE: plain `transformers` loads what comes of them.

RMSNorm, rotary positions, grouped-query attention with norms of queries and keys, and in each layer SwiGLU experts behind
an expert router, which sends each token to the likeliest ones. No token is dropped. The head is the embedding.

One with a shared expert has the layout of Qwen3-Next instead, with ordinary attention in all layers: the stock architecture that has
all of this, an expert router of the same kind, and a shared expert. What it has besides are a gate on that expert, one on what
attention gives, and positions that turn a quarter of each head.

Shapes: V words, D width, L layers, H heads of C channels, G heads of keys and values, N experts of width E.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nightschool.config.mixtures import CUSTOM, DEFAULT_ACTIVE_EXPERTS, MIXTURES, NEEDED_OF_CUSTOM, Mixture
from nightschool.errors import ModelError

# Products of groups want rows of 16 bytes, which in 16-bit formats are eight numbers. The largest preset's count moves by
# 1.5 % with each such step of the width, so it ends within 0.75 % of its name.
WIDTH_STEP = 8


def mixture_fields(name: str, vocab_size: int, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Qwen3-MoE configuration, or of Qwen3-Next with a shared expert: those of a preset, where `shape` does not say otherwise.

    Experts are as wide as makes the preset, as it is, have the parameters that it is named after with this vocabulary.
    More experts than the preset's are as wide as those, so the model grows; by a shared expert, too.

    Args:
        name: One of `MIXTURES`, or `CUSTOM`.
        vocab_size: Rows of the embedding.
        shape: What the recipe's `shape` gives, by its names.

    Raises:
        ModelError: If a custom one lacks a field, or no such model can be.
    """
    if name == CUSTOM:
        missing = [field for field in NEEDED_OF_CUSTOM if field not in shape]
        if missing:
            raise ModelError(
                f"base: new:{CUSTOM} has no shape of its own, and {', '.join(f'shape.{field}' for field in missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not written. Write all of "
                f"{', '.join(f'shape.{field}' for field in NEEDED_OF_CUSTOM)}, or take a preset: {', '.join(MIXTURES)}."
            )
        preset = Mixture(shape["hidden_size"], shape["num_hidden_layers"], shape["num_experts"])
    else:
        preset = MIXTURES[name]
    if "intermediate_size" in shape:
        raise ModelError(
            f"shape.intermediate_size is the width of dense layers, and base: new:{name} has none. "
            "Write shape.expert_size, the width of one expert."
        )
    width = int(shape.get("hidden_size", preset.hidden_size))
    active = int(shape.get("num_active_experts", DEFAULT_ACTIVE_EXPERTS))
    expert_size = shape.get("expert_size") or _expert_size(name, preset, vocab_size, active)
    num_layers = int(shape.get("num_hidden_layers", preset.num_layers))
    fields = {
        "model_type": "qwen3_moe",
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_experts": shape.get("num_experts", preset.num_experts),
        "num_experts_per_tok": active,
        "moe_intermediate_size": expert_size,
        "intermediate_size": expert_size,  # of dense layers, of which there are none
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": preset.context_tokens,
    } | _heads(width, preset.head_dim, shape)
    if "shared_expert_size" in shape:
        fields |= {"model_type": "qwen3_next", "layer_types": ["full_attention"] * num_layers}
    return fields


def _heads(width: int, head_dim: int, shape: Mapping[str, Any]) -> dict[str, int]:
    """Heads of attention, a quarter as many of keys and values where that is a whole number."""
    head_dim = int(shape.get("head_dim", head_dim))
    heads = shape.get("num_attention_heads")
    if heads is None and width % head_dim:
        raise ModelError(
            f"shape.hidden_size is {width}, and heads of {head_dim} channels do not divide it. Take a multiple of "
            f"{head_dim}, or write shape.num_attention_heads."
        )
    heads = int(heads or width // head_dim)
    groups = int(shape.get("num_key_value_heads") or (heads if heads % 4 else heads // 4))
    if heads % groups:
        raise ModelError(
            f"shape.num_key_value_heads is {groups}, and does not divide the {heads} heads of attention that share them. "
            "Write a divisor."
        )
    return {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim}


def _expert_size(name: str, preset: Mixture, vocab_size: int, active: int) -> int:
    """The width of an expert that brings the preset, as it is, to its number of parameters; a multiple of `WIDTH_STEP`."""
    if preset.expert_size is not None:
        return preset.expert_size
    d, layers = preset.hidden_size, preset.num_layers
    if preset.parameters is None:
        # The active ones together are as wide as a dense layer's feed-forward part: 8/3 of the width.
        wanted = 8 * d / 3 / active
    else:
        heads = _heads(d, preset.head_dim, {})
        attention = 2 * d * preset.head_dim * (heads["num_attention_heads"] + heads["num_key_value_heads"])
        norms = 2 * preset.head_dim + 2 * d
        dense = d * vocab_size + d + layers * (attention + norms + d * preset.num_experts)
        wanted = (preset.parameters - dense) / (3 * d * layers * preset.num_experts)
    size = WIDTH_STEP * round(wanted / WIDTH_STEP)
    if size < WIDTH_STEP:
        raise ModelError(
            f"With {vocab_size:,} words nothing of {name} is left for its experts: the embedding alone has "
            f"{vocab_size * d:,} parameters. Take a larger preset, or a smaller vocabulary."
        )
    return size
