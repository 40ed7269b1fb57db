"""`nightschool data tokenize` and `data check` on shards, as a user types them."""

import json

import pytest

from nightschool.cli.main import main
from tests.support.shard_setups import write_texts


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    write_texts(tmp_path / "texts")


def answer(capsys, *words):
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_text_becomes_shards_that_are_whole(tmp_path, capsys):
    words = ("data", "tokenize", "texts/*.txt", "--tokenizer", "train:bpe-300", "--out", "shards", "--row-tokens", "32")
    code, made = answer(capsys, *words, "--shard-tokens", "256")
    assert code == 0
    assert (made["written"], made["documents"], made["vocab_size"]) == (made["shards"], 3, 300)
    code, again = answer(capsys, *words, "--shard-tokens", "256")
    assert (code, again["written"], again["tokens"]) == (0, 0, made["tokens"])
    code, checked = answer(capsys, "data", "check", "shards")
    assert (code, checked["damaged"], checked["tokens"]) == (0, 0, made["tokens"])

    path = tmp_path / "shards" / "tokens_00001.npz"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(bytes(content))
    (tmp_path / "shards" / "tokens_00000.npz").unlink()
    code, checked = answer(capsys, "data", "check", "shards")
    assert (code, checked["damaged"]) == (1, 2)
    assert main(["data", "check", "shards"]) == 1
    assert "tokens_00001.npz has the SHA-256" in capsys.readouterr().out


def test_a_tokenizer_of_another_size_is_not_taken_for_the_one_that_is_there(tmp_path, capsys):
    words = ("data", "tokenize", "texts", "--out", "one", "--row-tokens", "32", "--tokenizer")
    assert answer(capsys, *words, "train:bpe-300")[0] == 0
    code, problem = answer(capsys, *words, "train:bpe-290")
    assert code != 0
    assert "of another tokenizer" in problem["error"]["message"]
    code, few = answer(capsys, *words[:4], "two", *words[5:], "train:bpe-9999")
    assert (code, few["vocab_size"] < 9999) == (0, True)
    assert answer(capsys, *words[:4], "two", *words[5:], "train:bpe-9999")[1]["written"] == 0


def test_a_tokenizer_that_exists_is_taken(tmp_path, capsys):
    answer(capsys, "data", "tokenize", "texts", "--tokenizer", "train:bpe-300", "--out", "one")
    code, made = answer(capsys, "data", "tokenize", "texts/text0.txt", "--tokenizer", "./one/tokenizer", "--out", "two")
    assert (code, made["documents"]) == (0, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--tokenizer", "train:bpe-300", "--out", "x"), "nothing to tokenize"),
        (("nothing.txt", "--tokenizer", "train:bpe-300", "--out", "x"), "nothing.txt"),
        (("texts", "--tokenizer", "train:bpe-x", "--out", "x"), "train:bpe-8192"),
        (("texts", "--tokenizer", "train:bpe-300", "--out", "x", "--row-tokens", "1"), "--row-tokens is 1"),
        (("texts", "--tokenizer", "train:bpe-300", "--out", "x", "--row-tokens", "many"), "--row-tokens"),
    ],
)
def test_mistakes_are_said(words, says, capsys):
    code, problem = answer(capsys, "data", "tokenize", *words)
    assert code in (2, 4)
    assert says in problem["error"]["message"]
