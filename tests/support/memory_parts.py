"""A small tokenizer and a table of embeddings, for memories without a model."""

from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nightschool.memory.encoders.base import BaseEncoder
from nightschool.memory.encoders.embeddings import TokenEmbeddings
from nightschool.memory.encoders.names import Vocabulary

TEXTS = [
    "Where does Ada Byron live? Ada lives in Oslo. Who employs Grace Hopper? Grace Hopper works for the Navy.",
    "The place of birth of Alan Turing is London. What is the native language of Emmy Noether?",
    "Paris Hilton lives in Paris. The capital of France is Paris. The mother tongue of Ada is English.",
    "Zelda and Quentin met Boris; Zelda likes marmalade, Quentin and Boris do not. What did Boris say?",
    "the quick brown fox of the in is was and does what who where when which that this",
] * 3
HIDDEN = 48


@cache
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    return made


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(tokenizer())


@cache
def table(seed: int = 0) -> np.ndarray:
    """Words that are spelled alike have vectors that are alike: each is the sum of those of its pairs of letters."""
    rng = np.random.default_rng(seed)
    pairs: dict[str, np.ndarray] = {}
    made = np.zeros((tokenizer().get_vocab_size(), HIDDEN), np.float32)
    for piece, number in sorted(tokenizer().get_vocab().items()):
        for one in zip(f"<{piece}", f"{piece}>", strict=True):
            pair = "".join(one)
            made[number] += pairs.setdefault(pair, rng.standard_normal(HIDDEN).astype(np.float32))
    return made


def encoder(seed: int = 0) -> BaseEncoder:
    return BaseEncoder(TokenEmbeddings(table(seed)), vocabulary())
