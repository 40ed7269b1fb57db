"""The documents' pipeline of an explicit memory: bank, mapping, keys and labels, written and read as their code does."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from nightschool.memory.torch_files import read_keys, read_meta
from tests.support.memory_parts import table, tokenizer

FACTS = [("Ada", "lives in", "Oslo"), ("Bob", "speaks", "French"), ("Ida", "works for", "Acme")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tokenizer and token embeddings, which is all that these verbs read."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"model.embed_tokens.weight": table()}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    fields = ("subject", "predicate", "object")
    rows = [{"target": [dict(zip(fields, fact, strict=True)) | {"sentence": " ".join(fact) + "."}]} for fact in FACTS]
    (tmp_path / "kb.json").write_text(json.dumps(rows))
    return tmp_path


def texts(ask, name):
    return sorted(one["text"] for one in ask("ls", name))


def test_a_knowledge_base_becomes_a_bank_and_comes_back(folder, base, ask):
    ask("build", "facts", "--from", "kb.json", "--base", base, "--cache", "knowledge_cache.pt")
    bank = torch.load("knowledge_cache.pt", weights_only=True)
    assert (bank.dtype, tuple(bank.shape)) == (torch.int64, (4, 16))
    mapping = json.loads((folder / "knowledge_cache_mapping.json").read_text())
    assert mapping["metadata"]["total_entries"] == 3
    assert mapping["metadata"]["knowledge_num"] == 4
    first = mapping["mappings"][0]
    assert (first["database_index"], first["subject"], first["object"]) == (0, "Ada", "Oslo")
    assert not first["is_truncated"]
    assert ask("build", "again", "--from", "knowledge_cache.pt", "--base", base)["added"] == 3
    assert texts(ask, "again") == texts(ask, "facts")
    # Written over by their updater, which leaves the mapping: what is read is what the bank says.
    bank[0] = bank[1]
    torch.save(bank, "knowledge_cache.pt")
    ask("build", "updated", "--from", "knowledge_cache.pt", "--base", base)
    assert not any("Oslo" in text for text in texts(ask, "updated"))


def test_entries_that_are_cut_are_told_and_lose_nothing(folder, base, ask):
    ask("build", "facts", "--from", "kb.json")
    wrote = ask("export", "facts", "bank.pt", "--base", base, "--knowledge-length", "2", "--knowledge-num", "9")
    assert (wrote["shape"], wrote["cut"]) == ([9, 2], 3)
    assert ask("build", "again", "--from", "bank.pt", "--base", base)["added"] == 3
    assert texts(ask, "again") == texts(ask, "facts")


def test_what_cannot_be_is_refused_and_leaves_nothing(folder, base, ask, say):
    ask("build", "facts", "--from", "kb.json")
    for wanted, said in (("5", "The next one is 9"), ("1", "there are 3 entries")):
        assert said in say("export", "facts", "bank.pt", "--base", base, "--knowledge-num", wanted, code=1)
    assert "--base" in say("export", "facts", "bank.pt", code=2)
    assert not list(folder.glob("bank*"))
    torch.save(torch.zeros(4, 16, 8), "floats.pt")
    assert "[4, 16, 8]" in say("build", "other", "--from", "floats.pt", "--base", base, code=1)
    ask("export", "facts", "bank.pt", "--base", base)
    bank = torch.load("bank.pt", weights_only=True)
    torch.save(bank.flip(0), "bank.pt")
    assert "another tokenizer" in say("build", "other", "--from", "bank.pt", "--base", base, code=1)
    torch.save(bank + 10_000, "bank.pt")
    assert "another one wrote it" in say("build", "other", "--from", "bank.pt", "--base", base, code=1)
    assert "there already" in say("export", "facts", "bank.pt", "--base", base, code=1)


def test_keys_and_labels_have_the_shapes_of_the_documents(folder, base, ask, say):
    ask("build", "facts", "--from", "kb.json", "--base", base, "--cache", "knowledge_cache.pt")
    shape = ask("keys", "facts", "--out", "data", "--base", base)["shape"]
    meta = read_meta(folder / "data" / "meta.json")
    assert shape == [2, 2, meta.knowledge_dim // 2]
    assert meta.knowledge_num == 4
    assert read_keys(
        folder / "data" / meta.keys_path, knowledge_num=4, knowledge_dim=meta.knowledge_dim
    ).shape == tuple(shape)
    turns = [{"role": "user", "content": "Where does Ada live?"}, {"role": "assistant", "content": "Oslo"}]
    (folder / "train.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    words = ("label", "facts", "--conversations", "train.jsonl", "--output", "labeled.jsonl", "--base", base)
    ask(*words, "--top-k", "2")
    [row] = [json.loads(line) for line in (folder / "labeled.jsonl").read_text().splitlines()]
    assert set(row) == {"query", "target_indices", "target_scores"}
    assert row["query"] == "Where does Ada live?"
    assert len(row["target_indices"]) == len(set(row["target_indices"])) == 2
    assert row["target_indices"][0] == 0
    assert np.all(np.diff(row["target_scores"]) <= 0)
    ask(*words, "--top-k", "32", "--max-sentences", "1", "--force")
    assert json.loads((folder / "labeled.jsonl").read_text())["target_indices"] == [0]
    assert "there already" in say(*words, code=1)
    assert "--top-k is 0" in say(*words, "--top-k", "0", "--force", code=2)
