"""A GGUF file as a base: unpacked once, exactly, or refused with a reason."""

import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import pytest
import torch

from nightschool.data.chat.render import stop_token_ids
from nightschool.errors import Damaged, ModelError, NotFound
from nightschool.models import gguf as base_of_gguf
from nightschool.models.load import load_base
from nightschool.models.stored import stored_weights
from nightschool.store.home import Home
from tests.support.gguf_files import MERGED, TOKENS, make_gguf


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def cached(home):
    return sorted((home.cache / "gguf").iterdir()) if (home.cache / "gguf").is_dir() else []


@pytest.mark.parametrize(
    ("architecture", "quantisation", "dtype"),
    [
        ("llama", "F32", torch.float32),
        ("llama", "Q8_0", torch.float32),
        ("qwen2", "Q4_1", torch.float32),
        ("qwen2", "F16", torch.float16),  # the norms of a fresh model are 1, which 16 bits hold
        ("qwen2", "BF16", torch.bfloat16),
    ],
)
def test_every_weight_arrives_as_the_file_holds_it(architecture, quantisation, dtype, tmp_path, home):
    model = make_gguf(tmp_path / "m.gguf", architecture, quantisation=quantisation)
    loaded = load_base(str(tmp_path / "m.gguf"), home)
    wanted = model.state_dict()
    assert loaded.model.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    assert (loaded.ref, loaded.path) == (str(tmp_path / "m.gguf"), cached(home)[0])
    assert (loaded.context_tokens, loaded.vocab_size, loaded.adapter) == (256, len(TOKENS), False)
    stored = stored_weights(str(tmp_path / "m.gguf"), home)
    assert (stored.num_elements, stored.dtype) == (sum(p.numel() for p in model.parameters()), dtype)


def test_the_tokenizer_the_template_and_the_end_of_an_answer_come_along(tmp_path, home):
    make_gguf(tmp_path / "m.gguf")
    loaded = load_base(str(tmp_path / "m.gguf"), home)
    tokenizer = loaded.tokenizer
    end = TOKENS.index("<|im_end|>")
    assert stop_token_ids(tokenizer) == {end}
    assert loaded.model.generation_config.eos_token_id == end
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("ab<|im_end|>")["input_ids"] == [TOKENS.index(MERGED), end]


def test_text_is_split_as_the_model_learned_it(tmp_path, home):
    make_gguf(tmp_path / "smollm.gguf", pre="smollm")
    make_gguf(tmp_path / "gpt2.gguf", pre="gpt-2", seed=2)
    splits = [
        load_base(str(tmp_path / f"{name}.gguf"), home).tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(
            "x  12"
        )
        for name in ("smollm", "gpt2")
    ]
    assert [[piece for piece, _ in split] for split in splits] == [["x", "ĠĠ", "1", "2"], ["x", "Ġ", "Ġ12"]]


def test_a_file_is_unpacked_once_and_again_when_the_cache_was_damaged(tmp_path, home):
    make_gguf(tmp_path / "m.gguf")
    (tmp_path / "copy.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    first = load_base(str(tmp_path / "m.gguf"), home)
    made = (first.path / "model.safetensors").stat().st_ino
    assert (
        load_base("m.gguf", home, root=tmp_path).path == load_base(str(tmp_path / "copy.gguf"), home).path == first.path
    )
    assert (first.path / "model.safetensors").stat().st_ino == made
    weights = first.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    again = load_base(str(tmp_path / "m.gguf"), home)
    assert again.path == first.path
    assert weights.stat().st_ino != made


def test_its_keys_are_parsed_once(tmp_path, home, monkeypatch):
    make_gguf(tmp_path / "m.gguf")
    read, reader = [], gguf.GGUFReader

    def counted(path):
        read.append(path)
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    load_base(str(tmp_path / "m.gguf"), home)
    assert len(read) == 1
    assert gguf.GGUFReader is counted


def test_several_processes_share_one_unpacking(tmp_path, home, monkeypatch):
    make_gguf(tmp_path / "m.gguf")
    unpacked = []
    once = base_of_gguf._unpack
    monkeypatch.setattr(base_of_gguf, "_unpack", lambda *a: (unpacked.append(a), once(*a)))
    with ThreadPoolExecutor(3) as threads:
        folders = set(threads.map(lambda _: base_of_gguf.unpacked(tmp_path / "m.gguf", home), range(3)))
    assert len(folders) == len(unpacked) == 1


def test_nothing_is_kept_of_a_folder_that_does_not_give_the_logits_of_its_file(tmp_path, home, monkeypatch):
    make_gguf(tmp_path / "m.gguf")

    rebuilt = base_of_gguf._rebuilt

    def with_another_weight(model, config):
        plain = rebuilt(model, config)
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight + 1)
        return plain

    monkeypatch.setattr(base_of_gguf, "_rebuilt", with_another_weight)
    with pytest.raises(ModelError, match="lost 1 of"):
        load_base(str(tmp_path / "m.gguf"), home)
    assert cached(home) == []


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (
            {"architecture": "llama", "leave_out": ("blk.1.ffn_up.weight",)},
            ModelError,
            "missing keys model.layers.1.mlp.up",
        ),
        ({"extra": {"blk.0.more.weight": [1.0, 2.0]}}, Damaged, "hold .* numbers and the model takes"),
        ({"extra": {"rope_freqs.weight": [1.0] * 8}}, ModelError, "rope_freqs.weight, a rotation for long contexts"),
        ({"pre": "unheard-of"}, ModelError, "splits text in the way 'unheard-of'"),
        ({"keys": {"split.count": 3}}, ModelError, "one of 3 parts"),
        ({"keys": {"llama.expert_count": 1 << 30}}, Damaged, "llama.expert_count = 1,073,741,824"),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else None,
)
def test_a_file_that_would_answer_otherwise_is_refused(wrong, error, says, tmp_path, home):
    make_gguf(tmp_path / "m.gguf", **wrong)
    with pytest.raises(error, match=says):
        load_base(str(tmp_path / "m.gguf"), home)
    assert cached(home) == []


def header(*, tensors=0, keys=b"", count=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + keys


def key(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


ARCHITECTURE = key(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", Damaged, "is cut"),
        (b"\x89PNG and more of it", ModelError, "is no GGUF file"),
        (header()[:20], Damaged, "cut: it ends within its header"),
        (header(version=1 << 24), ModelError, "big-endian"),
        (header(version=1), ModelError, "version 1 of the format"),
        (header(), ModelError, "names no architecture"),
        (header(tensors=1 << 60), Damaged, "1,152,921,504,606,846,976 tensors"),
        (header(count=1 << 60), Damaged, "1,152,921,504,606,846,976 keys"),
        (header(count=1, keys=struct.pack("<Q", 1 << 62)), Damaged, "bytes in one text"),
        (header(count=1, keys=key(b"a", 9, struct.pack("<IQ", 0, 1 << 50))), Damaged, "elements in its arrays"),
        (header(count=1, keys=key(b"a", 9, struct.pack("<IQ", 9, 1))), Damaged, "an array of type 9"),
        (header(count=1, keys=key(b"a", 77, b"")), Damaged, "a value of type 77"),
        (header(count=1, keys=struct.pack("<Q", 2) + b"\xff\xff"), Damaged, "no UTF-8"),
        (header(count=1, keys=key(b"a", 6, struct.pack("<f", float("nan")))), Damaged, "the number nan"),
        (
            header(count=2, keys=ARCHITECTURE + key(b"llama.block_count", 4, struct.pack("<I", 1 << 23))),
            Damaged,
            "8,388,608 layers and holds 0 tensors",
        ),
        (
            header(count=1, tensors=1, keys=ARCHITECTURE + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 99)),
            Damaged,
            "dimensions",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_broken_header_is_refused_before_anything_is_built(content, error, says, tmp_path, home):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(error, match=says):
        load_base(str(tmp_path / "m.gguf"), home)


def test_a_cut_file_says_where_it_ends(tmp_path, home):
    make_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:-10_000])
    with pytest.raises(Damaged, match=f"is cut: its tensor .* and the file has {len(whole) - 10_000:,}"):
        load_base(str(tmp_path / "m.gguf"), home)


def test_an_architecture_that_is_not_read_back_is_named_with_those_that_are(tmp_path, home):
    make_gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"llama", b"lemma"))
    with pytest.raises(ModelError, match=r"the architecture 'lemma', which transformers does not read back.*qwen2"):
        load_base(str(tmp_path / "m.gguf"), home)


def test_without_the_package_it_says_how_to_get_it(tmp_path, home, monkeypatch):
    make_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'nightschool\[gguf\]'"):
        load_base(str(tmp_path / "m.gguf"), home)


def test_a_file_that_is_not_there_is_not_found(home):
    with pytest.raises(NotFound, match="no such file"):
        load_base("nowhere.gguf", home)
