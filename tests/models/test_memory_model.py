"""A base with memory modules: itself while nothing is read, causal and cacheable while something is, and every tensor learns."""

import itertools

import numpy as np
import pytest
import torch

from nightschool.errors import ModelError
from nightschool.layers.forward import prepare
from nightschool.layers.memory_fit import PaddedTexts
from nightschool.layers.memory_fusion import Pointed, copied_log_probs, mix
from nightschool.layers.memory_gate import GateFeatures, MemoryGate, fixed_projection, reading_scores
from nightschool.layers.memory_reading import Candidate, MemoryReading
from nightschool.layers.memory_relation import Told
from nightschool.models.build import build_model
from nightschool.models.memory_model import MemoryAttachment, MemoryModel, generate_greedily
from nightschool.models.memory_modules import MemoryModules, shape_for
from tests.support.tokenizers_for_tests import byte_tokenizer

VOCABULARY = 300
CANDIDATES = [
    Candidate("m1", 1, (5, 6, 7, 8), 0.9),
    Candidate("m2", 2, (9, 10), 0.2),
    Candidate("m3", 7, (5, 11, 12), -0.1),
]


def a_model(architecture="tiny-qwen3", *, moved=True, **shape):
    base = build_model(architecture, VOCABULARY, seed=1).eval()
    given = {"knowledge_dim": 32, "gate_rank": 4, "fusion_rank": 16} | shape
    model = MemoryModel(base, MemoryModules(shape_for(base, byte_tokenizer(), **given), seed=3))
    if moved:  # as if it had learned something: the pointer speaks, and the fusion is not zero
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            model.memory.reader.pointer.sentinel_bias.fill_(1.0)
            for layer in model.memory.reader.fusion.layers:
                layer.out.normal_(0, 0.5, generator=generator)
    prepare(model)
    return model


def some_ids(count, seed=0):
    return torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids, reading=None):
    spans = [] if reading is None else [(slice(0, ids.shape[1]), reading)]
    with torch.no_grad(), model.reading(spans):
        return model(input_ids=ids, use_cache=False).logits[0]


@pytest.mark.parametrize("architecture", ["tiny-qwen3", "tiny-llama", "tiny-gpt-neox", "tiny-qwen3-moe", "tiny"])
def test_off_or_empty_it_is_the_base_to_the_bit_and_on_it_is_not(architecture):
    ids = some_ids(11)
    base = build_model(architecture, VOCABULARY, seed=1).eval()
    with torch.no_grad():
        expected = base(input_ids=ids, use_cache=False).logits[0]
    model = a_model(architecture)
    assert torch.equal(logits_of(model, ids), expected)
    assert torch.equal(logits_of(model, ids, MemoryReading.of([])), expected)
    read = logits_of(model, ids, MemoryReading.of(CANDIDATES))
    assert (read - expected).abs().max() > 0.1
    assert torch.equal(logits_of(model, ids), expected)
    model.attachment.remove()
    with torch.no_grad():
        assert torch.equal(model.base(input_ids=ids, use_cache=False).logits[0], expected)


def test_fresh_fusion_adds_nothing_and_probabilities_stay_probabilities():
    model, ids = a_model(moved=False), some_ids(9)
    base = logits_of(model, ids).log_softmax(-1)
    reading = MemoryReading.of(CANDIDATES)
    with torch.no_grad(), model.reading([(slice(0, 9), reading)]) as traces:
        read = model(input_ids=ids, use_cache=False).logits[0]
    assert torch.allclose(read.exp().sum(-1), torch.ones(9), atol=1e-5)
    left = [token for token in range(VOCABULARY) if token not in reading.token_ids[reading.mask].tolist()]
    assert torch.allclose(read[:, left], base[:, left] + traces[0].pointed.sentinel[:, None], atol=1e-5)


def test_it_is_causal():
    model, reading = a_model(), MemoryReading.of(CANDIDATES)
    ids = some_ids(10)
    before = logits_of(model, ids, reading)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % VOCABULARY
    after = logits_of(model, changed, reading)
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] - after[6:]).abs().amax(-1).min() > 1e-6


def test_the_order_of_candidates_changes_no_bit():
    model, ids = a_model(), some_ids(8)
    for order in itertools.permutations(CANDIDATES):
        assert torch.equal(
            logits_of(model, ids, MemoryReading.of(order)), logits_of(model, ids, MemoryReading.of(CANDIDATES))
        )


def test_with_a_cache_token_by_token_it_says_what_it_says_at_once():
    model, ids = a_model(), some_ids(12)
    reading = MemoryReading.of(CANDIDATES)
    expected = logits_of(model, ids, reading)
    cache, rows = None, []
    with torch.no_grad():
        for part in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
            with model.reading([(slice(0, part.shape[1]), reading)]):
                output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0])
    assert torch.allclose(torch.cat(rows), expected, atol=1e-4)


def test_requests_in_one_row_read_their_own_entries_or_none():
    """What the rest of the row reads reaches nobody, and `wanted` logits are those of the same tokens."""
    model, ids = a_model(), some_ids(12)
    one, other = MemoryReading.of(CANDIDATES[:2]), MemoryReading.of(CANDIDATES[2:])
    alone = logits_of(model, ids)
    with torch.no_grad(), model.reading([(slice(0, 4), one)]):
        first = model(input_ids=ids, use_cache=False).logits[0]
    with torch.no_grad(), model.reading([(slice(0, 4), one), (slice(8, 12), other)]):
        both = model(input_ids=ids, use_cache=False).logits[0]
    assert torch.equal(first[:4], both[:4])
    assert torch.allclose(first[:3], logits_of(model, ids, one)[:3], atol=1e-5)
    assert (both[8:] - first[8:]).abs().max() > 1e-3
    wanted = [1, 5, 11]
    with torch.no_grad(), model.reading([(slice(0, 4), one), (slice(8, 12), other)], wanted):
        few = model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(wanted)).logits[0]
    assert torch.allclose(few, both[wanted], atol=1e-5)
    assert alone.shape == both.shape


def test_every_tensor_has_a_gradient_by_the_second_step():
    """Also the gate, through the score that the reading carries."""
    model, ids = a_model(moved=False), some_ids(9)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("memory.") for name in learning)
    optimizer = torch.optim.Adam(learning.values(), lr=1e-2)
    features = GateFeatures(model.get_input_embeddings().weight)
    seen = set()
    for _ in range(2):
        tokens = [torch.tensor(candidate.token_ids) for candidate in CANDIDATES]
        lengths = [len(t) for t in tokens]
        found, asked = features(torch.cat(tokens)), features(ids[0])
        gate = model.memory.gate
        scores = reading_scores(
            (gate.subject(*found, lengths) @ gate.subject(*asked, [9]).T)[:, 0],
            (gate.relation(*found, lengths) @ gate.relation(*asked, [9]).T)[:, 0],
        )
        reading = MemoryReading.of(CANDIDATES)
        reading.scores = scores
        asked_of = PaddedTexts.of(features, [(41, 5, 11, 12, 40, 6)], "cpu")
        told = PaddedTexts.of(features, [candidate.token_ids for candidate in CANDIDATES], "cpu")
        named = model.memory.reader.subject_fit(asked_of, told, told)[0]
        states = model.encoder.states_of([candidate.token_ids for candidate in CANDIDATES])
        of_base = Told.of(states, [range(len(one)) for one in states])
        reading.fits = named + model.memory.reader.relation_fit(of_base, of_base)[0]
        with model.reading([(slice(0, 9), reading)]):
            logits = model(input_ids=ids, use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).backward()
        seen |= {name for name, p in learning.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert seen == set(learning)


def test_the_mixture_adds_what_the_pointer_copies_of_each_token():
    logits = torch.randn(2, 6)
    both = torch.randn(2, 4).log_softmax(1)
    pointed, ids = Pointed(both[:, 0], both[:, 1:]), torch.tensor([4, 2, 4])
    expected = pointed.sentinel.exp()[:, None] * logits.softmax(-1)
    expected[:, 4] += pointed.tokens[:, [0, 2]].exp().sum(1)
    expected[:, 2] += pointed.tokens[:, 1].exp()
    there, place = torch.tensor([[2, 4, 0], [2, 4, 0]]), torch.tensor([[1, 0, 1], [1, 0, 1]])
    absent = torch.tensor([[False, False, True]]).expand(2, 3)
    assert torch.allclose(mix(logits, pointed, there, place, absent).exp(), expected, atol=1e-6)
    assert torch.allclose(mix(logits, pointed, there[:, :2], place).exp(), expected, atol=1e-6)
    copied = copied_log_probs(pointed, ids, [4, 3])
    assert torch.allclose(copied[0].exp(), pointed.tokens[0, [0, 2]].exp().sum())
    assert copied[1] == -torch.inf


def test_the_pointer_follows_a_name_once_it_has_begun_it():
    """Untrained: the state after a token that was copied matches the state before the next one in the entry."""
    model = a_model(moved=False)
    with torch.no_grad():
        model.memory.reader.pointer.sentinel_bias.fill_(0.0)
        model.memory.reader.pointer.log_scale.fill_(5.0)
    entry = (20, 21, 22, 23, 24, 25)
    answer, sources = generate_greedily(model, [20, 21, 22], MemoryReading.of([Candidate("m9", 4, entry, 1.0)]), 3)
    assert answer == [23, 24, 25]
    assert [source.kind for source in sources] == ["copied"] * 3
    assert all(source.entries[0].entry == "m9" and source.entries[0].row == 4 for source in sources)
    assert all(source.entries[0].weight > 0.5 for source in sources)
    reading = MemoryReading.of([Candidate("m9", 4, entry, 1.0)])
    generate_greedily(model, [20, 21, 22], reading, 1)
    without = reading.without("m9")
    assert len(without) == 0
    plain, sources = generate_greedily(model, [20, 21, 22], without, 3)
    assert plain == generate_greedily(model, [20, 21, 22], None, 3)[0]
    assert {source.kind for source in sources} == {"weights"}


def test_without_one_entry_the_rest_reads_as_if_it_had_never_been_found():
    model, ids = a_model(), some_ids(7)
    reading = MemoryReading.of(CANDIDATES)
    logits_of(model, ids, reading)
    few = reading.without("m2")
    assert few.entries == ("m1", "m3")
    fresh = MemoryReading.of([CANDIDATES[0], CANDIDATES[2]])
    assert torch.allclose(logits_of(model, ids, few), logits_of(model, ids, fresh), atol=1e-5)


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("half", [12, 5])
def test_the_gate_is_what_its_description_says_in_numpy(rank, half):
    torch.manual_seed(0)
    gate = MemoryGate(12, 2 * half, rank)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    table, token_ids, lengths = torch.randn(200, 12), torch.randint(0, 200, (9,)), [4, 2, 3]
    features, log_priors = GateFeatures(table)(token_ids)
    tensors = {name: tensor.numpy() for name, tensor in gate.state_dict().items()}
    assert not [name for name in tensors if "fixed" in name]
    fixed = fixed_projection(12, half).numpy()
    assert np.allclose(fixed @ fixed.T, np.eye(half), atol=1e-5)
    for name, head in (("subject", gate.subject), ("relation", gate.relation)):
        ours = head(features, log_priors, lengths).detach().numpy()
        start = 0
        for number, length in enumerate(lengths):
            ids = token_ids[start : start + length].numpy()
            start += length
            e = table.numpy()[ids] - table.numpy().mean(0)
            h = e / np.linalg.norm(e, axis=1, keepdims=True)
            z = h @ tensors[f"{name}.attention"] + np.log(np.log1p(ids / 100) ** 2 + 1e-4)
            w = np.exp(z - z.max())
            u = (fixed + tensors[f"{name}.projection.b"] @ tensors[f"{name}.projection.a"]) @ ((w / w.sum()) @ h)
            assert np.allclose(ours[number], u / np.linalg.norm(u), atol=1e-5)


def test_a_fresh_gate_tells_texts_apart():
    """With a low rank whose factor is 0 it would be blind, and would never learn to see."""
    gate = MemoryGate(64, 32, 4)
    addresses = gate.subject(*GateFeatures(torch.randn(50, 64))(torch.arange(6)), [3, 3]).detach()
    assert float(addresses[0] @ addresses[1]) < 0.9


def test_shapes_that_cannot_be_are_refused():
    base, tokenizer = build_model("tiny-qwen3", VOCABULARY, seed=1), byte_tokenizer()
    with pytest.raises(ModelError, match="Write 1 to 2"):
        shape_for(base, tokenizer, encoder_layers=3)
    with pytest.raises(ModelError, match="fusion layers lie from 1 to 1"):
        shape_for(base, tokenizer, encoder_layers=2, fusion_layers=[0])
    with pytest.raises(ModelError, match=r"two halves\. Write 34"):
        MemoryModules(shape_for(base, tokenizer, knowledge_dim=33))
    with pytest.raises(ModelError, match=r"Write at most 128\."):
        MemoryModules(shape_for(base, tokenizer, knowledge_dim=130))
    modules = MemoryModules(shape_for(base, tokenizer, knowledge_dim=8))
    with pytest.raises(ModelError, match="width 64, and this one has 128"):
        MemoryAttachment(build_model("tiny", VOCABULARY, seed=1), modules)
    model = MemoryModel(base, modules)
    with (
        pytest.raises(ModelError, match="before they were encoded"),
        model.attachment.reading([(slice(0, 2), MemoryReading.of(CANDIDATES))]),
    ):
        pass
