"""Small corpora, tokenizers and shards for tests."""

from pathlib import Path

import numpy as np

from nightschool.data.shards.tokenize import tokenize
from nightschool.data.tokenizer import END_OF_TEXT, train_bpe

WORDS = [
    "the",
    "night",
    "school",
    "opens",
    "at",
    "dusk",
    "and",
    "every",
    "model",
    "learns",
    "what",
    "it",
    "was",
    "asked",
    "by",
    "day",
]


def text(seed: int, words: int) -> str:
    """Words in a made-up order, in lines."""
    order = np.random.default_rng(seed).integers(0, len(WORDS), words)
    return "\n".join(" ".join(WORDS[i] for i in order[at : at + 9]) for at in range(0, words, 9)) + "\n"


def write_texts(folder: Path, count: int = 3, words: int = 400) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        path = folder / f"text{number}.txt"
        path.write_text(text(number, words))
        files.append(path)
    return files


def tokenizer():
    return train_bpe([text(0, 400)], 300, eos_token=END_OF_TEXT)


def write_shards(
    folder: Path, *, count: int = 3, words: int = 400, row_tokens: int = 32, shard_tokens: int = 256
) -> Path:
    """Token shards of a few texts in `folder`/shards."""
    files = write_texts(folder / "texts", count, words)
    tokenize(files, folder / "shards", tokenizer(), row_tokens=row_tokens, shard_tokens=shard_tokens)
    return folder / "shards"
