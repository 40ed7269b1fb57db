"""Whether all of a model arrived: counted, not believed.

Architectures rename, split and stack tensors between file and model, so names cannot be compared. The number of elements
can: no conversion changes it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from nightschool.errors import Damaged, ModelError
from nightschool.models.folder import FolderInfo
from nightschool.models.quantize import num_elements, quantization_of

# Buffers that old files carry and no model of today reads.
_DERIVED = (r"rotary_emb\.inv_freq$", r"attention\.(masked_)?bias$", r"attn\.(masked_)?bias$")


def not_loaded(report: dict[str, Any]) -> str:
    """What the loading report of transformers complains about, in a few words; empty if nothing."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        wrong = sorted(str(entry) for entry in report.get(what) or ())
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            return f"{what.replace('_', ' ')} {', '.join(wrong[:3])}{more}"
    return ""


def is_derived(name: str) -> bool:
    """Whether this is a buffer that old files carry and no model of today reads."""
    return any(re.search(pattern, name) for pattern in _DERIVED)


def check_elements(model: PreTrainedModel, facts: FolderInfo, ref: str) -> None:
    """Compare the elements in the files of `facts` with those of `model`.

    Quantised files are exempt: packing changes the count.

    Raises:
        Damaged: If they differ, with both numbers.
    """
    if facts.quantized:
        return
    here = sum(num_elements(tensor) for tensor in _loaded_tensors(model))
    ignored = [re.compile(pattern) for pattern in (*_DERIVED, *(model._keys_to_ignore_on_load_unexpected or ()))]
    derived = sum(t.num_elements for t in facts.tensors if any(pattern.search(t.name) for pattern in ignored))
    # Tied weights may lie in the file once or under both names.
    tied: dict[str, Any] = getattr(model, "all_tied_weights_keys", {}) or {}
    copies = sum(model.get_parameter(name).numel() for name in tied)
    count = sum(tensor.num_elements for tensor in facts.tensors)
    if here not in {count - d - c for d in (0, derived) for c in (0, copies)}:
        raise Damaged(
            f"The files of the base {ref!r} hold {count:,} numbers and the model takes {here:,}. "
            "Its config.json does not describe these weights; fetch it again."
        )


def _loaded_tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    """What was read from files: without the scales that quantising has added."""
    if quantization_of(model) is None:
        return list(distinct_tensors(model).values())
    return list(model.parameters())


def check_values(model: PreTrainedModel, ref: str) -> None:
    """Raise `Damaged` if a parameter was left without values, or holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise Damaged(f"The tensor {name} of the base {ref!r} was never filled. Fetch it again.")
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise Damaged(f"The tensor {name} of the base {ref!r} holds NaN or infinity. Fetch it again.")


def distinct_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, tied ones once, under the first of their names."""
    seen: set[int] = set()
    distinct = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            distinct[name] = tensor
    return distinct


def check_causal(model: PreTrainedModel, ref: str) -> None:
    """Raise `ModelError` if a later token changes the logits of an earlier place."""
    generator = torch.Generator().manual_seed(0)
    inner: Any = model
    rows = int(inner.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, rows, (2, 8), generator=generator)
    ids[1, :-1] = ids[0, :-1]
    ids[1, -1] = (ids[0, -1] + 1) % rows
    inner.eval()
    with torch.no_grad():
        logits = inner(input_ids=ids.to(inner.device)).logits.float()
    change = (logits[0] - logits[1]).abs().amax(dim=-1)
    # Rounding may differ between the rows of a batch, by far less than the change where the token is.
    if bool(change[:-1].max() > 1e-2 * change[-1]):
        raise ModelError(
            f"The base {ref!r} looks ahead: a later token changes what it predicts before. Take a causal language model."
        )
