"""Chat templates: our default one, and what any template does to messages.

A model's template is part of its tokenizer. It is run here and nowhere else, always with the same settings, so that
training, evaluation, server and chat see the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import jinja2

from nightschool.data.chat.sandbox import TooMuch, render
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


def _fixed_clock(format: str) -> str:  # noqa: A002 - what templates call it with
    for code, value in _DATE.items():
        format = format.replace(code, value)  # noqa: A001
    return format


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
        DataError: If the template refuses these messages, in its own words, is faulty, or takes too much time or room.
    """
    values = {
        **tokenizer.special_tokens_map,
        "messages": [{"role": m.role, "content": m.content} for m in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": generation_prompt,
        "enable_thinking": thinking,
        "thinking": thinking,
    }
    characters = sum(len(m.content) for m in messages)
    try:
        return render(tokenizer.get_chat_template(), values, characters=characters, strftime_now=_fixed_clock)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the model's chat template is malformed: {_said(error)} Correct it in the model's folder."
        ) from None
    except TooMuch as error:
        raise DataError(
            f"the model's chat template does not end well: {_said(error)} Take another base, or correct it."
        ) from None
    except Exception as error:  # the template is foreign code: it raises whatever it stumbles over
        raise DataError(
            f"the model's chat template refuses the conversation: {_said(error)} Change the turns to suit it."
        ) from None


def _said(error: Exception) -> str:
    """What a template raised, as one sentence of bounded length."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if not isinstance(error, jinja2.TemplateError | ValueError | TypeError):
        said = f"{type(error).__name__}: {said}"
    return said if said.endswith((".", "!", "?")) else f"{said}."


def sentinels(count: int, salt: str = "") -> list[str]:
    """Contents that occur nowhere else, to learn where a template puts the contents."""
    return [f"qx{salt}{index:04d}xq" for index in range(count)]


def scaffold(tokenizer: Any, roles: tuple[Role, ...], *, thinking: bool, generation_prompt: bool) -> str:
    """The rendering of sentinels in place of contents, for one sequence of roles."""
    learned = _learned(tokenizer)
    key = roles, thinking, generation_prompt
    if key not in learned.scaffolds:
        marks = [Message(role, mark) for role, mark in zip(roles, sentinels(len(roles)), strict=True)]
        text = render_text(tokenizer, marks, generation_prompt=generation_prompt, thinking=thinking)
        if len(learned.scaffolds) >= _KEPT_SCAFFOLDS:
            learned.scaffolds.clear()
        learned.scaffolds[key] = text
    return learned.scaffolds[key]


@dataclass
class _Learned:
    """What was learned of a template by running it; forgotten with its tokenizer, so that a server may swap for years."""

    template: str
    scaffolds: dict[tuple[tuple[Role, ...], bool, bool], str] = field(default_factory=dict)
    stop_token_ids: frozenset[int] | None = None


_KEPT_SCAFFOLDS = 4096
_of_tokenizer: WeakKeyDictionary[Any, _Learned] = WeakKeyDictionary()


def _learned(tokenizer: Any) -> _Learned:
    template = tokenizer.get_chat_template()
    learned = _of_tokenizer.get(tokenizer)
    if learned is None or learned.template != template:
        learned = _of_tokenizer[tokenizer] = _Learned(template)
    return learned


def _end_of_turn_id(tokenizer: Any) -> int | None:
    """The control token that the template puts after an answer, or None if it puts none."""
    text = scaffold(tokenizer, ("user", "assistant"), thinking=False, generation_prompt=False)
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
    learned = _learned(tokenizer)
    if learned.stop_token_ids is None:
        own = {tokenizer.eos_token_id, _end_of_turn_id(tokenizer)}
        learned.stop_token_ids = frozenset(int(token_id) for token_id in own if token_id is not None)
    configured = getattr(generation_config, "eos_token_id", None)
    more = configured if isinstance(configured, list | tuple) else [configured]
    ids = learned.stop_token_ids | {int(token_id) for token_id in more if token_id is not None}
    if not ids:
        raise ModelError("The tokenizer has no token that ends an answer. Give it an eos_token.")
    return ids
