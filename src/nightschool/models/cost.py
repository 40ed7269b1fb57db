"""What a model costs before it is trained: parameters, bytes, floating-point operations.

Estimates for the plan. The bytes are those of tensors; the interpreter and its libraries (about 0.5 GB) are not in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nightschool.layers.expert_streaming.experts import StreamedExperts
from nightschool.layers.expert_streaming.store import ExpertStore
from nightschool.layers.forward import causal_lm
from nightschool.layers.loss import chunk_tokens_for
from nightschool.models.quantize import num_elements, scales, stored_bytes
from nightschool.models.quantized_experts import packed_weights

# Tensors that a decoder layer keeps for its backward pass, in units of tokens × hidden size: three for each norm (also
# those of queries and keys), rotated queries and keys, values, attention's output. The feed-forward part is counted by
# its own width: gate, up, activation, product. Measured on 6 layers of 256: within 30 % of the peak of the process.
_KEPT_PER_LAYER_HIDDEN = 15
_KEPT_PER_LAYER_FEED_FORWARD = 4

_KINDS = ("embedding", "head", "attention", "feed_forward", "experts", "norms", "adapters", "other")


@dataclass(frozen=True)
class ParameterCount:
    """Elements by kind; tied weights once. `active`: those that one token passes through (fewer in a mixture)."""

    total: int
    trainable: int
    embedding: int
    head: int
    attention: int
    feed_forward: int
    experts: int
    norms: int
    adapters: int
    other: int
    active: int


@dataclass(frozen=True)
class TrainingBytes:
    """Expected bytes of tensors at the peak of a training step, and of publishing afterwards.

    `publishing` is what publishing takes beside the parameters: what was written is read again, which is all weights, or
    an adapter. Gradients, moments and activations are gone by then.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    publishing: int

    @property
    def total(self) -> int:
        """The larger of the two peaks."""
        step = self.gradients + self.optimizer + self.activations + self.logits
        return self.parameters + max(step, self.publishing)


@dataclass(frozen=True)
class ExpertCounts:
    """Experts in each layer that has some, and how many of them a token passes through."""

    experts: int
    active: int


def expert_counts(config: Any) -> ExpertCounts | None:
    """The experts of a configuration of transformers; None where there are none."""
    config = config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    active = getattr(config, "num_experts_per_tok", None)
    return ExpertCounts(int(experts), int(active)) if experts and active else None


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count `model` as it is, by `numel()`. Never from its name or configuration."""
    inner = causal_lm(model)
    kinds = dict.fromkeys(_KINDS, 0)
    for _, parameter, kind in _by_kind(model):
        kinds[kind] += num_elements(parameter)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for module in _streamed(model):
        kinds["experts"] += module.num_elements
        trainable += module.num_elements if module.stream.learns else 0
    total = sum(kinds.values())
    idle = round(kinds["experts"] * (1 - _active_share(inner.config)))
    return ParameterCount(total=total, trainable=trainable, active=total - idle, **kinds)


def _streamed(model: nn.Module) -> Iterator[StreamedExperts]:
    """The experts that are no parameters of the model."""
    return (module for module in model.modules() if isinstance(module, StreamedExperts))


def stored_bytes_by_kind(model: nn.Module) -> dict[str, int]:
    """Bytes of the parameters of each kind of `ParameterCount` that there are, with the scales of those that are quantised."""
    kinds = dict.fromkeys(_KINDS, 0)
    for _, parameter, kind in _by_kind(model):
        kinds[kind] += parameter.numel() * parameter.element_size()
    for name, layer in model.named_modules():
        for scale in scales(layer):
            kinds[_kind(name, scale.new_empty(0, 0))] += scale.numel() * scale.element_size()
    return {kind: taken for kind, taken in kinds.items() if taken}


def _by_kind(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Each parameter with its name and kind, tied ones once."""
    inner = causal_lm(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    head_ids = {id(p) for p in head.parameters()} if head is not None else set()
    embedding_ids = {id(p) for p in embedding.parameters()} if embedding is not None else set()
    for name, parameter in model.named_parameters():
        if id(parameter) in embedding_ids:
            yield name, parameter, "embedding"
        elif id(parameter) in head_ids:
            yield name, parameter, "head"
        else:
            yield name, parameter, _kind(name, parameter)


def expert_names(model: nn.Module) -> set[str]:
    """The names of the parameters that are experts' weights."""
    return {name for name, parameter in model.named_parameters() if _kind(name, parameter) == "experts"}


def expert_bytes(model: nn.Module, moment_bytes: int = 8) -> int:
    """Bytes of the experts of a mixture: weights, and where they learn gradients, moments, and masters of 16-bit ones."""
    total, names = 0, expert_names(model)
    for name, parameter in model.named_parameters():
        if name in names:
            size = parameter.element_size()
            of_optimizer = moment_bytes + (0 if size >= 4 else 4)
            total += parameter.numel() * (size + (size + of_optimizer if parameter.requires_grad else 0))
    return total + sum(scale.nbytes for _, _, packed in packed_weights(model) for scale in scales(packed))


@dataclass(frozen=True)
class TierBytes:
    """Where the bytes of experts lie. On a CPU the host's memory is the device's, and all of it is `device`."""

    device: int
    host: int
    disk: int


def expert_stores(model: nn.Module) -> list[ExpertStore]:
    """What holds the experts that are no parameters of the model."""
    return [*{id(module.stream): module.stream.store for module in _streamed(model)}.values()]


def expert_tiers(model: nn.Module, moment_bytes: int = 8) -> TierBytes:
    """Bytes of experts by tier: weights, and where they learn gradients and moments; buffers that they pass through, too."""
    device, host, disk = expert_bytes(model, moment_bytes), 0, 0
    for store in expert_stores(model):
        host, disk = host + store.host_bytes, disk + store.disk_bytes
    if causal_lm(model).get_input_embeddings().weight.device.type == "cpu":
        device, host = device + host, 0
    return TierBytes(device, host, disk)


def expert_step_bytes(model: nn.Module, loads: int) -> int:
    """Bytes of experts that pass between their tier and where they are computed with in a step, if each is loaded so many times in
    each direction: weights on the way forward and back, gradients, which later loads add to, and an update.
    """
    stream = next((module.stream for module in _streamed(model)), None)
    if stream is None:
        return 0
    section = stream.shape.num_records * stream.content.numbers * stream.content.stored_dtype.itemsize
    if stream.store.disk_bytes:
        # The first: all four sections are read and three written, weights are read again, and the gradient is written.
        return section * ((9 + 4 * (loads - 1)) if stream.learns else 2 * loads)
    on_host = causal_lm(model).get_input_embeddings().weight.device.type == "cpu"
    return 0 if on_host else section * loads * (3 if stream.learns else 2)


def flops_per_token(model: nn.Module, context_tokens: int = 0, *, training: bool = True) -> int:
    """Floating-point operations for one token, forward (2 per weight and token), and backward if `training`.

    The embedding is a look-up and costs nothing; a tied head is a product and counts. Attention adds
    2 × layers × width × tokens in the context, on average over a causal document. Frozen weights cost no weight gradient.
    """
    inner, count = causal_lm(model), count_parameters(model)
    config = inner.config.get_text_config()
    head = inner.get_output_embeddings()
    head_weights = 0 if head is None else sum(p.numel() for p in head.parameters() if p.ndim > 1)
    products = count.active - count.embedding - count.head - count.norms + head_weights
    attention = 2 * config.num_hidden_layers * _attention_width(config) * context_tokens
    if not training:
        return int(2 * products + attention)
    trained_share = count.trainable / max(1, count.total)
    return int(products * (4 + 2 * trained_share) + 3 * attention)


def expected_peak_bytes(
    model: nn.Module,
    tokens_per_batch: int,
    *,
    gradient_checkpointing: bool = False,
    layer_by_layer_bytes: int = 0,
    compute: torch.dtype = torch.float32,
    moment_bytes: int = 8,
) -> TrainingBytes:
    """Bytes of tensors at the peak of a step over `tokens_per_batch` packed tokens.

    AdamW keeps two moments of each trainable element, `moment_bytes` together, and an fp32 master where the parameter is in
    16 bits. With
    gradient checkpointing only the input of each layer is kept, and one layer at a time is held in full. So it is where micro-batches
    pass layer by layer, all of which together keep `layer_by_layer_bytes`.
    """
    inner = causal_lm(model)
    config = inner.config.get_text_config()
    parameters = stored_bytes(model) + sum(
        (store.host_bytes for store in expert_stores(model)) if inner.device.type == "cpu" else ()
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trainable)
    # What learns is also what is published and read again, in the same format.
    optimizer = sum(p.numel() * (moment_bytes + (0 if p.element_size() >= 4 else 4)) for p in trainable)
    size = torch.empty((), dtype=compute).element_size()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    layer = (
        tokens_per_batch
        * size
        * (_KEPT_PER_LAYER_HIDDEN * hidden + _KEPT_PER_LAYER_FEED_FORWARD * _feed_forward_width(config))
    )
    # The layer at work holds its gradients beside what it kept.
    kept = (layers + 1) * layer
    if layer_by_layer_bytes:
        kept = layer_by_layer_bytes + 2 * layer
    elif gradient_checkpointing:
        kept = layers * tokens_per_batch * 4 * hidden + 2 * layer
    head = inner.get_output_embeddings()
    vocab = config.vocab_size
    logits = 3 * 4 * min(tokens_per_batch, chunk_tokens_for(vocab)) * vocab
    if head is not None and any(p.requires_grad for p in head.parameters()):
        logits += 4 * vocab * hidden  # the head's gradient of this batch, beside the one that accumulates
    activations = kept + 2 * tokens_per_batch * 4 * hidden
    return TrainingBytes(parameters, gradients, optimizer, activations, logits, publishing=gradients)


def _attention_width(config: Any) -> int:
    """Channels of all heads together; 0 where there is no attention."""
    heads = getattr(config, "num_attention_heads", None) or 0
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)))


def _kind(name: str, parameter: torch.Tensor) -> str:
    lower = name.lower()
    if ".lora_" in lower:
        return "adapters"
    if "expert" in lower and "shared" not in lower:
        return "experts"
    if "norm" in lower or (parameter.ndim == 1 and "bias" not in lower):
        return "norms"
    if "attn" in lower or "attention" in lower:
        return "attention"
    if any(word in lower for word in ("mlp", "feed_forward", "ffn")):
        return "feed_forward"
    return "other"


def _active_share(config: Any) -> float:
    """The share of the experts that a token passes through."""
    counts = expert_counts(config)
    return counts.active / counts.experts if counts else 1.0


def _feed_forward_width(config: Any) -> int:
    """Channels of the feed-forward part that one token uses."""
    counts = expert_counts(config)
    if counts is not None:
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        return int(width) * counts.active
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
