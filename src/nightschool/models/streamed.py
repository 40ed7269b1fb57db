"""A mixture whose experts are streamed: made from nothing, or read from a stock folder, expert by expert.

At no time are all experts in memory, unless that is their tier. A new one has the very numbers of `build_model` with the
same seed, where an expert's matrices have multiples of 16 numbers: the generator fills them in blocks of 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nightschool.errors import Damaged, ModelError
from nightschool.layers.adapted_experts import adapted_experts
from nightschool.layers.expert_streaming.content import Content, PackedContent, PlainContent
from nightschool.layers.expert_streaming.experts import StreamedExperts
from nightschool.layers.expert_streaming.file import PAGE_BYTES, FileStore
from nightschool.layers.expert_streaming.kept import Kept, LastUsed, MostUsed
from nightschool.layers.expert_streaming.ram import RamStore
from nightschool.layers.expert_streaming.record import LEARNING, WEIGHTS, RecordLayout
from nightschool.layers.expert_streaming.stock import StockStore
from nightschool.layers.expert_streaming.store import ExpertStore
from nightschool.layers.expert_streaming.stream import ExpertShape, ExpertStream
from nightschool.models.expert_files import ExpertFiles
from nightschool.models.folder import FolderInfo
from nightschool.models.quantize import quantization_config, steady
from nightschool.models.quantized_experts import QuantizedWhileRead, WithExperts
from nightschool.models.quiet import quiet_libraries
from nightschool.models.strict import check_values, is_derived
from nightschool.units import format_bytes
from nightschool.work.host_memory import host_bytes

# Modules of SwiGLU experts with `gate_up_proj` [N,2E,D] and `down_proj` [N,D,E].
_MODULES = (
    "Qwen3MoeExperts", "Qwen3NextExperts", "MixtralExperts", "OlmoeExperts", "DeepseekV3Experts", "Glm4MoeExperts",
)  # fmt: skip
# Products from such addresses have the same bits as from the start of a page.
_ALIGNMENT_BYTES = 64
# One that is computed with, and one that is changed.
FEWEST_RESIDENT = 2


@dataclass(frozen=True)
class ExpertPlace:
    """Where experts live: in the host's memory, or in a file on the disk of `folder`, of which `resident` are in memory.

    Experts that learn have gradients and moments beside their weights. Where a model `serves`, those that answers use most
    stay in memory.
    """

    tier: Literal["host", "disk"]
    folder: Path
    resident: int
    learns: bool = True
    serves: bool = False

    def new_store(self, shape: ExpertShape, content: Content, device: torch.device) -> ExpertStore:
        """Take the room that the experts need.

        Raises:
            ModelError: If there is not enough memory.
            DiskFull: If there is not enough room on the disk.
        """
        sections = LEARNING if self.learns else (WEIGHTS,)
        numbers, dtype = content.numbers, content.stored_dtype
        self._check_memory(shape, len(sections) * numbers * dtype.itemsize)
        if self.tier == "host":
            layout = RecordLayout(sections, numbers, dtype, _ALIGNMENT_BYTES, content.cut)
            return RamStore(layout, shape.num_records, page_locked=device.type == "cuda")
        layout = RecordLayout(sections, numbers, dtype, PAGE_BYTES, content.cut)
        return FileStore(
            layout, shape.num_records, folder=self.folder, resident=self.resident, name_of=shape.name_of, kept=self._kept()
        )  # fmt: skip

    def store_of(self, files: ExpertFiles, shape: ExpertShape, content: Content, device: torch.device) -> ExpertStore:
        """The same for experts of a stock folder. Frozen ones that are not packed are read from its files, and take no room on a disk."""
        if self.tier == "host" or self.learns or not isinstance(content, PlainContent):
            return self.new_store(shape, content, device)
        self._check_memory(shape, content.numbers * content.dtype.itemsize)
        return stock_store(files, shape, content.dtype, self.resident, self._kept())

    def _kept(self) -> Kept:
        return MostUsed(self.resident) if self.serves else LastUsed()

    def _check_memory(self, shape: ExpertShape, one: int) -> None:
        """Refuse experts of so many bytes each that find no room in memory."""
        free, held = host_bytes().free, shape.num_records if self.tier == "host" else self.resident
        if held * one > free:
            remedy = "Write experts.tier: disk, or fewer experts."
            if self.tier == "disk":
                remedy = f"Write experts.resident: {max(2, free // one)}, where 2 is the least."
            raise ModelError(
                f"{held:,} experts of {format_bytes(one)} each, with what they learn by, take {format_bytes(held * one)} of memory, and "
                f"{format_bytes(free)} are free. {remedy}"
            )


def stock_store(
    files: ExpertFiles, shape: ExpertShape, dtype: torch.dtype, resident: int, kept: Kept | None = None
) -> StockStore:
    """The experts of a folder as plain numbers, of which `resident` are in memory."""
    content = PlainContent(shape.hidden_size, shape.expert_size, dtype)
    layout = RecordLayout((WEIGHTS,), content.numbers, dtype, _ALIGNMENT_BYTES, content.cut)
    return StockStore(layout, files.records, resident=resident, name_of=shape.name_of, kept=kept)


def expert_stream(model: nn.Module) -> ExpertStream | None:
    """The stream of a model's experts; None where they are parameters like all others, or there are none."""
    return next((module.stream for module in model.modules() if isinstance(module, StreamedExperts)), None)


def is_mixture(config: Any) -> bool:
    """Whether a configuration is of a model whose experts can be streamed."""
    return bool(_modules_of_experts(config))


def build_streamed(
    config: PretrainedConfig, seed: int, place: ExpertPlace, device: torch.device | str
) -> PreTrainedModel:
    """A fresh fp32 model; the global generator is left as it was.

    Raises:
        ModelError: If it is no mixture whose experts can be streamed.
        DiskFull: If its experts find no room.
    """
    shape, content = _outline(config, place, torch.float32)
    stream = ExpertStream(shape, place.new_store(shape, content, torch.device(device)), content)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _without_experts(config, stream, torch.float32, draw=True)
    return cast(PreTrainedModel, cast(Any, model).to(device))


def read_streamed(
    facts: FolderInfo,
    config: Any,
    ref: str,
    place: ExpertPlace,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: str | None = None,
) -> PreTrainedModel:
    """The model that a stock folder of full weights holds, or with a `quantization` what that makes of it, expert by expert.

    Raises:
        ModelError: If it is no mixture whose experts can be streamed, or quantised already.
        Damaged: If a tensor is missing, unexpected, of another shape, or not finite.
        DiskFull: If its experts find no room.
    """
    if facts.quantized:
        raise ModelError(
            f"The base {ref!r} is quantised, and its experts cannot be streamed. Write experts.tier: device."
        )
    shape, content = _outline(config, place, dtype, quantization)
    experts = ExpertFiles(facts, shape, str(config.model_type), ref)
    store = place.store_of(experts, shape, content, torch.device(device))
    stream = ExpertStream(shape, store, content)
    if not isinstance(store, StockStore):
        stream.fill_from(stock_store(experts, shape, dtype, resident=1))
    model: Any = cast(Any, _without_experts(config, stream, dtype, draw=False)).to(device)
    files = _Files(facts, ref)
    if quantization is None:
        _fill_dense(model, files, ref, experts.names)
    else:
        settings = cast(WithExperts, quantization_config(quantization, dtype, ref))
        with quiet_libraries(), QuantizedWhileRead(model, settings, torch.device(device)) as quantized:
            _fill_dense(model, files, ref, experts.names, quantized)
        steady(model, device)
    check_values(model, ref)
    return cast(PreTrainedModel, model)


def stock_dense_name(name: str, model_type: str) -> str:
    """How a stock folder names a tensor that is no expert's."""
    return name.replace(".mlp.", ".block_sparse_moe.") if model_type == "mixtral" else name


def _outline(
    config: Any, place: ExpertPlace, dtype: torch.dtype, quantization: str | None = None
) -> tuple[ExpertShape, Content]:
    """The experts that a configuration has, and as what they are kept."""
    found = _modules_of_experts(config)
    if not found:
        raise ModelError(
            f"experts.tier is {place.tier}, and a {config.model_type} model has no experts that can be streamed. Take a mixture "
            "(Qwen3-MoE, Mixtral, OLMoE, GLM-4-MoE or DeepSeek-V3), such as base: new:moe-tiny, or write experts.tier: device."
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ModelError(
            f"The experts of the base have the activation {config.hidden_act}, and only those with silu can be streamed. "
            "Write experts.tier: device."
        )
    num_experts, double, hidden = next(iter(found.values())).gate_up_proj.shape
    shape = ExpertShape(tuple(found), num_experts, hidden, double // 2)
    content: Content = PlainContent(hidden, shape.expert_size, dtype)
    if quantization is not None:
        content = PackedContent(quantization, hidden, shape.expert_size, dtype)
    return shape, content


def _modules_of_experts(config: Any) -> dict[str, Any]:
    """Modules of all experts of a layer, by name, without their numbers."""
    with torch.device("meta"), quiet_libraries():
        outline: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return {name: module for name, module in outline.named_modules() if type(module).__name__ in _MODULES}


def _without_experts(config: Any, stream: ExpertStream, dtype: torch.dtype, *, draw: bool) -> PreTrainedModel:
    """The model with all weights but those of the experts, which `draw` fills in their store in their turn."""
    with quiet_libraries(), _ExpertsElsewhere(stream, draw=draw):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    for name in getattr(model, "_keep_in_fp32_modules_strict", None) or ():  # as `from_pretrained` keeps them
        for module in model.modules():
            if isinstance(buffer := module._buffers.get(name), Tensor):
                module._buffers[name] = buffer.float()
    for layer, name in enumerate(stream.shape.layers):
        parent, _, last = name.rpartition(".")
        experts = StreamedExperts(stream, layer)
        if not stream.content.stored_dtype.is_floating_point:  # as packed ones that are all there
            setattr(experts, "forward", partial(adapted_experts, experts, {}))  # noqa: B010 - a method, for mypy
        setattr(model.get_submodule(parent), last, experts)
    return cast(PreTrainedModel, model)


class _ExpertsElsewhere(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While a model is made, let tensors of all experts of a layer be empty shells, and draw their numbers into the store."""

    def __init__(self, stream: ExpertStream, *, draw: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stream, self._draw = stream, draw
        self._shapes = {stream.shape.stacked_shape(which) for which in (0, 1)}
        self._turns = iter(stream.shape.stacked().values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.empty.memory_format and tuple(args[0]) in self._shapes:
            return function(*args, **(kwargs | {"device": "meta"}))
        if function is torch.ops.aten.normal_.default and args[0].is_meta:
            self._fill(*args[:3])
            return args[0]
        return function(*args, **kwargs)

    def _fill(self, stacked: Tensor, mean: float = 0.0, std: float = 1.0) -> None:
        if not self._draw:
            return
        layer, which = next(self._turns)
        assert tuple(stacked.shape) == self._stream.shape.stacked_shape(which), "experts are drawn in another order"
        size = stacked.shape[1:]
        self._stream.fill(WEIGHTS, layer, which, (torch.empty(size).normal_(mean, std) for _ in range(len(stacked))))


class _Files:
    """The tensors of a folder, read one at a time."""

    def __init__(self, facts: FolderInfo, ref: str) -> None:
        self._path, self._ref = facts.path, ref
        self.facts = {fact.name: fact for fact in facts.tensors}
        self._open: tuple[str, Any] = ("", None)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        fact = self.facts.get(name)
        if fact is None:
            raise Damaged(f"The tensor {name} of the base {self._ref!r} is not in its files. Fetch it again.")
        if tuple(fact.shape) != shape:
            raise Damaged(
                f"The tensor {name} of the base {self._ref!r} has the shape {list(fact.shape)}, and its configuration says "
                f"{list(shape)}. Fetch it again."
            )
        if self._open[0] != fact.file:
            self._open = (fact.file, safe_open(self._path / fact.file, framework="pt"))
        return cast(Tensor, self._open[1].get_tensor(name))


def _fill_dense(
    model: Any, files: _Files, ref: str, experts: Set[str], quantized: QuantizedWhileRead | None = None
) -> None:
    """Read everything but `experts`; `quantized` takes what it wants of it."""
    model_type, tied = str(model.config.model_type), set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted: Mapping[str, Tensor] = model.state_dict()
    stock = {stock_dense_name(name, model_type): name for name in wanted}
    unexpected = [name for name in files.facts if name not in stock and name not in experts and not is_derived(name)]
    if unexpected:
        raise Damaged(
            f"The files of the base {ref!r} hold {unexpected[0]}, which the model has no place for. Fetch it again."
        )
    with torch.no_grad():
        for name, own in stock.items():
            if name in files.facts or own not in tied:
                tensor = files.read(name, tuple(wanted[own].shape))
                if quantized is None or not quantized.take(own, tensor):
                    wanted[own].copy_(tensor)
    model.tie_weights()
