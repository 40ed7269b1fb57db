"""Shards in a bucket: the same batches as from a folder, fetched ahead, within the limit, verified."""

import shutil

import numpy as np
import pytest
import torch

from nightschool.data.shards.shard_sources import open_shards, shards_state
from nightschool.data.shards.shards import INDEX
from nightschool.data.shards.token_batches import TokenBatches
from nightschool.errors import Conflict, Damaged, NotFound
from nightschool.remotes.remote import Remote
from tests.support.live_server import eventually
from tests.support.shard_setups import write_shards


@pytest.fixture
def bucket(tmp_path):
    return write_shards(tmp_path / "made")


def opened(bucket, tmp_path, **changes):
    plain = {"root": tmp_path, "cache": tmp_path / "cache", "group_shards": 2}
    return open_shards(f"file://{bucket}", **(plain | changes))


def batches_of(source):
    return TokenBatches(source.shards, seq_len=16, seed=1, group_shards=2, vocab_size=300)


def all_ids(batches):
    return torch.cat([batches.get(0, place, 1).input_ids for place in range(batches.num_sequences)], dim=1)


def fetched(tmp_path):
    return {path.name for path in (tmp_path / "cache" / "fetched").rglob("*.npz")}


def test_the_same_batches_as_from_a_folder(tmp_path, bucket):
    local = open_shards(str(bucket), root=tmp_path, cache=tmp_path / "local")
    remote = opened(bucket, tmp_path)
    assert torch.equal(all_ids(batches_of(remote)), all_ids(batches_of(local)))
    assert batches_of(remote).fingerprint == batches_of(local).fingerprint
    assert (remote.tokenizer_folder / "tokenizer.json").is_file()


def test_only_what_comes_next_is_fetched(tmp_path, bucket):
    source = opened(bucket, tmp_path)
    assert not fetched(tmp_path)
    batches_of(source).get(0, 0, 1)
    eventually(lambda: len(fetched(tmp_path)) == 4)
    assert len(source.shards.index.shards) > 4


def test_no_more_is_kept_than_the_limit_allows(tmp_path, bucket):
    largest = max(path.stat().st_size for path in bucket.glob("*.npz"))
    others = sum(path.stat().st_size for path in bucket.rglob("*") if path.suffix != ".npz" and path.is_file())
    limit = 3 * largest + others
    source = opened(bucket, tmp_path, limit_bytes=limit)
    all_ids(batches_of(source))
    kept = [path.stat().st_size for path in (tmp_path / "cache" / "fetched").rglob("*") if path.is_file()]
    assert sum(kept) <= limit + 2000  # notes of the cache beside them
    assert len(fetched(tmp_path)) < len(source.shards.index.shards)
    with pytest.raises(Conflict):
        opened(bucket, tmp_path / "small", limit_bytes=10)


def test_conversions_of_compressed_shards_count_and_go_like_shards(tmp_path, bucket):
    expected = all_ids(batches_of(opened(bucket, tmp_path / "plain")))
    eos = opened(bucket, tmp_path / "plain").shards.index.eos_token_id
    for name in (INDEX, "progress.json"):
        (bucket / name).unlink()
    for path in bucket.glob("*.npz"):
        with np.load(path) as arrays:
            content = dict(arrays)
        np.savez_compressed(path, **content)
    made = tmp_path / "cache" / "fetched" / "made"
    unlimited = opened(bucket, tmp_path / "unlimited", eos_token_id=eos)
    all_ids(batches_of(unlimited))
    conversions = sum(path.stat().st_size for path in (tmp_path / "unlimited/cache/fetched/made").iterdir())
    originals = sum(path.stat().st_size for path in bucket.rglob("*") if path.is_file())
    limit = originals + conversions // 2

    source = opened(bucket, tmp_path, eos_token_id=eos, limit_bytes=limit)
    batches = batches_of(source)
    for place in range(batches.num_sequences):
        ids = batches.get(0, place, 1).input_ids
        assert torch.equal(ids, expected[:, place * 16 : place * 16 + 16])
        assert source.shards._files._files.size_bytes <= limit
    assert 0 < sum(path.stat().st_size for path in made.iterdir()) < conversions


def test_a_cache_that_holds_no_shard_beside_its_plain_copy_is_refused(tmp_path, bucket):
    for path in bucket.iterdir():
        if path.suffix != ".npz":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    np.savez_compressed(bucket / "tokens_00000.npz", input_ids=np.ones((8, 512), dtype=np.uint16))
    original, copy = (bucket / "tokens_00000.npz").stat().st_size, 2 * 8 * 512 + 128
    # There is room for the copy, but not by dropping the very shard that it is made of.
    with pytest.raises(Conflict, match=r"plain copy .* Allow it more"):
        opened(bucket, tmp_path, eos_token_id=0, max_files=1, limit_bytes=copy + original - 1)
    assert (
        opened(bucket, tmp_path, eos_token_id=0, max_files=1, limit_bytes=copy + original).shards.index.tokens
        == 8 * 512
    )


def test_what_comes_later_does_not_push_out_what_comes_next(tmp_path, bucket, monkeypatch):
    fetches = []
    get = Remote.get_to_file

    def counting(self, key, *arguments, **more):
        if key.endswith(".npz"):
            fetches.append(key)
        return get(self, key, *arguments, **more)

    monkeypatch.setattr(Remote, "get_to_file", counting)
    largest = max(path.stat().st_size for path in bucket.glob("*.npz"))
    others = sum(path.stat().st_size for path in bucket.rglob("*") if path.suffix != ".npz" and path.is_file())
    source = opened(bucket, tmp_path, limit_bytes=4 * largest + others)
    batches = batches_of(source)
    for place in range(batches.num_sequences):
        batches.get(0, place, 1)
        eventually(lambda: source.shards._files._files._thread is None)
    assert len(fetches) == len(source.shards.index.shards)


def test_held_out_sequences_are_fetched_once(tmp_path, bucket, monkeypatch):
    batches = TokenBatches(
        opened(bucket, tmp_path).shards,
        seq_len=16,
        seed=1,
        group_shards=2,
        held_out_share=0.2,
        held_out_tokens=10_000,
        vocab_size=300,
    )
    before = batches.held_out(0, batches.num_held_out)
    monkeypatch.setattr(batches._shards, "tokens", lambda _: pytest.fail("a shard was opened again"))
    after = batches.held_out(0, batches.num_held_out)
    assert batches.num_held_out > 5
    assert torch.equal(before.input_ids, after.input_ids)
    assert torch.equal(before.labels, after.labels)


def test_a_shard_that_changed_in_the_bucket_is_found_before_it_is_used(tmp_path, bucket):
    path = bucket / "tokens_00000.npz"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(Damaged, match="tokens_00000"):
        all_ids(batches_of(opened(bucket, tmp_path)))


def test_a_place_without_an_index_is_read_once(tmp_path, bucket):
    whole = opened(bucket, tmp_path).shards.index
    (bucket / INDEX).unlink()
    (bucket / "progress.json").unlink()
    found = opened(bucket, tmp_path, eos_token_id=whole.eos_token_id).shards.index
    assert found.shards == whole.shards
    assert (
        opened(bucket, tmp_path, eos_token_id=whole.eos_token_id, max_files=2).shards.index.shards == whole.shards[:2]
    )


def test_a_place_without_an_index_may_be_larger_than_the_cache(tmp_path, bucket):
    whole = opened(bucket, tmp_path).shards.index
    (bucket / INDEX).unlink()
    limit = 2 * max(shard.size_bytes for shard in whole.shards)
    for path in (bucket / "tokenizer").iterdir():
        path.unlink()
    found = opened(bucket, tmp_path / "small", eos_token_id=whole.eos_token_id, limit_bytes=limit).shards.index
    assert found.shards == whole.shards


def test_an_empty_place_says_so_and_a_change_is_seen(tmp_path, bucket):
    before = shards_state(f"file://{bucket}", root=tmp_path)
    (bucket / "tokens_00000.npz").unlink()
    assert shards_state(f"file://{bucket}", root=tmp_path) != before
    shutil.rmtree(bucket)
    bucket.mkdir()
    with pytest.raises(NotFound, match="no token shards"):
        opened(bucket, tmp_path)
