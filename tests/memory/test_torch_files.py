"""The documents' `.pt` files: every shape that was ever written is read, and what cannot fit is refused with the sizes."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nightschool.errors import Damaged, DataError, NotFound
from nightschool.memory import torch_files
from nightschool.memory.torch_files import (
    CACHE,
    KEYS,
    META,
    check_sizes,
    read_cache,
    read_keys,
    read_meta,
    write_cache,
    write_keys,
)

IDS = np.arange(9 * 16).reshape(9, 16).astype(np.int32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_are_read_as_either_wrote_them(tmp_path, dtype):
    torch.save(torch.from_numpy(IDS).to(dtype), tmp_path / CACHE)
    tokens = read_cache(tmp_path / CACHE, vocab_size=144)
    assert tokens.dtype == np.int32
    assert np.array_equal(tokens, IDS)


def test_what_is_written_is_read_and_padded_to_a_square(tmp_path):
    write_cache(tmp_path / CACHE, IDS[:7])
    tokens = read_cache(tmp_path / CACHE, vocab_size=144)
    assert tokens.shape == (9, 16)
    assert np.array_equal(tokens[:7], IDS[:7])
    assert not tokens[7:].any()


def test_codebooks_and_meta_go_together(tmp_path):
    codebooks = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)
    codebooks /= np.linalg.norm(codebooks, axis=2, keepdims=True)
    write_keys(tmp_path, codebooks)
    meta = read_meta(tmp_path / META)
    assert (meta.knowledge_num, meta.knowledge_dim, meta.keys_path) == (16, 12, KEYS)
    read = read_keys(tmp_path / meta.keys_path, knowledge_num=16, knowledge_dim=12)
    assert np.allclose(read, codebooks, atol=1e-6)


def test_a_key_for_each_entry_gives_codebooks(tmp_path):
    keys = torch.randn(16, 12, dtype=torch.float16)
    torch.save(keys, tmp_path / KEYS)
    read = read_keys(tmp_path / KEYS, knowledge_num=16, knowledge_dim=12)
    assert read.shape == (2, 4, 6)
    first = torch.nn.functional.normalize(keys[4, 6:].float(), dim=0)
    assert np.allclose(read[1, 1], first.numpy(), atol=1e-3)


@pytest.mark.parametrize(("number", "dim", "said"), [
    (1000, 8, "The next one is 1024"), (0, 8, "The next one is 1"), (-4, 8, "perfect square"),
    (16, 7, "Write 8"), (16, 0, "Write 2"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused_with_those_that_can(number, dim, said):
    with pytest.raises(DataError, match=said):
        check_sizes(number, dim)


def test_banks_that_do_not_fit_are_refused_with_their_sizes(tmp_path):
    path = tmp_path / CACHE
    torch.save(torch.zeros(9, 16, 32, dtype=torch.bfloat16), path)
    with pytest.raises(DataError, match=r"hidden states \[9, 16, 32\] \(torch.bfloat16, 0.0 GiB\)"):
        read_cache(path, vocab_size=144)
    torch.save(torch.from_numpy(IDS[:8]), path)
    with pytest.raises(DataError, match="The next one is 9"):
        read_cache(path, vocab_size=144)
    torch.save(torch.from_numpy(IDS), path)
    with pytest.raises(DataError, match="the token 143, and this tokenizer has 100"):
        read_cache(path, vocab_size=100)
    torch.save(torch.from_numpy(IDS) - 5, path)
    with pytest.raises(DataError, match="the token -5"):
        read_cache(path, vocab_size=144)
    torch.save({"bank": torch.from_numpy(IDS)}, path)
    with pytest.raises(DataError, match=r"holds a dict \(bank …\)"):
        read_cache(path, vocab_size=144)
    torch.save(torch.zeros(2, 3, 6), tmp_path / KEYS)
    with pytest.raises(DataError, match=r"\[2, 3, 6\]; codebooks \[2, 4, 6\] or keys \[16, 12\]"):
        read_keys(tmp_path / KEYS, knowledge_num=16, knowledge_dim=12)
    torch.save(torch.full((2, 4, 6), float("nan")), tmp_path / KEYS)
    with pytest.raises(DataError, match="not finite"):
        read_keys(tmp_path / KEYS, knowledge_num=16, knowledge_dim=12)


def test_a_bank_of_floats_that_no_ram_holds_is_refused_with_its_size(tmp_path, monkeypatch):
    torch.save(torch.zeros(16, 16, 8), tmp_path / CACHE)
    monkeypatch.setattr(torch_files.psutil, "virtual_memory", lambda: SimpleNamespace(available=1024))
    with pytest.raises(DataError, match=r"\[16, 16, 8\].*more than half of the 0.0 GiB that are free"):
        read_cache(tmp_path / CACHE, vocab_size=144)
    monkeypatch.setattr(torch_files.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    with pytest.raises(DataError, match=r"0.0 GiB\), and a bank holds token ids"):
        read_cache(tmp_path / CACHE, vocab_size=144)


def test_a_shape_that_the_numbers_do_not_fill_is_refused_unread(tmp_path):
    """86 GB in a kilobyte: one number, repeated over the shape of the README."""
    torch.save(torch.zeros(1, dtype=torch.bfloat16).expand(1 << 20, 16, 2560), tmp_path / CACHE)
    with pytest.raises(DataError, match=r"0.0 GiB of numbers for \[1048576, 16, 2560\], which takes 80.0 GiB"):
        read_cache(tmp_path / CACHE, vocab_size=144)
    torch.save(torch.zeros(1, dtype=torch.int64).expand(1 << 20, 1 << 20), tmp_path / CACHE)
    with pytest.raises(DataError, match="contiguous"):
        read_cache(tmp_path / CACHE, vocab_size=144)


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_file_that_would_run_something_runs_nothing(tmp_path, capsys):
    path = tmp_path / CACHE
    torch.save(Evil(), path)
    with pytest.raises(Damaged, match="Nothing of it was run") as refused:
        read_cache(path, vocab_size=144)
    assert "weights_only" not in str(refused.value)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Damaged):
        read_cache(path, vocab_size=144)
    path.write_bytes(b"")
    with pytest.raises(Damaged):
        read_cache(path, vocab_size=144)
    assert "this ran" not in capsys.readouterr().out
    with pytest.raises(NotFound):
        read_cache(tmp_path / "none.pt", vocab_size=144)


def test_a_meta_file_without_its_sizes_is_refused(tmp_path):
    (tmp_path / META).write_text('{"knowledge_num": 16}')
    with pytest.raises(DataError, match="embedding_dim"):
        read_meta(tmp_path / META)
    (tmp_path / META).write_text('{"knowledge_num": 15, "embedding_dim": 12, "keys_path": "keys.pt"}')
    with pytest.raises(DataError, match="The next one is 16"):
        read_meta(tmp_path / META)
