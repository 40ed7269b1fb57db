"""The made-up world and the tokenizer that is trained on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nightschool.data.chat.render import render_example, render_prompt, stop_token_ids
from nightschool.data.example import Message
from nightschool.data.sources.load import read_file
from nightschool.data.synthetic import FIRST_NAMES, RELATIONS, SURNAMES, VOCAB_SIZE, make_world, write_world
from nightschool.data.tokenizer import train_bpe

WORLD = make_world()
TOKENIZER = train_bpe(WORLD.texts(), VOCAB_SIZE)


def test_a_seed_makes_one_world() -> None:
    assert make_world(3) == make_world(3)
    assert make_world(3) != make_world(4)
    assert make_world(3).new_facts(6, seed=1) == make_world(3).new_facts(6, seed=1)
    assert make_world(3).new_facts(6, seed=1) != make_world(3).new_facts(6, seed=2)


def test_every_fact_has_wordings_that_are_trained_and_one_that_is_only_asked() -> None:
    assert 200 <= len(WORLD.examples()) <= 300
    for fact in (*WORLD.facts, *WORLD.new_fact_list(6)):
        assert len(fact.trained) >= 4
        assert len(fact.asked) >= 1
        assert not set(fact.trained) & set(fact.asked)
    questions = {example.question for example in WORLD.examples()}
    assert len(questions) == len(WORLD.examples())
    assert not questions & {wording for example in WORLD.examples() for wording in example.paraphrases}


def test_every_wording_is_trained_for_somebody() -> None:
    for relation in RELATIONS:
        trained = {wording for fact in WORLD.facts if fact.relation == relation for wording in fact.trained}
        assert trained == set(relation.questions)


@given(st.integers(0, 1000), st.integers(16, 40))
@settings(max_examples=20, deadline=None)
def test_new_facts_are_of_new_people_with_known_names(seed: int, num_people: int) -> None:
    world = make_world(seed, num_people)
    assert {name for who in world.people for name in who.split()} == {*FIRST_NAMES, *SURNAMES}
    facts = world.new_fact_list(6, seed=seed)
    assert len({(fact.who, fact.relation.name) for fact in facts}) == 6
    assert not {fact.who for fact in facts} & set(world.people)
    assert {name for fact in facts for name in fact.who.split()} <= {*FIRST_NAMES, *SURNAMES}


def test_rows_are_short_and_every_word_is_one_token() -> None:
    for example in (*WORLD.examples(), *WORLD.new_facts(30)):
        assert len(render_example(TOKENIZER, example, 1000).input_ids) <= 32
    for name in (*FIRST_NAMES, *SURNAMES):
        assert len(TOKENIZER(f" {name}")["input_ids"]) == 1


def test_a_world_has_a_size() -> None:
    with pytest.raises(ValueError, match="names for 1 to 96"):
        make_world(0, 97)
    assert len({fact.who for fact in make_world(0, 96).new_fact_list(3 * 96)}) == 96


def test_the_files_are_read_back(tmp_path: Path) -> None:
    old, new = write_world(WORLD, tmp_path / "world")
    assert [p.name for p in (old, new)] == ["old_facts.json", "new_facts.json"]
    for path, wanted in ((old, WORLD.examples()), (new, WORLD.new_facts(6))):
        found = read_file(path).examples
        assert [(e.messages, e.paraphrases, e.id) for e in found] == [(e.messages, e.paraphrases, e.id) for e in wanted]
    assert set(json.loads(new.read_text())[0]) == {"id", "query", "retrieved", "paraphrases"}


# --- the tokenizer ---


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_is_written_and_read_back(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < len(TOKENIZER) for i in ids)


def test_the_same_texts_give_the_same_tokenizer() -> None:
    again = train_bpe(make_world().texts(), VOCAB_SIZE)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert len(TOKENIZER) <= VOCAB_SIZE


def test_it_survives_a_folder(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    example = WORLD.examples()[0]
    assert render_example(again, example, 64) == render_example(TOKENIZER, example, 64)
    assert stop_token_ids(again) == stop_token_ids(TOKENIZER) == {again.convert_tokens_to_ids("<|im_end|>")}
    assert again.pad_token == "<|endoftext|>"
    turns = [{"role": "user", "content": "Where?"}]
    plain = again.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert plain == render_prompt(again, [Message("user", "Where?")])


def test_a_vocabulary_holds_at_least_all_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size is 100, but the bytes and the special tokens take 259"):
        train_bpe(["a"], 100)
    assert len(train_bpe(["a"], 259)) == 259
