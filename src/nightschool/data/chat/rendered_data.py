"""Examples as tokens, and what is counted of them before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nightschool.data.chat.render import Rendered
from nightschool.data.chat.render_examples import render_examples
from nightschool.data.example import Example
from nightschool.errors import NothingToTrain


@dataclass(frozen=True)
class RenderedData:
    """The examples as tokens. `chats` are in the order of the chat examples, as many documents of each as the method makes."""

    chat_examples: list[Example]
    chats: list[Rendered]
    texts: list[Rendered]

    @property
    def all(self) -> list[Rendered]:
        return [*self.chats, *self.texts]


@dataclass(frozen=True)
class RoleTokens:
    """Tokens of one role in one epoch, and how many of them carry loss."""

    tokens: int
    trained: int


def render_data(tokenizer: Any, examples: Sequence[Example], max_seq_len: int, num_workers: int) -> RenderedData:
    """Render chats, one document each, and texts, as many documents as they need."""
    chats = [example for example in examples if example.messages]
    texts = [example for example in examples if not example.messages]
    return RenderedData(
        chats,
        render_examples(tokenizer, chats, max_seq_len, num_workers=num_workers),
        render_examples(tokenizer, texts, max_seq_len, num_workers=num_workers),
    )


def refuse_nothing_to_train(rendered: Sequence[Rendered], max_seq_len: int, max_cut_share: float) -> None:
    """Raise NothingToTrain if nothing, or too little, of what should be trained would be."""
    trained = sum(document.trained_tokens for document in rendered)
    cut = sum(document.cut_trained for document in rendered)
    if trained == 0:
        why = f"all {cut} of them are cut off by train.max_seq_len={max_seq_len}" if cut else "the data has none"
        raise NothingToTrain(
            f"No token of the {len(rendered)} examples would carry loss: {why}. "
            + ("Raise train.max_seq_len." if cut else "Examples need an answer, with a weight above 0.")
        )
    share = cut / (cut + trained)
    if share > max_cut_share:
        raise NothingToTrain(
            f"train.max_seq_len={max_seq_len} cuts off {share:.0%} of the {cut + trained} tokens that would carry loss, "
            f"and train.max_cut_share allows {max_cut_share:.0%}. Raise one of the two, or shorten the examples."
        )


def tokens_by_role(rendered: list[Rendered], scale: float = 1.0) -> dict[str, RoleTokens]:
    """Count the tokens of each role, and those that carry loss, times `scale`; most frequent role first."""
    tokens: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for document in rendered:
        tokens.update(document.roles)
        trained.update(role for role, weight in zip(document.roles, document.weights, strict=True) if weight > 0)
    return {
        role: RoleTokens(round(count * scale), round(trained[role] * scale)) for role, count in tokens.most_common()
    }
