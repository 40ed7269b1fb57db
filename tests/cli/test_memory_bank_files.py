"""The documents' pipeline of an explicit memory: bank, mapping, keys and labels, written and read as their code does."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from nightschool.cli.memory.bank_files import bank_tokenizer, encoder_named
from nightschool.data.example import NeededFact
from nightschool.data.sources.load import read_file
from nightschool.memory.encoders.names import Vocabulary
from nightschool.memory.memory import Memory
from nightschool.memory.torch_files import read_keys, read_meta
from nightschool.store.home import Home
from nightschool.store.names import memory_path
from tests.support.memory_parts import table, tokenizer

ADA = NeededFact("Ada lives in Oslo.", "Ada", "lives in", "Oslo")
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
    again = ("build", "other", "--from", "kb.json", "--base", base, "--cache", "bank.pt")
    assert "add --force" in " ".join(say(*again, code=1).split())
    assert ask(*again, "--force")["added"] == 3


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
    # What the rows are lies beside it, so that a stage can learn from it; and the conversation goes on with its fact.
    assert read_file(folder / "labeled.jsonl").examples[0].fact == ADA
    told = ask(*words, "--facts", "facts.jsonl", "--force")
    assert (told["rows"], told["with_fact"]) == (1, 1)
    [known] = read_file(folder / "facts.jsonl").examples
    assert (known.question, known.answer, known.fact) == ("Where does Ada live?", "Oslo", ADA)
    (folder / "labeled.jsonl").unlink()
    (folder / "labeled_mapping.json").unlink()
    assert "facts.jsonl is there already" in say(*words, "--facts", "facts.jsonl", code=1)
    assert not (folder / "labeled.jsonl").exists()
    assert np.all(np.diff(row["target_scores"]) <= 0)
    ask(*words, "--top-k", "32", "--max-sentences", "1", "--force")
    assert json.loads((folder / "labeled.jsonl").read_text())["target_indices"] == [0]
    assert "there already" in say(*words, code=1)
    assert "--top-k is 0" in say(*words, "--top-k", "0", "--force", code=2)


def test_a_memory_is_indexed_by_keys_that_a_file_brings(folder, base, ask, say):
    """Both shapes that the documents have; what is found stays the same, whatever the cells are."""
    ask("build", "facts", "--from", "kb.json")
    ask("keys", "facts", "--out", "data", "--base", base)
    told = ask("keys", "facts", "--from", "data/keys.pt", "--base", base)
    assert (told["shape"][:2], told["cells"]) == ([2, 2], 4)
    assert 1 <= told["fullest"] <= 3
    [index] = (folder / "home" / "memories" / "facts" / "index").iterdir()
    codebooks = np.load(index / "codebooks.npy")
    assert np.allclose(codebooks, torch.load("data/keys.pt", weights_only=True).numpy(), atol=1e-6)
    half = codebooks.shape[2]
    torch.save(torch.randn(9, 2 * half, generator=torch.Generator().manual_seed(1)), "dense.pt")
    assert ask("keys", "facts", "--from", "dense.pt", "--base", base)["shape"] == [2, 3, half]
    made, bank = encoder_named("base", base, "cpu"), bank_tokenizer(base, folder)
    memory = Memory.open(memory_path(Home.find(), "facts"), made, Vocabulary(bank.tokenizer))
    assert memory.rebuilt is None
    assert [found.entry.text for found in memory.find(["Where does Ada live?"])[0].found] == ["Ada lives in Oslo."]
    memory.close()


def test_keys_that_do_not_fit_are_refused_with_both_shapes(folder, base, ask, say):
    ask("build", "facts", "--from", "kb.json")
    ask("keys", "facts", "--out", "data", "--base", base)
    half = torch.load("data/keys.pt", weights_only=True).shape[2]
    reads = ("keys", "facts", "--from", "wrong.pt", "--base", base)
    for shape, said in (
        ((2, 3, half + 1), f"[2, 3, {half + 1}]; codebooks [2, 3, {half}] or keys [9, {2 * half}]"),
        ((8, 2 * half), "The next one is 9"),
        ((9, half), f"[9, {half}]; codebooks [2, 3, {half}] or keys [9, {2 * half}]"),
        ((7,), "[7]; codebooks"),
        ((2, 0, half), "perfect square"),
    ):
        torch.save(torch.ones(shape), "wrong.pt")
        assert said in " ".join(say(*reads, code=1).split()), shape
    torch.save(torch.ones(2, 2, half), "wrong.pt")
    assert "codebooks [2, 3," in " ".join(say(*reads, "--knowledge-num", "9", code=1).split())
    torch.save(torch.zeros(2, 2, half), "wrong.pt")
    assert "point nowhere" in " ".join(say(*reads, code=1).split())
    torch.save({"keys": torch.ones(2, 2, half)}, "wrong.pt")
    assert "holds a dict" in say(*reads, code=1)
    assert "--out FOLDER" in say("keys", "facts", "--base", base, code=2)
    assert "leave --encoder wordllama out" in " ".join(say(*reads, "--encoder", "wordllama", code=2).split())
