"""Shards of all kinds are read as one stream, and what is not a shard is refused by name."""

import io
import os
import zipfile

import numpy as np
import pytest

from nightschool.data.shards.npz import fingerprint_in, open_tokens
from nightschool.data.shards.shard_sources import open_shards, shards_state
from nightschool.data.shards.shards import INDEX, check_index, read_index, verify_shard
from nightschool.errors import Damaged, DataError, NotFound
from tests.support.shard_setups import write_shards


def save(path, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


IDS = np.arange(24, dtype=np.int32).reshape(4, 6)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("field", ["input_ids", "data", "sequences"])
@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 2, 6)])
def test_every_kind_of_array_is_one_stream(tmp_path, field, shape, compressed):
    path = save(tmp_path / "a.npz", compressed, **{field: IDS.reshape(shape)})
    tokens = open_tokens(path, tmp_path / "cache", "d")
    assert np.array_equal(tokens, np.arange(24))
    assert isinstance(tokens, np.memmap) or isinstance(tokens.base, np.memmap)


def test_what_is_stored_is_mapped_where_it_lies(tmp_path):
    path = save(tmp_path / "a.npz", input_ids=IDS)
    open_tokens(path, tmp_path / "cache", "d")
    assert not (tmp_path / "cache").exists()


def test_padding_is_left_out_and_padded_rows_end(tmp_path):
    lengths = np.array([6, 2, 0, 3])
    by_lengths = save(tmp_path / "a.npz", input_ids=IDS, sequence_lengths=lengths)
    by_mask = save(tmp_path / "b.npz", input_ids=IDS, attention_mask=(np.arange(6) < lengths[:, None]).astype(np.int32))
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 99, 18, 19, 20, 99]
    for path in (by_lengths, by_mask):
        assert open_tokens(path, tmp_path / "cache", path.name, eos_token_id=99).tolist() == expected
    assert open_tokens(by_mask, tmp_path / "cache", "c").tolist() == [token for token in expected if token != 99]


def test_only_the_last_row_padded_needs_no_copy(tmp_path):
    path = save(tmp_path / "a.npz", input_ids=IDS, sequence_lengths=np.array([6, 6, 6, 2]))
    assert open_tokens(path, tmp_path / "cache", "d").tolist() == list(range(20))
    assert not (tmp_path / "cache").exists()


def test_padding_of_one_dimension_is_left_out(tmp_path):
    mask = (np.arange(24) < 20).astype(np.int64)
    for compressed in (False, True):
        path = save(tmp_path / "a.npz", compressed, input_ids=IDS.reshape(-1), attention_mask=mask)
        assert open_tokens(path, tmp_path / "cache", f"{compressed}").tolist() == list(range(20))


def test_padding_before_tokens_is_refused_and_not_trained(tmp_path):
    path = save(tmp_path / "a.npz", input_ids=IDS, attention_mask=(np.arange(6) >= np.array([[0], [2], [0], [3]])))
    with pytest.raises(DataError, match="ones after zeros"):
        open_tokens(path, tmp_path / "cache", "a")


def test_an_end_that_does_not_fit_the_type_of_the_rows_is_appended(tmp_path):
    for dtype in (np.uint8, np.int8, np.int64, np.uint64):
        path = save(tmp_path / "a.npz", input_ids=IDS.astype(dtype), sequence_lengths=np.array([6, 2, 6, 6]))
        tokens = open_tokens(path, tmp_path / "cache", np.dtype(dtype).name, eos_token_id=50_256)
        assert tokens[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 50_256, 12]


@pytest.mark.parametrize("shift", [-5, 1 << 32])
def test_ids_that_are_none_are_refused_before_they_are_narrowed(tmp_path, shift):
    path = save(tmp_path / "a.npz", compressed=True, input_ids=IDS.astype(np.int64) + shift)
    with pytest.raises(DataError, match="holds the token id"):
        open_tokens(path, tmp_path / "cache", "a")
    assert not (tmp_path / "cache").exists()


def test_what_is_no_shard_is_refused(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="it has other"):
        open_tokens(save(tmp_path / "a.npz", other=IDS), cache, "a")
    with pytest.raises(DataError, match="float64"):
        open_tokens(save(tmp_path / "b.npz", input_ids=IDS.astype(float)), cache, "b")
    whole = save(tmp_path / "c.npz", input_ids=IDS).read_bytes()
    for cut in (10, 200, len(whole) - 30):
        (tmp_path / "d.npz").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"d\.npz"):
            open_tokens(tmp_path / "d.npz", cache, "d")
    with pytest.raises(DataError, match="rows"):
        open_tokens(save(tmp_path / "e.npz", input_ids=IDS, sequence_lengths=np.array([7, 1, 1, 1])), cache, "e")
    with pytest.raises(NotFound):
        open_tokens(tmp_path / "f.npz", cache, "f")


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(DataError, match="no regular file, so it is no shard"):
        open_tokens(tmp_path / "a.npz", tmp_path / "cache", "a")


def test_a_pickle_is_never_loaded(tmp_path):
    content = io.BytesIO()
    np.save(content, np.array([object()]), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("input_ids.npy", content.getvalue())
    with pytest.raises(DataError, match="plain array"):
        open_tokens(tmp_path / "a.npz", tmp_path / "cache", "a")


def test_a_folder_with_an_index(tmp_path):
    folder = write_shards(tmp_path)
    source = open_shards("shards", root=tmp_path, cache=tmp_path / "cache")
    index = source.shards.index
    assert source.tokenizer_folder == folder / "tokenizer"
    assert {fingerprint_in(folder / shard.file) for shard in index.shards} == {index.tokenizer_fingerprint}
    assert sum(len(source.shards.tokens(n)) for n in range(len(index.shards))) == index.tokens
    two = open_shards("shards", root=tmp_path, cache=tmp_path / "cache", max_files=2).shards.index
    assert two.shards == index.shards[:2]
    assert two.fingerprint != index.fingerprint


def test_a_folder_without_an_index_is_read_once(tmp_path):
    folder = write_shards(tmp_path)
    index = read_index(folder / INDEX)
    (folder / INDEX).unlink()
    (folder / "progress.json").unlink()
    for place in ("shards", "shards/tokens_*.npz"):
        found = open_shards(place, root=tmp_path, cache=tmp_path / "cache", eos_token_id=index.eos_token_id)
        assert found.shards.index.shards == index.shards
        assert found.shards.index.tokenizer_fingerprint == index.tokenizer_fingerprint
    assert len(list((tmp_path / "cache").glob("index-*.json"))) == 1


def test_damage_is_found(tmp_path):
    folder = write_shards(tmp_path)
    index = read_index(folder / INDEX)
    path, facts = folder / index.shards[0].file, index.shards[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(Damaged, match=f"{len(whole) - 1} bytes"):
        open_shards("shards", root=tmp_path, cache=tmp_path / "cache")
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    open_shards("shards", root=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(Damaged, match="SHA-256"):
        verify_shard(path, facts)
    path.unlink()
    with pytest.raises(Damaged, match="missing"):
        open_shards("shards", root=tmp_path, cache=tmp_path / "cache")


def test_shards_of_two_tokenizers_are_refused(tmp_path):
    for name, fingerprint in (("a", "1" * 64), ("b", "2" * 64)):
        save(tmp_path / f"{name}.npz", input_ids=IDS, tokenizer_fingerprint=np.array(fingerprint))
    with pytest.raises(DataError, match="different tokenizers"):
        open_shards(".", root=tmp_path, cache=tmp_path / "cache")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    save(tmp_path / "a.npz", input_ids=IDS)
    index = open_shards("a.npz", root=tmp_path, cache=tmp_path / "cache").shards.index
    check_index(index, 24, "here")
    with pytest.raises(DataError, match="token id 23"):
        check_index(index, 23, "here")


def test_an_empty_place_says_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nothing", "no*.npz"):
        with pytest.raises(NotFound, match="nightschool data tokenize"):
            open_shards(place, root=tmp_path, cache=tmp_path / "cache")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt"):
        open_shards("a.txt", root=tmp_path, cache=tmp_path / "cache")


def test_an_index_that_reaches_out_of_its_folder_is_refused(tmp_path):
    folder = write_shards(tmp_path)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace("tokens_00000.npz", "../../tokens_00000.npz"))
    with pytest.raises(Damaged, match="outside"):
        read_index(folder / INDEX)
    (folder / INDEX).write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(Damaged, match="format 2"):
        read_index(folder / INDEX)


def test_the_state_of_shards_changes_with_them(tmp_path):
    folder = write_shards(tmp_path)
    before = shards_state("shards", root=tmp_path)
    assert shards_state("shards", root=tmp_path, max_files=1) != before
    (folder / INDEX).unlink()
    loose = shards_state("shards", root=tmp_path)
    (folder / "tokens_00000.npz").unlink()
    assert shards_state("shards", root=tmp_path) != loose
