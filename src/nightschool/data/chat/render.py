"""The one rendering of examples into tokens with loss weights; training, evaluation, server and chat all use it.

    messages ── template ──► text ── tokenizer ──► tokens
                              │ spans of the answers │ offsets
                              └──────────────────────┴──► weights

What the server feeds for a question (`render_prompt`) is, token for token, the beginning of what training saw for it
(`render_example`), whatever the template and wherever the tokenizer would like to merge across the border. Loss lies
on the last answer from its first token to the token that ends it, and on earlier answers whose weight is above 0.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nightschool.data.chat.loss_mask import Layout, lay_out
from nightschool.data.chat.message_spans import Span
from nightschool.data.chat.special_tokens import disarmed
from nightschool.data.chat.template import ensure_template, render_text, stop_token_ids
from nightschool.data.example import Example, Message
from nightschool.errors import DataError, ModelError

__all__ = ["Rendered", "ensure_template", "render_example", "render_pieces", "render_prompt", "stop_token_ids"]


@dataclass(frozen=True)
class Rendered:
    """Tokens of one document.

    `weights[i]` is the loss weight of predicting `input_ids[i]` from what stands before it; `weights[0]` is 0.
    `roles[i]` is the role of the turn whose content holds token i, `template` for what the template adds, or `text`.
    `cut_tokens` counts the tokens that did not fit, `cut_trained` those of them that would have carried loss.
    """

    input_ids: list[int]
    weights: list[float]
    roles: list[str]
    cut_tokens: int = 0
    cut_trained: int = 0

    @property
    def trained_tokens(self) -> int:
        return sum(weight > 0 for weight in self.weights)


def render_prompt(tokenizer: Any, messages: Sequence[Message], *, thinking: bool = False) -> list[int]:
    """The tokens that the server feeds before it generates the next answer.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        messages: The turns so far.
        thinking: For models that can think before they answer: let them. Answers are trained with what they hold, so
            data without thoughts belongs to False.

    Raises:
        DataError: If the chat template refuses the messages.
    """
    ensure_template(tokenizer)
    text = render_text(tokenizer, disarmed(tokenizer, messages), generation_prompt=True, thinking=thinking)
    return _encode(tokenizer, text)[0]


def render_example(tokenizer: Any, example: Example, max_seq_len: int) -> Rendered:
    """The tokens and loss weights of one example, cut to `max_seq_len` tokens.

    Of a conversation, whole early turns go first (a question with its answer; never the system turn), and only then
    the end of the last answer. Of a text the end is cut; `render_pieces` loses nothing of it.

    Raises:
        DataError: If the template refuses the conversation, or if the answers cannot be found in what it makes of it.
    """
    if example.text is not None:
        whole = _render_whole_text(tokenizer, example.text)
        return _cut_end(whole, max_seq_len)
    return _render_chats(tokenizer, example, [example.messages], max_seq_len)[0]


def render_pieces(tokenizer: Any, example: Example, max_seq_len: int) -> list[Rendered]:
    """Like `render_example`, but a long text becomes several documents and nothing of it is lost.

    A piece begins with the last token of the one before, as context, so that every token but the first of the text
    is predicted exactly once. A preference pair becomes two documents: the better answer, then the worse one, after the
    same turns.
    """
    if example.text is None:
        answers = [example.messages]
        if example.rejected:
            answers.append((*example.messages[:-1], Message("assistant", example.rejected)))
        return _render_chats(tokenizer, example, answers, max_seq_len)
    whole = _render_whole_text(tokenizer, example.text)
    pieces = []
    for start in range(0, max(len(whole.input_ids) - 1, 1), max_seq_len - 1):
        end = start + max_seq_len
        weights = [0.0, *whole.weights[start + 1 : end]]
        pieces.append(Rendered(whole.input_ids[start:end], weights, whole.roles[start:end]))
    return pieces


def _encode(tokenizer: Any, text: str, *, special: bool = False) -> tuple[list[int], list[Span]]:
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} gives no offsets of its tokens. Use the fast tokenizer of this model."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text holds half a character ({text[error.start]!a}). Write the whole one.") from None
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def _render_whole_text(tokenizer: Any, text: str) -> Rendered:
    ids, _ = _encode(tokenizer, text, special=True)
    eos = tokenizer.eos_token_id
    if eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
    return Rendered(ids, [0.0] + [1.0] * (len(ids) - 1), ["text"] * len(ids))


def _cut_end(whole: Rendered, max_seq_len: int, *, of: Rendered | None = None) -> Rendered:
    """Keep the first `max_seq_len` tokens, and count what is missing of the uncut rendering `of`."""
    of = whole if of is None else of
    kept = replace(
        whole,
        input_ids=whole.input_ids[:max_seq_len],
        weights=whole.weights[:max_seq_len],
        roles=whole.roles[:max_seq_len],
    )
    return replace(
        kept,
        cut_tokens=max(len(of.input_ids) - len(kept.input_ids), 0),
        cut_trained=max(of.trained_tokens - kept.trained_tokens, 0),
    )


def _render_chats(
    tokenizer: Any, example: Example, chats: Sequence[Sequence[Message]], max_seq_len: int
) -> list[Rendered]:
    """Conversations that differ in their last answers alone; what is dropped before it is the same in all of them."""
    try:
        whole = [_render_whole_chat(tokenizer, messages) for messages in chats]
        longest = max(range(len(chats)), key=lambda index: len(whole[index].input_ids))
        if len(whole[longest].input_ids) <= max_seq_len:
            return whole
        # The fewest early exchanges to drop so that the rest fits: longer beginnings dropped, shorter rest.
        counts = range(1, len(_exchange_starts(chats[longest])))
        fits = bisect.bisect_left(
            counts,
            -max_seq_len,
            key=lambda count: -len(_render_whole_chat(tokenizer, _without(chats[longest], count)).input_ids),
        )
        if counts:
            chats = [_without(messages, counts[min(fits, len(counts) - 1)]) for messages in chats]
        return [
            _cut_end(_render_whole_chat(tokenizer, messages), max_seq_len, of=before)
            for messages, before in zip(chats, whole, strict=True)
        ]
    except DataError as error:
        raise DataError(f"{example.source or 'an example'}:{example.line}: {error}") from None


def _exchange_starts(messages: Sequence[Message]) -> list[int]:
    """Where exchanges begin: at each turn of the user that does not follow another one."""
    starts = []
    before = None
    for index, message in enumerate(messages):
        if message.role == "system":
            continue
        if before is None or (message.role == "user" and before != "user"):
            starts.append(index)
        before = message.role
    return starts


def _without(messages: Sequence[Message], count: int) -> tuple[Message, ...]:
    """The messages without the `count` earliest exchanges; turns of the system stay."""
    start = _exchange_starts(messages)[count]
    return tuple(m for index, m in enumerate(messages) if m.role == "system" or index >= start)


def _render_whole_chat(tokenizer: Any, messages: Sequence[Message]) -> Rendered:
    if not messages or messages[-1].role != "assistant":
        raise DataError("the last turn is not the assistant's, so there is no answer to learn. End with one.")
    ensure_template(tokenizer)
    stops = stop_token_ids(tokenizer)
    stop_texts = [tokenizer.convert_ids_to_tokens(stop) for stop in sorted(stops)]
    for message in messages:
        marker = next((stop for stop in stop_texts if stop in message.content), None)
        if message.role == "assistant" and marker is not None:
            raise DataError(f"an answer holds {marker!r}, which would end it there. Take it out of the text.")
    messages = disarmed(tokenizer, messages)
    layout = lay_out(tokenizer, messages, stop_texts)
    ids, offsets, prompt_length = _tokens(tokenizer, layout)

    end = next((i + 1 for i in range(prompt_length, len(ids)) if ids[i] in stops), None)
    if end is None:  # without a token that ends it the model would never stop
        ids.append(tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stops))
        offsets.append((len(layout.text), len(layout.text)))
        end = len(ids)
    weights = [0.0] * len(ids)
    roles = ["template"] * len(ids)
    bounds = _bounds(offsets)
    for message, span in zip(messages, layout.contents, strict=True):
        for i in _inside(bounds, span, prompt_length, layout.text) if span else ():
            roles[i] = message.role
    for span, weight in layout.answers:
        inside = _inside(bounds, span, prompt_length, layout.text)
        after = inside[-1] + 1 if inside else prompt_length
        if after < prompt_length and ids[after] in stops and bounds[after][0] < span[1]:
            inside.append(after)  # a control token that swallows the white space behind it
        for i in inside:
            weights[i], roles[i] = weight, "assistant"
    for i in range(prompt_length, end):
        weights[i], roles[i] = messages[-1].weight, "assistant"
    weights[0] = 0.0
    return Rendered(ids, weights, roles)


def _tokens(tokenizer: Any, layout: Layout) -> tuple[list[int], list[Span], int]:
    """Ids, offsets, and the number of tokens of the prompt, which the server's tokens are equal to.

    The whole text is tokenized at once. Where that merges the end of the prompt with the beginning of the answer, the
    two are tokenized one after the other, as the server does.
    """
    prompt_ids, prompt_offsets = _encode(tokenizer, layout.prompt)
    ids, offsets = _encode(tokenizer, layout.text)
    border = len(prompt_ids)
    if ids[:border] == prompt_ids:
        return ids, offsets, border
    written = _decode(tokenizer, ids)
    answer = layout.text[len(layout.prompt) :]
    anchor = tokenizer.eos_token or ""
    for before in dict.fromkeys(("", anchor)):  # some tokenizers put a space before whatever comes first
        rest_ids, rest_offsets = _encode(tokenizer, before + answer)
        skipped = 1 if before else 0
        if _decode(tokenizer, prompt_ids + rest_ids[skipped:]) == written:
            shift = len(layout.prompt) - len(before)
            moved = [(start + shift, end + shift) for start, end in rest_offsets[skipped:]]
            return prompt_ids + rest_ids[skipped:], prompt_offsets + moved, border
    raise DataError(
        "the tokenizer merges the question with the answer and cannot be made to part them. Change how the answer begins."
    )


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _bounds(offsets: list[Span]) -> list[Span]:
    """Offsets whose tokens join without gaps: some tokenizers leave white space out of them.

    A gap belongs to the token after it, so that a token which begins before an answer is never taken for part of it.
    """
    bounds = []
    reached = 0
    for start, end in offsets:
        bounds.append((min(start, reached), end))
        reached = max(reached, end)
    return bounds


def _inside(bounds: list[Span], span: Span, below: int, text: str) -> list[int]:
    """Tokens of the prompt that lie inside the span; the last may end with white space that the template put after it."""
    start, end = span
    first = bisect.bisect_left(bounds, start, hi=below, key=lambda bound: bound[0])
    found = []
    for i in range(first, below):
        if bounds[i][1] > end and not (bounds[i][0] < end and text[end : bounds[i][1]].isspace()):
            break
        if bounds[i][0] >= start:
            found.append(i)
    return found
