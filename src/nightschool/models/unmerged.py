"""LoRA adapters that stay apart from their base, so that several of them can be served on one copy of it.

Read from peft's file format by a list of what is understood. Whatever else an adapter may ask for (DoRA, further modules,
biases, other tensors than experts) is refused with its name; such an adapter can still be merged into a base of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nightschool.errors import Damaged, ModelError
from nightschool.layers.adapted_experts import EXPERT_WEIGHTS
from nightschool.layers.mixed_adapters import FactorPair
from nightschool.models.adapters import adapter_base
from nightschool.models.folder import is_adapter_folder, is_memory_folder
from nightschool.models.load import LoadedModel, Located, as_path
from nightschool.models.memory_version import memory_version
from nightschool.models.shared_tokenizer import shared_tokenizer
from nightschool.store.home import Home
from nightschool.store.names import split_quantization
from nightschool.store.registry import Registry

# Of two weights of one module, such as those of experts, PEFT wraps one in the other.
_TENSOR = re.compile(r"base_model\.model\.(.+?)((?:\.base_layer)*)\.lora_(A|B)\.weight")
# Fields of adapter_config.json that may have any value: read here, plain from the tensors, or of no effect on answers.
_UNDERSTOOD = frozenset(
    {"r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern"}
    | {"layers_to_transform", "layers_pattern", "task_type", "inference_mode", "base_model_name_or_path", "revision"}
    | {"target_parameters", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size"}
)
# Other ways to begin change the base, too, which peft repeats when it loads the adapter.
_PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal")


class NeedsMerging(ModelError, code="model"):
    """An adapter that cannot be served apart from its base, and why; merged it can."""


@dataclass(frozen=True)
class LoraWeights:
    """Per layer the two factors of what an adapter adds: [in, r] and [r, out], the second one scaled.

    `experts` has, by the name of the module of all experts of a layer, those of its weights: [N, r, in] and [N, out, r] each.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    experts: Mapping[str, tuple[FactorPair, ...]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        pairs = [*self.factors.values(), *(pair for pairs in self.experts.values() for pair in pairs)]
        return sum(down.nbytes + up.nbytes for down, up in pairs)


@dataclass(frozen=True)
class UnmergedAdapter:
    """An adapter as an engine of its base takes it."""

    ref: str
    tokenizer: PreTrainedTokenizerBase
    weights: LoraWeights


def base_under(found: Located, home: Home) -> str | None:
    """The reference, resolved, of the base that an adapter or memory modules stand on; None if it has all its weights itself."""
    base: str | None
    if is_memory_folder(found.folder):
        base = found.base or memory_version(found.folder).base
    elif is_adapter_folder(found.folder):
        base = found.base or adapter_base(found.folder)
    else:
        return None
    if not base:
        return None
    plain, quantization = split_quantization(base)
    quantization = quantization or found.quantization
    path, registry = as_path(plain, None), Registry(home)
    if path is not None:
        plain = str(path)
    elif "@" in plain or plain in registry.names():
        plain = registry.resolve(plain).ref
    return plain if quantization is None else f"{plain}[{quantization}]"


def load_unmerged(found: Located, under: LoadedModel) -> UnmergedAdapter:
    """Read an adapter for the base `under`.

    Raises:
        NeedsMerging: If it cannot stay apart, or its tokenizer does not fit the base; the message says why.
        Damaged: If its file cannot be read.
    """
    weights = read_lora(found.folder)
    has_tokenizer = (found.folder / "tokenizer_config.json").is_file()
    tokenizer = shared_tokenizer(found.folder, found.ref) if has_tokenizer else under.tokenizer
    if len(tokenizer) > under.vocab_size:
        raise NeedsMerging(f"its tokenizer has {len(tokenizer)} ids and the vocabulary of its base {under.vocab_size}")
    return UnmergedAdapter(found.ref, tokenizer, weights)


def why_merged(folder: Path) -> str | None:
    """Why the adapter of a folder cannot stay apart from its base; None if it can, as memory modules always can."""
    if is_memory_folder(folder):
        return None
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(f"{folder / 'adapter_config.json'} is no JSON ({error}). Publish the adapter again.") from None
    if config.get("peft_type") != "LORA":
        return f"its peft_type is {config.get('peft_type')}"
    if config.get("init_lora_weights", True) not in _PLAIN_BEGINNINGS:
        return f"its init_lora_weights is {config['init_lora_weights']!r}"
    from peft import LoraConfig

    usual = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    for name, value in config.items():
        if name in _UNDERSTOOD or name in ("peft_type", "init_lora_weights") or not value:
            continue
        if value != usual.get(name):
            return f"its {name} is {_short(value)}"
    targets = config.get("target_parameters") or []
    other = next((name for name in targets if name.rpartition(".")[2] not in EXPERT_WEIGHTS), None)
    if other is not None:
        return f"its target_parameters has {other}"
    if targets and config.get("rank_pattern"):
        return f"its rank_pattern is {_short(config['rank_pattern'])}, beside experts"
    with _opened(folder) as file:
        strange = next((name for name in file.keys() if not _is_understood(name, targets)), None)  # noqa: SIM118
    return None if strange is None else f"it has the tensor {strange}"


def _is_understood(tensor: str, targets: Sequence[str]) -> bool:
    found = _TENSOR.fullmatch(tensor)
    return found is not None and (not found[2] or _is_of_experts(found[1], targets))


def _is_of_experts(layer: str, targets: Sequence[str]) -> bool:
    modules = (target.rpartition(".")[0] for target in targets)
    return any(layer == module or layer.endswith(f".{module}") for module in modules)


def read_lora(folder: Path) -> LoraWeights:
    """The tensors of an adapter folder, scaled as peft scales them.

    Raises:
        NeedsMerging: If the adapter cannot stay apart from its base, with the reason.
        Damaged: If the file cannot be read, or holds nothing.
    """
    reason = why_merged(folder)
    if reason is not None:
        raise NeedsMerging(reason)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    targets = config.get("target_parameters") or []
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    with _opened(folder) as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            found = _TENSOR.fullmatch(name)
            assert found is not None, "why_merged looked at every name"
            halves.setdefault((found[1], found[2]), {})[found[3]] = file.get_tensor(name)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    experts: dict[str, tuple[FactorPair, ...]] = {}
    for (layer, _), half in halves.items():
        a, b = half.get("A"), half.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise NeedsMerging(f"its tensors of {layer} do not belong together")
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise NeedsMerging(f"its tensors of {layer} are not finite")
        # rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.
        of_experts = _is_of_experts(layer, targets)
        rank = config["r"] if of_experts else a.shape[0]
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        if of_experts:
            if a.shape[0] % rank:
                raise NeedsMerging(f"its tensors of {layer} are no whole number of experts of rank {rank}")
            experts[layer] = (*experts.get(layer, ()), _of_each_expert(a, b * scale, a.shape[0] // rank))
            continue
        # A copy, or the whole file would stay mapped beside what is made of it.
        factors[layer] = a.clone().t(), (b * scale).t()
    if not factors and not experts:
        raise Damaged(f"The adapter {folder} holds no factors at all. Publish it again.")
    return LoraWeights(factors, experts)


def _of_each_expert(a: Tensor, b: Tensor, num_experts: int) -> FactorPair:
    """PEFT keeps the first factors expert after expert, and the second ones rank after rank; see `models.expert_adapters`."""
    down_nri = torch.unflatten(a.clone(), 0, (num_experts, -1))
    return down_nri, torch.unflatten(b, 1, (-1, num_experts)).permute(2, 0, 1).contiguous()


def _opened(folder: Path) -> Any:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        # Whoever would merge it reads no other file either.
        raise Damaged(f"The adapter {folder} has no {path.name}. Adapters are read from safetensors only.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} cannot be read ({error}). Publish the adapter again.") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
