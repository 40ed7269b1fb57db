"""Chat templates: our default one, and what any template does to messages.

A model's template is part of its tokenizer. It is run here and nowhere else, always with the same settings, so that
training, evaluation, server and chat see the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2

from nightschool.data.example import Message, Role
from nightschool.errors import DataError, ModelError

CHATML_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""The default. `<|im_end|>` ends an answer."""

PLAIN_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '### ' + message['role'] + '\n' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### assistant\n' }}{%- endif %}"
)
"""For a tokenizer without ChatML's tokens: no token is added, so no embedding has to grow. The eos token ends an answer."""

_DATE = {"%Y": "2024", "%m": "07", "%d": "26", "%b": "Jul", "%B": "July", "%H": "00", "%M": "00", "%S": "00"}
_FIXED_CLOCK = (
    "{%- macro strftime_now(format) %}{{- format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DATE.items())
    + " }}{%- endmacro %}"
)


def ensure_template(tokenizer: Any) -> None:
    """Give a tokenizer that has no chat template our default one; leave any other as it is.

    Raises:
        ModelError: If it has no end-of-sequence token either, so that no answer could end.
    """
    if tokenizer.chat_template is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError(
            "The tokenizer has neither a chat template nor an end-of-sequence token. Give it an eos_token."
        )
    vocabulary = tokenizer.get_vocab()
    chatml = "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary
    tokenizer.chat_template = CHATML_TEMPLATE if chatml else PLAIN_TEMPLATE


def render_text(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool, thinking: bool) -> str:
    """Run the template. `thinking` reaches it as `enable_thinking` and as `thinking`.

    The date that some templates print is always 26 July 2024 (the one that Llama 3.1 falls back to): a prompt that
    changes at midnight would be another one than was trained, and a resumed run would differ from an uninterrupted one.

    Raises:
        DataError: If the template refuses these messages, in its own words.
    """
    try:
        template = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            chat_template=_FIXED_CLOCK + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            enable_thinking=thinking,
            thinking=thinking,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"the model's chat template refuses the conversation: {error}. Change the turns to suit it."
        ) from None
    assert isinstance(text, str)
    return text


def sentinels(count: int, salt: str = "") -> list[str]:
    """Contents that occur nowhere else, to learn where a template puts the contents."""
    return [f"qx{salt}{index:04d}xq" for index in range(count)]


@lru_cache(maxsize=4096)
def scaffold(tokenizer: Any, _template: str, roles: tuple[Role, ...], thinking: bool, generation_prompt: bool) -> str:  # noqa: FBT001 - a cache key
    """The rendering of sentinels in place of contents, for one sequence of roles. `_template` keys the cache."""
    marks = [Message(role, mark) for role, mark in zip(roles, sentinels(len(roles)), strict=True)]
    return render_text(tokenizer, marks, generation_prompt=generation_prompt, thinking=thinking)


@lru_cache(maxsize=64)
def _end_of_turn_id(tokenizer: Any, template: str) -> int | None:
    """The control token that the template puts after an answer, or None if it puts none."""
    text = scaffold(tokenizer, template, ("user", "assistant"), thinking=False, generation_prompt=False)
    tail = text.rpartition(sentinels(2)[1])[2]
    for token_id in tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]:
        token = tokenizer.added_tokens_decoder.get(token_id)
        if token_id == tokenizer.eos_token_id or (token is not None and token.special):
            return int(token_id)
    return None


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> frozenset[int]:
    """The tokens that end an answer: training teaches them, and the server stops on them.

    They are the tokenizer's eos token, the control token that its chat template puts after an answer (Llama 3 has
    `<|eot_id|>` there while its eos may be another), and the model's own `generation_config.eos_token_id`.

    Raises:
        ModelError: If there is none, so that no answer could end.
    """
    ensure_template(tokenizer)
    found = {tokenizer.eos_token_id, _end_of_turn_id(tokenizer, tokenizer.get_chat_template())}
    configured = getattr(generation_config, "eos_token_id", None)
    found.update(configured if isinstance(configured, list | tuple) else [configured])
    ids = frozenset(int(token_id) for token_id in found if token_id is not None)
    if not ids:
        raise ModelError("The tokenizer has no token that ends an answer. Give it an eos_token.")
    return ids
