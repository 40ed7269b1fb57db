"""What opens gated models and data sets of the Hugging Face Hub."""

from __future__ import annotations

import os


def hub_token() -> str | None:
    """The library's own token (HF_TOKEN, or that of `hf auth login`), else HUGGINGFACE_TOKEN; None without any."""
    # It takes 0.3 s to import, and few runs read from the Hub.
    from huggingface_hub import get_token

    return get_token() or os.environ.get("HUGGINGFACE_TOKEN") or None
