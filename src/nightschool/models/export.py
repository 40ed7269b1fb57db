"""Publishing weights as a plain Hugging Face or PEFT folder, and proving that the folder is the model.

transformers writes GPT-NeoX, Qwen3-MoE and Mixtral under older tensor names and translates them back when it loads.
Whether that worked is not assumed: the folder is loaded again by plain `transformers` (and `peft`), every tensor is
compared bit by bit, and so are logits. For an adapter this is done on the base that is in memory, which was read from its
files and never changed: a second copy of a large base may not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from nightschool.errors import ModelError
from nightschool.models.adapters import adapter_tensors
from nightschool.models.expert_adapters import shown_whole
from nightschool.models.peft_layers import is_adapted
from nightschool.models.quiet import quiet_libraries
from nightschool.models.strict import distinct_tensors, not_loaded
from nightschool.store.atomic import room_needed

if TYPE_CHECKING:
    from peft import PeftModel

# The tensors are equal bit by bit; logits may still differ by the order of sums in kernels that choose their own
# blocking (none does on a CPU with one thread). Relative to the largest logit.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Where one side had to be computed on the CPU, kernels differ too.
ACROSS_DEVICES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# The name of an adapter that was read again, beside the trained one.
_AGAIN = "published"
# A copy needs a little more than its weights.
_ROOM = 1.1


def save_version_folder(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    stop_ids: Sequence[int] = (),
    base_path: Path | str | None = None,
    write_weights: Callable[[Path], None] | None = None,
) -> None:
    """Write `model` and `tokenizer` into `folder` (created if needed): safetensors, configuration, tokenizer, template.

    Args:
        model: Bare: full weights are written. A `PeftModel`: only its adapter is.
        tokenizer: With its chat template, which goes into `chat_template.jinja`.
        folder: Nothing else should be in it.
        stop_ids: Ids at which generation stops; without any, the tokenizer's end of text. Written into
            `generation_config.json`, so that plain transformers stops where we stop.
        base_path: For an adapter, the folder or hub id of its base: `LoadedModel.base_location`.
        write_weights: What writes the tensors of a bare model, in place of transformers.

    Raises:
        ModelError: If an adapter has no base that can be loaded again.
        DiskFull: If there is no room. What was written so far stays in `folder`.
    """
    stops = list(dict.fromkeys(stop_ids)) or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    generation = _generation_config(model, tokenizer, stops)
    with quiet_libraries(), room_needed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if is_adapted(model):
            adapter = cast(Any, model.peft_config["default"])
            base = base_path or adapter.base_model_name_or_path
            if not base:
                raise ModelError(
                    "The adapter stands on weights that lie in no folder, so nobody could load it. "
                    "Publish the base first (method: full), then train the adapter on its name@version."
                )
            adapter.base_model_name_or_path = str(base)
            model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # a form with nothing filled in
        elif write_weights is not None:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(str(folder))
            write_weights(folder)
        else:
            before = model.generation_config
            model.generation_config = generation
            try:
                model.save_pretrained(str(folder))
            finally:
                model.generation_config = before
        generation.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


def prove_export(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    seed: int = 0,
) -> float:
    """Load `folder` again by plain transformers (and peft) and compare it with `model`, the one that was trained.

    The model is left as it was. Weights in full are loaded beside it, on the CPU if the GPU has no room for both.

    Returns:
        The largest difference between their logits, relative to the largest logit. 0.0 on a CPU.

    Raises:
        ModelError: If a tensor is missing or differs in any bit, if logits differ by more than `TOLERANCE`, or if the
            tokenizer turns out another one.
    """
    weight = _embedding(model)
    device = weight.device
    if is_adapted(model):
        with _beside(model, folder) as stored:
            _compare_tensors(adapter_tensors(model), stored, folder)
            trained_logits, logits = _logits_of_both(model, seed)
    else:
        device = place_for_copy(sum(p.numel() * p.element_size() for p in model.parameters()), device)
        again = _load_plainly(weight.dtype, device, folder)
        _compare_tensors(distinct_tensors(model), distinct_tensors(again), folder)
        trained_logits, logits = few_logits(model, seed), few_logits(again, seed)
    difference = float((trained_logits - logits).abs().max() / trained_logits.abs().max().clamp_min(1e-6))
    limit = (TOLERANCE if device == weight.device else ACROSS_DEVICES).get(weight.dtype, 1e-5)
    if not difference <= limit:
        raise ModelError(
            f"The folder {folder} does not give the logits of the trained model: they differ by {difference:.1e} of the "
            f"largest, and {limit:.0e} is allowed. It is not published; what it was made from is still whole."
        )
    if tokenizer is not None:
        compare_tokenizers(tokenizer, folder)
    return difference


def _generation_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, stops: list[int]
) -> GenerationConfig:
    known = getattr(model, "generation_config", None)
    fields: dict[str, Any] = known.to_diff_dict() if isinstance(known, GenerationConfig) else {}
    if stops:
        fields["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is not None:
            fields[name] = getattr(tokenizer, name)
    return GenerationConfig(**fields)  # type: ignore[no-untyped-call]


def place_for_copy(needed_bytes: int, device: torch.device) -> torch.device:
    """Where a second copy of a model on `device` goes: beside it, or to the CPU if the GPU has no room for it."""
    if device.type != "cuda":
        return device
    torch.cuda.empty_cache()  # what the allocator keeps for later counts as taken
    return device if torch.cuda.mem_get_info(device)[0] > _ROOM * needed_bytes else torch.device("cpu")


@contextmanager
def _beside(model: PeftModel, folder: Path) -> Iterator[dict[str, Tensor]]:
    """Load the adapter of `folder` by plain peft beside the trained one, for the block; yields its tensors."""
    from peft import get_peft_model_state_dict

    before, training = model.active_adapter, model.training
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        try:
            with quiet_libraries(), shown_whole(model):
                model.load_adapter(str(folder), adapter_name=_AGAIN, torch_device=str(_embedding(model).device))
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(_cannot_be_loaded(folder, "peft", error)) from None
        yield get_peft_model_state_dict(model, adapter_name=_AGAIN, save_embedding_layers=False)
    finally:
        model.set_adapter(before)
        if _AGAIN in model.peft_config:
            model.delete_adapter(_AGAIN)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns[name])
        model.train(training)


def _logits_of_both(model: PeftModel, seed: int) -> tuple[Tensor, Tensor]:
    trained = few_logits(model, seed)
    model.set_adapter(_AGAIN)
    return trained, few_logits(model, seed)


def _load_plainly(dtype: torch.dtype, device: torch.device, folder: Path) -> Any:
    """What a user of the folder would get, in evaluation mode."""
    try:
        with quiet_libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(_cannot_be_loaded(folder, "transformers", error)) from None
    again, report = loaded
    lost = not_loaded(report)
    if lost:
        raise ModelError(
            f"The folder {folder} does not hold the whole model: {lost}. It is not published; what it was made from is still whole."
        )
    return again.to(device).eval()


def _cannot_be_loaded(folder: Path, library: str, error: Exception) -> str:
    return (
        f"The folder {folder} cannot be loaded by {library}: {error} "
        "It is not published; what it was made from is still whole."
    )


def _compare_tensors(trained: dict[str, Tensor], stored: dict[str, Tensor], folder: Path) -> None:
    differing = sorted(set(trained) ^ set(stored))
    differing += [
        name
        for name in trained
        if name in stored and not torch.equal(trained[name].to(stored[name].device), stored[name])
    ]
    if differing:
        raise ModelError(
            f"The folder {folder} lost {len(differing)} of {len(trained)} tensors of the trained model, such as {differing[0]}. "
            "It is not published; what it was made from is still whole."
        )


def few_logits(model: Any, seed: int) -> Tensor:
    """Logits of a few random tokens, in fp32 on the CPU."""
    weight = _embedding(model)
    generator = torch.Generator().manual_seed(seed)
    context = min(16, int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 16))
    ids = torch.randint(0, weight.shape[0], (2, context), generator=generator).to(weight.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return cast(Tensor, model(input_ids=ids, use_cache=False).logits).float().cpu()
    finally:
        model.train(training)


def compare_tokenizers(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise `ModelError` if the tokenizer in the folder is another one."""
    with quiet_libraries():
        again: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    sample = "Où sont 12 cats?\n  «né» 東京 🙂 <|im_end|>"
    for what, ours, theirs in (
        ("vocabulary", tokenizer.get_vocab(), again.get_vocab()),
        ("chat template", tokenizer.chat_template, again.chat_template),
        ("encoding", tokenizer.encode(sample), again.encode(sample)),
    ):
        if ours != theirs:
            raise ModelError(
                f"The tokenizer in {folder} has another {what} than the one that was trained with. It is not published."
            )


def _embedding(model: Any) -> Tensor:
    return cast(Tensor, model.get_input_embeddings().weight)
