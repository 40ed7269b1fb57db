"""The whole way from real files to loss masks. Skipped where the files are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nightschool.config.recipe import DataSource
from nightschool.data.chat.render import render_example, render_prompt, stop_token_ids
from nightschool.data.chat.render_examples import render_examples
from nightschool.data.sources.load import read_file
from nightschool.data.tokenizer import train_bpe
from nightschool.feedback.training_data import load_sources

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not here")


@pytest.fixture(scope="module")
def tokenizer():
    text = (DATA / "text" / "tinyshakespeare.txt").read_text()[:300_000]
    return train_bpe([text], 1500)


@pytest.mark.parametrize(
    ("path", "count", "format_name"),
    [("chat/alpaca_seed_tasks.jsonl", 175, "alpaca"), ("reasoning/gsm8k_test.jsonl", 500, "prompt_completion")],
)
def test_masks_of_real_questions(tokenizer, path: str, count: int, format_name: str) -> None:
    loaded = load_sources([DataSource.model_validate({"path": path})], root=DATA)
    assert loaded.sources[0].formats == {format_name: count}
    assert len(loaded.examples) >= count - 5
    (end,) = stop_token_ids(tokenizer)
    for example in loaded.examples:
        rendered = render_example(tokenizer, example, 100_000)
        prompt = render_prompt(tokenizer, example.messages[:-1])
        assert rendered.input_ids[: len(prompt)] == prompt
        trained = [i for i, weight in zip(rendered.input_ids, rendered.weights, strict=True) if weight]
        assert trained[-1] == end
        assert tokenizer.decode(trained[:-1]) == example.answer
        assert not any(rendered.weights[: len(prompt)])


def test_a_book_becomes_documents_without_loss_of_a_token(tokenizer) -> None:
    (book,) = read_file(DATA / "text" / "news-from-nowhere.txt").examples
    pieces = render_examples(tokenizer, [book], 512)
    assert all(len(piece.input_ids) <= 512 for piece in pieces)
    ids = pieces[0].input_ids + [i for piece in pieces[1:] for i in piece.input_ids[1:]]
    assert tokenizer.decode(ids[:-1]) == book.text
    assert sum(piece.trained_tokens for piece in pieces) == len(ids) - 1


def test_every_chat_and_reasoning_file_can_be_read() -> None:
    for folder in ("chat", "reasoning", "text"):
        for path in sorted((DATA / folder).iterdir()):
            assert read_file(path).examples
