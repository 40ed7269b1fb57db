"""An adapter and its base as one plain folder, for whoever cannot load adapters, and the proof that it is the same model."""

from __future__ import annotations

from pathlib import Path

from nightschool.data.chat.render import stop_token_ids
from nightschool.errors import ModelError, UsageError
from nightschool.models.export import ACROSS_DEVICES, few_logits, prove_export, save_version_folder
from nightschool.models.load import load_located, located_version
from nightschool.store.home import Home
from nightschool.store.registry import Version


def write_merged(version: Version, home: Home, folder: Path) -> float:
    """Write the base of an adapter with the adapter added into its weights; the version itself stays as it is.

    A quantised base is written in full, with the very numbers that its codes mean.

    Returns:
        The largest difference between logits of the folder and of the adapter kept apart, relative to the largest logit.

    Raises:
        UsageError: If the version is no adapter.
        ModelError: If the folder gives other logits, or is not what was merged.
        DiskFull: If there is no room.
    """
    if version.facts.kind != "adapter":
        raise UsageError(f"{version.ref} is no adapter, so there is nothing to merge. Leave --merge out.")
    found = located_version(version)
    apart = few_logits(load_located(found, home, merge=False).model, seed=0)
    merged = load_located(found, home)
    together = few_logits(merged.model, seed=0)
    difference = float((apart - together).abs().max() / apart.abs().max().clamp_min(1e-6))
    limit = ACROSS_DEVICES[next(merged.model.parameters()).dtype]
    if not difference <= limit:
        raise ModelError(
            f"{version.ref}, merged into its base, gives other logits than apart from it: they differ by {difference:.1e} "
            f"of the largest, and {limit:.0e} is allowed. Export it without --merge."
        )
    stop_ids = sorted(stop_token_ids(merged.tokenizer))
    save_version_folder(merged.model, merged.tokenizer, folder, stop_ids=stop_ids)
    prove_export(merged.model, folder, merged.tokenizer)
    return difference
