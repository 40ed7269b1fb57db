"""Which jobs may train their adapters in one process, on one base that is in memory once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What all that share a process have alike: it has one base, on one device, and one number of threads.
_ALIKE = ("device", "dtype", "num_threads", "gradient_checkpointing")
# What knows of one run alone, by the value with which it is not there.
_ABSENT: Mapping[str, object] = {"num_processes": 1, "zero_stage": 0, "compile": False}


def share_key(plain: Mapping[str, Any], root: str) -> str | None:
    """What jobs that may share a base have in common, as a digest; None for a job that trains alone.

    `plain` are the plain values of a validated recipe, whose relative paths begin in `root`.
    """
    train, base = plain.get("train", {}), str(plain.get("base", ""))
    may = plain.get("jobs", {}).get("share_base", True) and plain.get("method") == "lora"
    # A new base is made for each run; a checkpoint brings its own; the scaler of fp16 knows of one run alone.
    if not may or base.startswith("new:") or plain.get("from_checkpoint") is not None or train.get("dtype") == "fp16":
        return None
    if plain.get("rehearse", {}).get("prompts") is not None:
        return None  # its passes are over answers of its own
    if plain.get("study", {}).get("write") in ("self", "both"):
        return None  # it answers before others learn on its base
    if plain.get("study", {}).get("objective", "sft") != "sft":
        return None  # so does its teacher, and its loss is another
    if any(train.get(name, absent) != absent for name, absent in _ABSENT.items()):
        return None
    common = {"base": _absolute(base, root)} | {name: train.get(name) for name in _ALIKE}
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()


def _absolute(base: str, root: str) -> str:
    """A base that is a path by its whole path: two jobs in different folders may mean the same."""
    is_path = base.startswith((".", "/", "~")) or base.lower().endswith(".gguf")
    return str((Path(root) / Path(base).expanduser()).resolve()) if is_path else base
