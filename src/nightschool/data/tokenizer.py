"""A tokenizer of our own, for models that are made here."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nightschool.data.chat.template import CHATML_TEMPLATE

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

# Words with the space before them, numbers of up to three digits, punctuation with the line ends after it (as in GPT-4).
_WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int, *, eos_token: str = TURN_END) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be written, and the same texts give the same tokenizer.

    Args:
        texts: What it learns from.
        vocab_size: Entries, bytes and special tokens included; few texts may give fewer.
        eos_token: What ends a text: `<|im_end|>` for models that answer, `<|endoftext|>` for models that continue.

    Returns:
        A tokenizer with our ChatML template; `<|endoftext|>` pads.

    Raises:
        ValueError: If `vocab_size` does not hold the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but the bytes and the special tokens take {smallest}; raise it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
