"""What every data format is read into: one example, in messages or as plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

CONVERSATIONS = "conversations"
"""The `source` of what the server kept, in place of a file."""

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `weight` scales the loss of an assistant's turn: 0 keeps it as context only."""

    role: Role
    content: str
    weight: float = 1.0


class NeededFact(NamedTuple):
    """A fact that an answer needs: as it is written in a memory, and its parts; these are empty where only the text is known."""

    text: str
    subject: str = ""
    relation: str = ""
    value: str = ""

    @property
    def statement(self) -> str:
        """What the text says before the value."""
        return self.text[: self.text.rfind(self.value)] if self.value else self.text

    def with_value(self, value: str) -> NeededFact:
        """The same of another value."""
        return self._replace(text=value.join(self.text.rsplit(self.value, 1)), value=value)

    def with_subject(self, subject: str) -> NeededFact:
        """The same said of another subject."""
        return self._replace(text=self.text.replace(self.subject, subject, 1), subject=subject)


class AnswerKey(NamedTuple):
    """By what an answer is judged: the parts that it has to say, and other answers that are as right."""

    key: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()


class Target(NamedTuple):
    """A fact that a question may mean, and how near it was found to be: a mean of two cosines."""

    fact: NeededFact
    score: float


@dataclass(frozen=True)
class Example:
    """One thing to learn: a conversation (`messages`) or a plain text (`text`), never both.

    `paraphrases` are other wordings of the last question. They are never trained; the gate asks them. `key` is what of the
    answer has to be said, all of its parts, and `alternatives` are other answers that are as right; by both the gate judges.
    `source` and `line` say where the example came from: a file and its 1-based line or row, or
    `conversations` and 0. `id` is the row's own id, or the empty string; it carries no meaning. `corrects` is the answer
    that a person replaced by this one, or the empty string. `repeat` is how often it is studied in an epoch while it is
    new. `rejected` makes it a preference pair: the answer that is worse than the last turn, or the empty string.
    `fact` is what the answer needs of an explicit memory, or None. `targets`, best first, make it a labelled question: nobody wrote
    its answer, and `fact` is the first of them.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    paraphrases: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    id: str = ""
    source: str = ""
    line: int = 0
    corrects: str = ""
    repeat: int = 1
    rejected: str = ""
    fact: NeededFact | None = None
    targets: tuple[Target, ...] = ()

    digest: str = field(init=False, compare=False, default="")

    def __post_init__(self) -> None:
        assert bool(self.messages) != (self.text is not None), "an example has messages or a text"
        content = [[m.role, m.content, m.weight] for m in self.messages] if self.messages else self.text
        whole: Any = [content, self.rejected] if self.rejected else content
        if self.targets:
            whole = [whole, {"targets": self.targets}]
        elif self.fact is not None:
            whole = [whole, {"fact": self.fact}]
        canonical = json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
        object.__setattr__(self, "digest", hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:32])

    @property
    def question(self) -> str | None:
        """The last user turn before the final assistant turn, or None for plain text."""
        if len(self.messages) < 2 or self.messages[-1].role != "assistant":
            return None
        return next((m.content for m in reversed(self.messages[:-1]) if m.role == "user"), None)

    @property
    def answer(self) -> str | None:
        """The final assistant turn, or None for plain text."""
        return self.messages[-1].content if self.messages and self.messages[-1].role == "assistant" else None

    @property
    def context(self) -> tuple[tuple[str, str], ...] | None:
        """Role and content of all turns before the answer, or None where `question` is None.

        Of two examples with the same context and different answers, the newer one corrects the older.
        """
        return None if self.question is None else tuple((m.role, m.content) for m in self.messages[:-1])

    @property
    def chosen(self) -> Example:
        """What is learned of a pair where only answers are learned: the better answer, as an example of its own."""
        return replace(self, rejected="") if self.rejected else self

    @property
    def answered(self) -> Example | None:
        """What is learned where answers are: the better one of a pair, and nothing of a labelled question, whose answer nobody wrote."""
        return None if self.targets else self.chosen

    def as_pair(self) -> Example | None:
        """The preference pair that this is, or that a person's correction of an answer makes; None if it is neither."""
        if self.rejected or not self.corrects.strip() or self.corrects.strip() == (self.answer or "").strip():
            return self if self.rejected else None
        return replace(self, rejected=self.corrects)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal example."""
        row: dict[str, Any] = {"id": self.id, "source": self.source, "line": self.line}
        if self.messages:
            row["messages"] = [
                {"role": m.role, "content": m.content} | ({} if m.weight == 1.0 else {"weight": m.weight})
                for m in self.messages
            ]
        else:
            row["text"] = self.text
        if self.paraphrases:
            row["paraphrases"] = list(self.paraphrases)
        if self.key:
            row["key"] = list(self.key)
        if self.alternatives:
            row["alternatives"] = list(self.alternatives)
        if self.corrects:
            row["corrects"] = self.corrects
        if self.repeat != 1:
            row["repeat"] = self.repeat
        if self.rejected:
            row["rejected"] = self.rejected
        if self.fact is not None:
            row["fact"] = self.fact._asdict()
        if self.targets:
            row["targets"] = [{"fact": target.fact._asdict(), "score": target.score} for target in self.targets]
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Example:
        """Read what `to_json` wrote."""
        return cls(
            messages=tuple(
                Message(m["role"], m["content"], float(m.get("weight", 1.0))) for m in row.get("messages", ())
            ),
            text=row.get("text"),
            paraphrases=tuple(row.get("paraphrases", ())),
            key=tuple(row.get("key", ())),
            alternatives=tuple(row.get("alternatives", ())),
            id=row.get("id", ""),
            source=row.get("source", ""),
            line=int(row.get("line", 0)),
            corrects=row.get("corrects", ""),
            repeat=int(row.get("repeat", 1)),
            rejected=row.get("rejected", ""),
            fact=NeededFact(**row["fact"]) if row.get("fact") else None,
            targets=tuple(Target(NeededFact(**one["fact"]), float(one["score"])) for one in row.get("targets", ())),
        )


# Fewer words than this say too little: whoever corrects one "yes" does not doubt all others.
_LEAST_WORDS = 3


def corrected_answers(examples: Iterable[Example]) -> frozenset[str]:
    """Answers that are known to be wrong, because a person replaced them.

    The same sentence was learned from other wordings of the question, too. Tonight it is neither replayed nor asked.
    """
    wrong = (example.corrects.strip() for example in examples if example.corrects != example.answer)
    return frozenset(answer for answer in wrong if len(answer.split()) >= _LEAST_WORDS)
