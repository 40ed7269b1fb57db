"""Chat templates in the manner of well-known model families, and tokenizers of several kinds, for the rendering tests."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nightschool.data.tokenizer import train_bpe

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Headers, trimmed contents, a token of its own that ends a turn.
LLAMA_3 = (
    "{{- '<|begin|>' }}"
    "{% for m in messages %}{{- '<|head|>' + m.role + '<|/head|>\n\n' + (m.content | trim) + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)

# Not prefix-stable: thoughts of earlier turns disappear, the last turn always has a place for them.
QWEN_3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set thought = '' %}{%- set said = m.content %}"
    "{%- if '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + said }}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)

# The system turn moves into the first question; only pairs; a space before the answer.
MISTRAL = (
    "{{- '<|begin|>' }}"
    "{%- set system = '' %}{%- set turns = messages %}"
    "{%- if messages and messages[0].role == 'system' %}{%- set system = messages[0].content + '\n\n' %}{%- set turns = messages[1:] %}{%- endif %}"
    "{%- for m in turns %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate user and assistant') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m.content + '<|eot|>' }}{%- endif %}"
    "{%- endfor %}"
)

# Plain words, and no token after an answer at all.
WORDS = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"

TEMPLATES = {"chatml": CHATML, "llama-3": LLAMA_3, "qwen-3": QWEN_3, "mistral": MISTRAL, "words": WORDS}

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"]
_TEXTS = [
    "user\nassistant\nsystem\n\n<think>\n\n</think>\n\n [INST]  [/INST] USER: ASSISTANT: What is the answer? The answer is yes.",
    "Where does Anna live? Anna lives in Rome.\n\nShe has 2 cats; 10 dogs.  \n",
] * 5


@cache
def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == "ours":
        return train_bpe(_TEXTS, 400)
    if kind == "merging":  # no pre-tokenizer keeps merges from crossing a line, a space or a border of turns
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.decoder = decoders.ByteLevel()
        raw.train_from_iterator(
            _TEXTS,
            trainers.BpeTrainer(
                vocab_size=500,
                special_tokens=_SPECIAL,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
    elif kind == "trimming":  # GPT-NeoX and GPT-2: offsets without the white space
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
        raw.train_from_iterator(
            _TEXTS,
            trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=_SPECIAL,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
    else:  # SentencePiece: a space before what comes first, unknown characters as bytes
        raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        raw.train_from_iterator(
            _TEXTS,
            trainers.BpeTrainer(
                vocab_size=600,
                special_tokens=["<unk>", *[f"<0x{i:02X}>" for i in range(256)], *_SPECIAL],
                show_progress=False,
            ),
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|endoftext|>",
        extra_special_tokens=_SPECIAL[1:],
        clean_up_tokenization_spaces=False,
    )


KINDS = ("ours", "merging", "trimming", "sentencepiece")


def make_tokenizer(kind: str, template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer with a template of `TEMPLATES`. Cached: the same arguments give the same object."""
    return _with_template(kind, template)


@cache
def _with_template(kind: str, template: str | None) -> PreTrainedTokenizerFast:
    import copy

    tokenizer = copy.deepcopy(_tokenizer(kind))
    if kind == "ours":
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [t for t in _SPECIAL if t not in tokenizer.get_vocab()]},
            replace_extra_special_tokens=False,
        )
    tokenizer.chat_template = TEMPLATES[template] if template else None
    return tokenizer
