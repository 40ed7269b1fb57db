"""Text → shards: nothing is lost, documents end, and an interrupted call ends like one that was not."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from nightschool.data.shards import tokenize as tokenize_module
from nightschool.data.shards.shards import INDEX, LocalShardFiles, Shards, read_index, verify_shard
from nightschool.data.shards.tokenize import end_of_text_id, tokenize, tokenizer_fingerprint, train_tokenizer
from nightschool.data.tokenizer import END_OF_TEXT, train_bpe
from nightschool.errors import Conflict, DataError, Locked, UsageError
from nightschool.models.load import load_tokenizer
from tests.support.shard_setups import text, tokenizer, write_texts


def stream(folder):
    index = read_index(folder / INDEX)
    shards = Shards(LocalShardFiles(folder, folder / "cache"), index)
    return np.concatenate([np.asarray(shards.tokens(number)) for number in range(len(index.shards))]), index


def test_the_shards_hold_the_texts_and_each_ends(tmp_path):
    files, mine = write_texts(tmp_path / "texts"), tokenizer()
    done = tokenize(files, tmp_path / "out", mine, row_tokens=32, shard_tokens=256)
    ids, index = stream(tmp_path / "out")
    eos = mine.convert_tokens_to_ids(END_OF_TEXT)
    ends = np.flatnonzero(ids == eos)
    assert len(ends) == len(files)
    assert ends[-1] == len(ids) - 1
    begin = 0
    for path, end in zip(files, ends, strict=True):
        assert mine.decode(ids[begin:end].tolist()) == path.read_text()
        begin = end + 1
    assert done.written == len(index.shards) > 2
    assert index.bytes_per_token == pytest.approx(sum(path.stat().st_size for path in files) / len(ids))
    assert sum(shard.documents for shard in index.shards) == len(files)
    for shard in index.shards:
        verify_shard(tmp_path / "out" / shard.file, shard)


def test_the_arrays_are_the_documented_ones(tmp_path):
    tokenize(write_texts(tmp_path / "texts", 1), tmp_path / "out", tokenizer(), row_tokens=32, shard_tokens=10_000)
    with np.load(tmp_path / "out" / "tokens_00000.npz", allow_pickle=False) as shard:
        ids, mask, lengths = shard["input_ids"], shard["attention_mask"], shard["sequence_lengths"]
    assert ids.shape == mask.shape == (len(lengths), 32)
    assert (mask.sum(-1) == lengths).all()
    assert (lengths[:-1] == 32).all()
    assert 0 < lengths[-1] <= 32


def test_an_end_of_text_that_somebody_typed_is_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the night <|endoftext|> school\n")
    mine = tokenizer()
    tokenize([path], tmp_path / "out", mine, row_tokens=8, shard_tokens=64)
    ids, _ = stream(tmp_path / "out")
    assert np.count_nonzero(ids == end_of_text_id(mine)) == 1
    assert mine.decode(ids[:-1].tolist()) == "the night <|endoftext|> school\n"


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, stop_after):
    monkeypatch.setattr(tokenize_module, "_PIECE_CHARACTERS", 300)  # several pieces a document
    monkeypatch.setattr(tokenize_module, "_PIECES_AT_ONCE", 2)
    files, mine = write_texts(tmp_path / "texts"), tokenizer()
    tokenize(files, tmp_path / "whole", mine, row_tokens=32, shard_tokens=256)

    written = []

    def die(facts):
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(facts)

    with pytest.raises(KeyboardInterrupt):
        tokenize(files, tmp_path / "parts", tokenizer(), row_tokens=32, shard_tokens=256, on_shard=die)
    assert not (tmp_path / "parts" / INDEX).exists()
    done = tokenize(files, tmp_path / "parts", tokenizer(), row_tokens=32, shard_tokens=256)
    assert done.resumed == stop_after + 1
    for path in (tmp_path / "whole").glob("*.npz"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    assert json.loads((tmp_path / "whole" / INDEX).read_text()) == json.loads((tmp_path / "parts" / INDEX).read_text())
    again = tokenize(files, tmp_path / "parts", tokenizer(), row_tokens=32, shard_tokens=256)
    assert (again.written, again.resumed) == (0, len(again.index.shards))


def test_pieces_change_no_token(tmp_path, monkeypatch):
    files, mine = write_texts(tmp_path / "texts", 1, 2000), tokenizer()
    tokenize(files, tmp_path / "one", mine, row_tokens=32, shard_tokens=100_000)
    monkeypatch.setattr(tokenize_module, "_PIECE_CHARACTERS", 100)
    tokenize(files, tmp_path / "many", mine, row_tokens=32, shard_tokens=100_000)
    assert np.array_equal(stream(tmp_path / "one")[0], stream(tmp_path / "many")[0])


def test_rows_of_jsonl_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text(n, 20)}) + "\n" for n in range(5)))
    tokenize([path], tmp_path / "out", tokenizer(), row_tokens=8, shard_tokens=10_000)
    assert read_index(tmp_path / "out" / INDEX).shards[0].documents == 5


def test_other_files_or_another_tokenizer_do_not_mix(tmp_path):
    files = write_texts(tmp_path / "texts")
    tokenize(files, tmp_path / "out", tokenizer(), row_tokens=32, shard_tokens=256)
    with pytest.raises(Conflict, match="other files"):
        tokenize(files[:1], tmp_path / "out", tokenizer(), row_tokens=32, shard_tokens=256)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.npz").write_bytes(b"")
    with pytest.raises(Conflict, match=r"x\.npz"):
        tokenize(files, tmp_path / "foreign", tokenizer())


def test_two_calls_do_not_write_to_one_folder(tmp_path):
    files = write_texts(tmp_path / "texts")
    refused = []

    def second_call(_):
        with pytest.raises(Locked, match="the shards in"):
            tokenize(files, tmp_path / "out", tokenizer(), row_tokens=16, shard_tokens=64)
        refused.append(True)

    tokenize(files, tmp_path / "out", tokenizer(), row_tokens=16, shard_tokens=64, on_shard=second_call)
    assert refused


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        tokenize([path], tmp_path / "out", tokenizer())
    with pytest.raises(UsageError, match="train:bpe-"):
        train_tokenizer([path], "train:bpe-many")
    with pytest.raises(UsageError, match="take 259"):
        train_tokenizer(write_texts(tmp_path / "texts", 1), "train:bpe-10")


def test_a_tokenizer_that_cuts_and_pads_does_neither_here(tmp_path):
    files = write_texts(tmp_path / "texts")
    tokenize(files, tmp_path / "out", tokenizer(), row_tokens=32, shard_tokens=256)
    cutting = tokenizer()
    cutting.backend_tokenizer.enable_truncation(16)
    cutting.backend_tokenizer.enable_padding(length=512)
    tokenize(files, tmp_path / "cut", cutting, row_tokens=32, shard_tokens=256)
    assert np.array_equal(stream(tmp_path / "cut")[0], stream(tmp_path / "out")[0])


def test_a_call_killed_before_it_noted_its_first_shard_goes_on(tmp_path, monkeypatch):
    files = write_texts(tmp_path / "texts")
    tokenize(files, tmp_path / "whole", tokenizer(), row_tokens=32, shard_tokens=256)
    write = tokenize_module.write_shard

    def die(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize_module, "write_shard", die)
    with pytest.raises(KeyboardInterrupt):
        tokenize(files, tmp_path / "parts", tokenizer(), row_tokens=32, shard_tokens=256)
    assert (tmp_path / "parts" / "tokens_00000.npz").is_file()
    monkeypatch.setattr(tokenize_module, "write_shard", write)
    tokenize(files, tmp_path / "parts", tokenizer(), row_tokens=32, shard_tokens=256)
    assert (tmp_path / "parts" / INDEX).read_bytes() == (tmp_path / "whole" / INDEX).read_bytes()


def test_after_a_bad_file_the_corrected_one_may_go_to_the_same_folder(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half \\ud83d of it"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'text' holds half a character \('\\ud83d'\) at place 5"):
        tokenize([path], tmp_path / "out", tokenizer(), row_tokens=8, shard_tokens=64)
    path.write_text('{"text": "all of it"}\n')
    other = train_bpe(["all of it"], 280, eos_token=END_OF_TEXT)
    tokenize([path], tmp_path / "out", other, row_tokens=8, shard_tokens=64)
    kept = load_tokenizer(tmp_path / "out" / "tokenizer", "tokenizer")
    assert tokenizer_fingerprint(kept) == tokenizer_fingerprint(other)


def test_a_file_that_was_edited_is_another_file(tmp_path):
    files = write_texts(tmp_path / "texts")
    tokenize(files, tmp_path / "out", tokenizer(), row_tokens=32, shard_tokens=256)
    files[1].write_text(files[1].read_text().swapcase())
    with pytest.raises(Conflict, match="other files"):
        tokenize(files, tmp_path / "out", tokenizer(), row_tokens=32, shard_tokens=256)


def test_a_vocabulary_with_a_gap_fits_the_type_of_its_largest_id(tmp_path):
    plain = json.loads(tokenizer().backend_tokenizer.to_str())
    plain["model"]["vocab"] |= {"a": 70_000}
    gapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token=END_OF_TEXT)
    (tmp_path / "a.txt").write_text("a 1")
    tokenize([tmp_path / "a.txt"], tmp_path / "out", gapped, row_tokens=8, shard_tokens=64)
    assert 70_000 in stream(tmp_path / "out")[0]
