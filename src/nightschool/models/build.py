"""Models made from nothing: `new:<preset>`.

Sizes are told by counting, never by name: `nightschool.models.cost.count_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nightschool.config.mixtures import CUSTOM, MIXTURES
from nightschool.errors import ModelError
from nightschool.models.cost import expert_counts
from nightschool.models.mixture import mixture_fields

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2, "head_dim": 16}

# Parallel residual, rotation of a quarter of each head, untied head, no dropout; the feed-forward part is four times as wide.
_NEOX: dict[str, Any] = {
    "model_type": "gpt_neox", "max_position_embeddings": 2048, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
    }, "use_parallel_residual": True, "hidden_act": "gelu", "tie_word_embeddings": False, "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}  # fmt: skip

# `tiny` is the model of the demo: about a million parameters with a vocabulary of 2,048, fast enough to learn on a CPU
# and large enough to keep a few hundred facts. The `tiny-<architecture>` ones are for tests of every architecture.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "small": {
        "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "neox-tiny": _NEOX | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 1024},
    "neox-30m": _NEOX | {"hidden_size": 512, "num_hidden_layers": 7, "num_attention_heads": 8},
    "neox-70m": _NEOX | {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
    "neox-160m": _NEOX | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "neox-410m": _NEOX | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "neox-1.0b": _NEOX | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16},
    "neox-1.2b": _NEOX | {"hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16},
    "neox-1.4b": _NEOX | {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16},
    "tiny-gpt-neox": _SMALL | {"model_type": "gpt_neox", "tie_word_embeddings": False},
    "tiny-llama": _GROUPED | {"model_type": "llama", "tie_word_embeddings": False},
    "tiny-qwen3": _GROUPED | {"model_type": "qwen3", "tie_word_embeddings": True},
    "tiny-qwen3-moe": _GROUPED | {
        "model_type": "qwen3_moe", "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1, "norm_topk_prob": True, "tie_word_embeddings": False,
    },
    "tiny-mixtral": _GROUPED | {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

# What an architecture calls the fields of a recipe's `shape` that have other names there.
_OWN_NAMES: Mapping[str, Mapping[str, str]] = {
    "qwen3_moe": {"num_active_experts": "num_experts_per_tok", "expert_size": "moe_intermediate_size"},
    "qwen3_next": {
        "num_active_experts": "num_experts_per_tok",
        "expert_size": "moe_intermediate_size",
        "shared_expert_size": "shared_expert_intermediate_size",
    },
    "mixtral": {"num_experts": "num_local_experts", "num_active_experts": "num_experts_per_tok"},
}


def build_config(
    preset: str | PretrainedConfig | Mapping[str, Any],
    vocab_size: int,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    shape: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """The configuration of a preset (with or without `new:`), of plain fields, or a copy of a configuration.

    `shape` holds fields that differ from the preset's.

    Raises:
        ModelError: If there is no such preset, or no model of this shape.
    """
    special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    if isinstance(preset, PretrainedConfig):
        return type(preset).from_dict(preset.to_dict() | {"vocab_size": vocab_size} | special)
    if isinstance(preset, str):
        name = preset.removeprefix("new:")
        if name in (*MIXTURES, CUSTOM):
            preset = mixture_fields(name, vocab_size, shape or {})
        elif name in PRESETS:
            preset = PRESETS[name]
        else:
            raise ModelError(f"There is no preset {name!r}. Presets are {', '.join([*PRESETS, *MIXTURES, CUSTOM])}.")
    own_names = _OWN_NAMES.get(preset["model_type"], {})
    shape = {own_names.get(name, name): value for name, value in (shape or {}).items()}
    fields = dict(preset) | shape | {"vocab_size": vocab_size} | special
    if fields["model_type"] == "gpt_neox":
        fields.setdefault("intermediate_size", 4 * fields["hidden_size"])
    model_type = fields.pop("model_type")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, ValueError) as error:
        told = ", ".join(f"{name}: {value}" for name, value in shape.items())
        why = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ModelError(f"A {model_type} model cannot have the shape {told or 'of its preset'}: {why}") from None
    known = {*type(config)().to_dict(), *type(config).attribute_map, *preset}
    unknown = [name for name in shape if name not in known]
    if unknown:
        raise ModelError(
            f"shape: {', '.join(unknown)} is not a field of a {config.model_type} model. "
            "Write one of its configuration, such as num_hidden_layers."
        )
    counts = expert_counts(config)
    if counts is not None and counts.active > counts.experts:
        raise ModelError(
            f"shape.num_active_experts is {counts.active}, and there are {counts.experts} experts in a layer. "
            "Write fewer active ones, or a larger shape.num_experts."
        )
    return config


def build_model(
    preset: str | PretrainedConfig | Mapping[str, Any],
    vocab_size: int,
    seed: int,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    shape: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A fresh fp32 model on the CPU; the same seed gives the same weights, and the global generator is left as it was.

    Raises:
        ModelError: If there is no such preset.
    """
    config = build_config(
        preset, vocab_size, bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, shape=shape
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=torch.float32))  # type: ignore[no-untyped-call]
