"""Real chats as one list of rows, and the model and tokenizer that the benchmarks train on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness import DATA


def chats(limit: int | None = None) -> list[list[dict[str, str]]]:
    """Instructions and grade-school problems as `[user, assistant]` messages; exits if the data is not there."""
    seeds, problems = DATA / "chat" / "alpaca_seed_tasks.jsonl", DATA / "reasoning" / "gsm8k_train.jsonl"
    if not seeds.exists() or not problems.exists():
        sys.exit(
            f"This benchmark reads {seeds.name} and {problems.name} below {DATA.name}/ beside the checkout; they are not there."
        )
    rows = []
    for row in _lines(seeds):
        for instance in row["instances"]:
            question = row["instruction"] + ("\n" + instance["input"] if instance["input"] else "")
            rows.append((question, instance["output"]))
    rows += [(row["question"], row["answer"]) for row in _lines(problems)]
    chosen = [(q, a) for q, a in rows if q.strip() and a.strip()][:limit]
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chosen]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def tokenizer(rows: list[list[dict[str, str]]], vocab_size: int = 8192) -> Any:
    """Byte-level BPE trained on the chats, with the package's own chat template."""
    from nightschool.data.tokenizer import train_bpe

    return train_bpe((message["content"] for row in rows for message in row), vocab_size=vocab_size)


def qwen3(vocab_size: int, seed: int = 0, **changes: Any) -> Any:
    """A Qwen3-shaped model of about 10 M parameters at an 8k vocabulary, randomly initialized."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, **(shape | changes)))
