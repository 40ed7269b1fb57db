"""Rows → examples: the spellings in which people keep questions, answers, conversations and texts.

`FORMATS` is the table. Every reader checks what it takes and says which field of which line is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nightschool.data.example import ROLES, Example, Message, NeededFact, Role, Target
from nightschool.data.sources.rows import Row
from nightschool.errors import DataError

ROLE_NAMES: dict[str, Role] = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}
_PREFERENCES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def detect(fields: Mapping[str, Any]) -> str | None:
    """The name of the format that a row with these fields has, or None."""
    if any(better in fields and worse in fields for better, worse in _PREFERENCES):
        return "preference"
    if "query" in fields and ("targets" in fields or "target_indices" in fields):
        return "labels"
    if "query" in fields and "retrieved" in fields:
        return "query_retrieved"
    if "messages" in fields:
        return "messages"
    if "conversations" in fields or "conversation" in fields:
        return "conversations"
    if "instruction" in fields and ("output" in fields or "instances" in fields):
        return "alpaca"
    if any(first in fields and second in fields for first, second in _PAIRS):
        return "prompt_completion"
    return "text" if "text" in fields else None


def to_examples(row: Row, format: str = "auto") -> list[Example]:  # noqa: A002 - the recipe's word
    """Read one row. It gives one example, or several where a row of seed tasks has several instances.

    Args:
        row: The row and where it came from.
        format: A key of `FORMATS`, or `auto` to tell by the fields.

    Raises:
        DataError: If a field is missing, blank or of the wrong kind; the message names file, line and field.
    """
    name = detect(row.fields) if format == "auto" else format
    try:
        if name is None:
            raise _Wrong(
                f"the fields {_names(row.fields)} fit no format. Known are query + retrieved, messages, conversations, "
                "instruction + output, prompt + completion, question + answer, prompt + chosen + rejected, query + targets, and text."
            )
        contents = FORMATS[name](row.fields)
        paraphrases = _paraphrases(row.fields)
        if paraphrases and name == "text":
            raise _Wrong(
                "'paraphrases' are other wordings of a question, but a plain text has none. Take the field out."
            )
        key, alternatives = (
            ((), ()) if name in ("text", "labels") else (_key(row.fields, name), _alternatives(row.fields))
        )
        own_id, targets = _id(row.fields), _targets(row.fields) if name == "labels" else ()
        fact = targets[0].fact if targets else _fact(row.fields)
        pairs = [content if isinstance(content, _Pair) else _Pair(content, "") for content in contents]
        return [
            Example(
                messages=content if isinstance(content, tuple) else (),
                text=content if isinstance(content, str) else None,
                rejected=rejected,
                paraphrases=paraphrases,
                key=key,
                alternatives=alternatives,
                fact=fact,
                targets=targets,
                id=f"{own_id}.{index}" if own_id and len(contents) > 1 else own_id,
                source=row.source,
                line=row.line,
            )
            for index, (content, rejected) in enumerate(pairs)
        ]
    except _Wrong as wrong:
        raise DataError(f"{row.where}: {wrong}") from None


def role_named(name: Any) -> Role | None:
    """The role that a name in any spelling means (`human` is the user); None if it means none."""
    return ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None


def parse_messages(turns: Any, field: str = "messages") -> tuple[Message, ...]:
    """Turns in either spelling, `role` + `content` or `from` + `value`, without a demand on their order.

    Raises:
        DataError: If a turn is malformed; the message names `field` and the turn.
    """
    try:
        return _turns(turns, field)
    except _Wrong as wrong:
        raise DataError(str(wrong)) from None


def needed_fact(parts: Mapping[str, Any]) -> NeededFact:
    """A fact of `text`, or `subject`, `relation` and `value` with or without it.

    Raises:
        DataError: If it is malformed.
    """
    try:
        return _needed(parts)
    except _Wrong as wrong:
        raise DataError(str(wrong)) from None


class _Wrong(Exception):
    """What is wrong with a row, without its place."""


class _Pair(NamedTuple):
    """What a row gives, and the answer that is worse than its last turn; the empty string where there is none."""

    content: tuple[Message, ...] | str
    rejected: str


def _query_retrieved(fields: Mapping[str, Any]) -> list[tuple[Message, ...]]:
    return [_pair(fields, _text(fields, "query"), _text(fields, "retrieved"))]


def _messages(fields: Mapping[str, Any]) -> list[tuple[Message, ...]]:
    return [_conversation(_turns(fields.get("messages"), "messages"), "messages")]


def _conversations(fields: Mapping[str, Any]) -> list[tuple[Message, ...]]:
    field = "conversations" if "conversations" in fields else "conversation"
    turns = _turns(fields.get(field), field)
    return [_conversation((*_system(fields), *turns), field)]


def _alpaca(fields: Mapping[str, Any]) -> list[tuple[Message, ...]]:
    instruction = _text(fields, "instruction")
    if "instances" not in fields:
        return [_instance(fields, instruction, fields, "")]
    instances = fields["instances"]
    if not isinstance(instances, list) or not instances:
        raise _Wrong(
            f"'instances' is {_kind(instances)}, but a list of objects with 'output' is expected. Write it so."
        )
    contents = []
    for index, instance in enumerate(instances):
        if not isinstance(instance, dict):
            raise _Wrong(
                f"'instances[{index}]' is {_kind(instance)}, but an object with 'output' is expected. Write it so."
            )
        contents.append(_instance(fields, instruction, instance, f"instances[{index}]."))
    return contents


def _instance(fields: Mapping[str, Any], instruction: str, instance: Mapping[str, Any], at: str) -> tuple[Message, ...]:
    context = instance.get("input", "")
    if not isinstance(context, str):
        raise _Wrong(f"'{at}input' is {_kind(context)}, but a text is expected. Write it in quotes.")
    question = f"{instruction}\n\n{_encodable(context, at + 'input')}" if context.strip() else instruction
    return _pair(fields, question, _text(instance, "output", at))


def _prompt_completion(fields: Mapping[str, Any]) -> list[tuple[Message, ...]]:
    named = _names_of_pair(fields)
    if named is None:
        raise _Wrong(
            f"the fields {_names(fields)} hold no pair. Expected are prompt + completion or question + answer."
        )
    first, second = named
    question, answer = fields[first], fields[second]
    if isinstance(question, list) or isinstance(answer, list):
        before = _turns(question, first) if isinstance(question, list) else (Message("user", _text(fields, first)),)
        after = _turns(answer, second) if isinstance(answer, list) else (Message("assistant", _text(fields, second)),)
        context = tuple(Message(m.role, m.content, 0.0 if m.role == "assistant" else 1.0) for m in before)
        return [_conversation((*_system(fields), *context, *after), second)]
    return [_pair(fields, _text(fields, first), _text(fields, second))]


def _names_of_pair(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    return next(((first, second) for first, second in _PAIRS if first in fields and second in fields), None)


def _preference(fields: Mapping[str, Any]) -> list[_Pair]:
    """A prompt with the better and the worse answer to it; or two conversations that differ in their last answer."""
    for better, worse in _PREFERENCES:
        if better in fields and worse in fields:
            break
    else:
        raise _Wrong(f"the fields {_names(fields)} hold no pair. Expected are prompt + chosen + rejected. Add them.")
    before = _prompt_of_pair(fields)
    chosen, rejected = (_answer_of_pair(fields, name) for name in (better, worse))
    if before is None:
        if chosen[:-1] != rejected[:-1]:
            raise _Wrong(f"'{better}' and '{worse}' are not the same conversation up to the last answer. Make them so.")
        before = chosen[:-1]
    elif len(chosen) > 1 or len(rejected) > 1:
        raise _Wrong(
            f"'{better}' and '{worse}' are one answer each where there is a prompt. Leave the other turns out."
        )
    if chosen[-1].content.strip() == rejected[-1].content.strip():
        raise _Wrong(f"'{better}' and '{worse}' are the same answer, so there is nothing to prefer. Take the row out.")
    context = tuple(Message(m.role, m.content, 0.0 if m.role == "assistant" else 1.0) for m in before)
    turns = _conversation((*_system(fields), *context, Message("assistant", chosen[-1].content)), better)
    return [_Pair(turns, rejected[-1].content)]


def _prompt_of_pair(fields: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The turns before both answers; None if each of the two brings its own."""
    given = fields.get("input")
    if isinstance(given, dict):
        return _turns(given.get("messages"), "input.messages")
    if "messages" in fields:
        return _turns(fields["messages"], "messages")
    name = "prompt" if "prompt" in fields else "question"
    if name not in fields:
        return None
    return _turns(fields[name], name) if isinstance(fields[name], list) else (Message("user", _text(fields, name)),)


def _answer_of_pair(fields: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    if not isinstance(fields[name], list):
        return (Message("assistant", _text(fields, name)),)
    turns = _turns(fields[name], name)
    if turns[-1].role != "assistant":
        raise _Wrong(f"the last turn of '{name}' is of the {turns[-1].role}. End with the assistant's answer.")
    return turns


def _labels(fields: Mapping[str, Any]) -> list[tuple[Message, ...]]:
    """A question, and what the nearest of its facts says in place of an answer."""
    best = _targets(fields)[0].fact
    return [(Message("user", _text(fields, "query")), Message("assistant", best.value or best.text))]


def _targets(fields: Mapping[str, Any]) -> tuple[Target, ...]:
    """Facts with their scores, best first."""
    given = fields.get("targets")
    if not isinstance(given, list) or not given:
        raise _Wrong(
            f"'targets' is {_kind(given)}, but a list of facts with a score is expected. Write it so, or label the questions "
            "again: nightschool memory label."
        )
    targets = []
    for number, one in enumerate(given):
        score = one.get("score") if isinstance(one, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise _Wrong(f"'targets[{number}].score' is {score!r}, but how near the fact is, a number, is expected.")
        try:
            targets.append(Target(_needed(one), float(score)))
        except _Wrong as wrong:
            raise _Wrong(str(wrong).replace("'fact", f"'targets[{number}]", 1)) from None
    return tuple(sorted(targets, key=lambda target: -target.score))


def _plain_text(fields: Mapping[str, Any]) -> list[str]:
    return [_text(fields, "text")]


FORMATS: dict[str, Callable[[Mapping[str, Any]], list[Any]]] = {
    "query_retrieved": _query_retrieved,
    "messages": _messages,
    "conversations": _conversations,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "labels": _labels,
    "text": _plain_text,
}


def _pair(fields: Mapping[str, Any], question: str, answer: str) -> tuple[Message, ...]:
    return (*_system(fields), Message("user", question), Message("assistant", answer))


def _system(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    if not fields.get("system"):
        return ()
    return (Message("system", _text(fields, "system")),)


def _turns(turns: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise _Wrong(
            f'\'{field}\' is {_kind(turns)}, but a list of turns is expected. Write [{{"role": …, "content": …}}, …].'
        )
    return tuple(_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns))


def _turn(turn: Any, at: str) -> Message:
    if not isinstance(turn, dict):
        raise _Wrong(f"'{at}' is {_kind(turn)}, but an object with 'role' and 'content' is expected. Write it so.")
    role_field, content_field = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    name = turn.get(role_field)
    role = role_named(name)
    if role is None:
        raise _Wrong(f"'{at}.{role_field}' is {name!r}, but a role is one of {', '.join(ROLE_NAMES)}. Correct it.")
    if turn.get("tool_calls"):
        raise _Wrong(f"'{at}.tool_calls': calls of tools are not read. Write the call into '{at}.{content_field}'.")
    content = turn.get(content_field)
    if isinstance(content, list):
        turn = {
            **turn,
            content_field: "".join(_part(part, f"{at}.{content_field}[{i}]") for i, part in enumerate(content)),
        }
    return Message(role, _text(turn, content_field, f"{at}."), _weight(turn, role, at))


def _part(part: Any, at: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise _Wrong(f'\'{at}\' is not a part with a text. Only parts {{"type": "text", "text": …}} can be learned.')
    return text


def _weight(turn: Mapping[str, Any], role: Role, at: str) -> float:
    weight = turn.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise _Wrong(f"'{at}.weight' is {weight!r}, but the weight of a turn is a number of at least 0. Correct it.")
    if role != "assistant":
        if weight == 0:
            return 1.0  # it says what is so anyway: only answers are learned
        raise _Wrong(f"'{at}.weight' is {weight!r} on a turn of the {role}, but only answers are learned. Take it out.")
    return float(weight)


def _conversation(turns: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    last = turns[-1]
    if last.role != "assistant":
        raise _Wrong(
            f"the last turn of '{field}' is of the {last.role}, but it is the answer that is learned. End with the assistant."
        )
    if not any(turn.role == "user" for turn in turns):
        raise _Wrong(f"'{field}' has no turn of the user, so there is nothing to answer. Add the question.")
    if not any(turn.role == "assistant" and turn.weight > 0 for turn in turns):
        raise _Wrong(
            f"every answer in '{field}' has the weight 0, so there is nothing to learn. Give one a weight of 1."
        )
    return turns


def _text(fields: Mapping[str, Any], name: str, at: str = "") -> str:
    value = fields.get(name)
    if value is None:
        raise _Wrong(f"'{at}{name}' is missing. Add it.")
    if not isinstance(value, str):
        raise _Wrong(f"'{at}{name}' is {_kind(value)}, but a text is expected. Write it in quotes.")
    if not value.strip():
        raise _Wrong(
            f"'{at}{name}' is {'blank' if value else 'empty'}, so there is nothing to learn. Fill it, or take the row out."
        )
    return _encodable(value, at + name)


def _encodable(text: str, name: str) -> str:
    """JSON can escape half a character; no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Wrong(
            f"'{name}' holds half a character ({text[error.start]!a}) at place {error.start}. Write the whole one."
        ) from None
    return text


def _paraphrases(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return _texts(fields.get("paraphrases"), "paraphrases")


def _alternatives(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return _texts(fields.get("alternatives"), "alternatives")


def _key(fields: Mapping[str, Any], format_name: str) -> tuple[str, ...]:
    """The parts of `answer`, where that is not the answer itself; none where it is blank, as a cell of a table may be."""
    key = fields.get("answer")
    if key is None or (format_name == "prompt_completion" and _names_of_pair(fields) == ("question", "answer")):
        return ()
    if isinstance(key, int | float) and not isinstance(key, bool):
        return (str(key),)
    if isinstance(key, str):
        return (_encodable(key, "answer"),) if key.strip() else ()
    if not isinstance(key, list):
        raise _Wrong(
            f"'answer' is {_kind(key)}, but what the answer has to say, a text or a list of texts, is expected. Write it so."
        )
    return _texts(key, "answer")


def _texts(given: Any, field: str) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise _Wrong(f"'{field}' is {_kind(given)}, but a list of texts is expected. Write [\"…\", …].")
    return tuple(_text({"": text}, "", f"{field}[{index}]") for index, text in enumerate(given))


def _id(fields: Mapping[str, Any]) -> str:
    own_id = fields.get("id")
    if own_id is None:
        return ""
    if isinstance(own_id, bool) or not isinstance(own_id, str | int):
        raise _Wrong(f"'id' is {_kind(own_id)}, but a text or a whole number is expected. Correct it.")
    return _encodable(str(own_id), "id")


def _fact(fields: Mapping[str, Any]) -> NeededFact | None:
    """What the answer needs of an explicit memory: a text, or subject, relation and value, with or without one."""
    given = fields.get("fact")
    if given is None:
        return None
    if isinstance(given, str):
        return NeededFact(_text(fields, "fact"))
    if not isinstance(given, dict):
        raise _Wrong(f"'fact' is {_kind(given)}, but a text, or subject + relation + value, is expected. Write it so.")
    return _needed(given)


def _needed(given: Mapping[str, Any]) -> NeededFact:
    if not any(name in given for name in ("subject", "relation", "value")):
        return NeededFact(_text(given, "text", "fact."))
    subject, relation, value = (_text(given, name, "fact.").strip() for name in ("subject", "relation", "value"))
    text = _text(given, "text", "fact.") if given.get("text") is not None else f"{subject} {relation} {value}."
    missing = [name for name, part in (("subject", subject), ("value", value)) if part not in text]
    if missing:
        raise _Wrong(f"'fact.text' does not hold the {' and the '.join(missing)} of the fact. Write the same words.")
    return NeededFact(text, subject, relation, value)


def _names(fields: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in fields]
    return (", ".join(names[:8]) + (", …" if len(names) > 8 else "")) or "(none)"


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict) and not value:
        return "empty"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
