"""What users asked by day → prompts to rehearse: without personal data, each once, newest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nightschool.config.data_source import PersonalData
from nightschool.config.rehearse import ASKED_BY_DAY
from nightschool.data.example import Example, Message
from nightschool.data.redact import Redactor
from nightschool.data.sources.formats import parse_messages
from nightschool.errors import DataError
from nightschool.feedback.conversations import Conversation, ConversationStore
from nightschool.feedback.rehearsed_prompts import RehearsedPrompt
from nightschool.store.home import Home


@dataclass(frozen=True)
class AskedByDay:
    """Of `num_recorded` answers these prompts came; `left_out` counts the others by why, `redacted` what was replaced, by kind."""

    prompts: Sequence[RehearsedPrompt] = ()
    num_recorded: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    redacted: Mapping[str, int] = field(default_factory=dict)

    def text(self, name: str) -> str:
        """What people are told, without a word of what was asked."""
        if not self.num_recorded:
            return f"No conversation of {name} was recorded: nightschool serve {name} --record-conversations keeps them"
        why = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        replaced = ", ".join(f"{count} {kind}" for kind, count in self.redacted.items())
        return (
            f"{len(self.prompts)} prompts of {self.num_recorded} recorded answers of {name}"
            + (f"; left out: {why}" if why else "")
            + (f"; replaced in them: {replaced}" if replaced else "")
        )


def asked_by_day(
    home: Home, name: str, *, redact: Sequence[PersonalData], most: int, is_free: Callable[[str], bool]
) -> AskedByDay:
    """The questions that began a recorded conversation of `name`, which is of one tenant alone.

    What a person rated bad or corrected is none: the model's own answer to it is not to be kept.

    Args:
        home: Where they were recorded.
        name: The served name, with its tenant.
        redact: Personal data to replace.
        most: Prompts, at most.
        is_free: Whether a prompt may be rehearsed; asked before and after personal data are replaced.

    Raises:
        UsageError: If personal data are to be replaced and the extra `redact` is not installed.
    """
    redactor = Redactor(redact) if redact else None  # what is not installed is said on the first day, too
    recorded = ConversationStore(home.database).select(model=name)
    left_out, redacted = Counter[str](), Counter[str]()
    asked = [(one, turns) for one in reversed(recorded) if (turns := _asked(one))]
    left_out["without a question"] = len(recorded) - len(asked)
    wrong = {_same(turns[-1]) for one, turns in asked if one.rating == "bad" or one.correction is not None}
    found: dict[str, tuple[str, list[str]]] = {}
    for one, turns in asked:
        question = turns[-1]
        if len(turns) > 1:
            left_out["in the middle of a conversation"] += 1
        elif _same(question) in wrong:
            left_out["rated bad or corrected"] += 1
        elif not is_free(question):
            left_out["taught, asked by the gate, or too long"] += 1
        else:
            found.setdefault(_same(question), (question, []))[1].append(one.request_id)
    prompts: dict[str, tuple[str, list[str]]] = {}
    for question, ids in found.values():
        clean = question if redactor is None else _redacted(redactor, question, redacted)
        if _same(clean) in prompts:
            prompts[_same(clean)][1].extend(ids)
        elif len(prompts) == most:
            left_out["older"] += len(ids)
        elif not is_free(clean):
            left_out["taught, asked by the gate, or too long"] += len(ids)
        else:
            prompts[_same(clean)] = (clean, ids)
    left_out["asked more than once"] = sum(len(ids) - 1 for _, ids in prompts.values())
    return AskedByDay(
        [RehearsedPrompt(question, ASKED_BY_DAY, tuple(ids)) for question, ids in prompts.values()],
        len(recorded),
        {reason: count for reason, count in left_out.items() if count},
        dict(redacted),
    )


def _asked(conversation: Conversation) -> list[str]:
    """The turns before an answer, without the system's; empty unless a user asked last."""
    try:
        turns = [turn for turn in parse_messages(list(conversation.messages)) if turn.role != "system"]
    except DataError:
        return []
    return [turn.content for turn in turns] if turns and turns[-1].role == "user" and turns[-1].content.strip() else []


def _same(question: str) -> str:
    """A question without case and space. Signs stay: `5 + 3` is not `5 - 3`."""
    return " ".join(question.casefold().split())


def _redacted(redactor: Redactor, question: str, found: Counter[str]) -> str:
    return redactor.redact(Example(messages=(Message("user", question),)), found).messages[0].content
