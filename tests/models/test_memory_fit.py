"""Whether an entry fits a question: its subject, by the words of both, and its relation, by what the base makes of them.

What does not fit is not read, whatever it was found with.
"""

from dataclasses import replace

import pytest
import torch

from nightschool.layers.forward import prepare
from nightschool.layers.memory_fit import PaddedTexts, SubjectFit
from nightschool.layers.memory_gate import GateFeatures
from nightschool.layers.memory_reading import Address, Candidate, MemoryReading
from nightschool.layers.memory_relation import RelationFit, Told, places_asked, places_told
from nightschool.models.build import build_model
from nightschool.models.memory_model import MemoryModel, generate_greedily
from nightschool.models.memory_modules import MemoryModules, shape_for
from nightschool.models.memory_why import explain
from tests.support.tokenizers_for_tests import byte_tokenizer

ADA, BERG, FINCH, LIVES, WORKS, WHERE = (20, 21, 22, 30, 31, 40)


@pytest.fixture(scope="module")
def base():
    return build_model("tiny-qwen3", 300, seed=1).eval()


def fits(base, questions, entries):
    """Log-odds of an untrained fit of subjects; an entry is its subject and its relation."""
    features = GateFeatures(base.get_input_embeddings().weight)
    texts = (questions, [subject for subject, _ in entries], [relation for _, relation in entries])
    with torch.no_grad():
        return SubjectFit(64)(*(PaddedTexts.of(features, one, "cpu") for one in texts))


def test_words_that_are_missing_or_go_on_beside_the_subject_speak_against_an_entry(base):
    asked = [(WHERE, ADA, BERG, LIVES)]
    whole, other, part = fits(base, asked, [((ADA, BERG), (LIVES,)), ((ADA, FINCH), (LIVES,)), ((ADA,), (LIVES,))])[0]
    assert whole > part > other
    # What the relation says, too, is no part of a longer name.
    known, unknown = fits(base, [(ADA, LIVES)], [((ADA,), (LIVES,)), ((ADA,), (WORKS,))])[0]
    assert known > unknown


def test_the_same_tokens_in_another_order_are_another_subject(base):
    asked = [(9, 3, 7, 0, LIVES)]
    same, other, longer = fits(base, asked, [((9, 3, 7, 0), (LIVES,)), ((3, 7, 9, 0), (LIVES,)), ((3, 7), (LIVES,))])[0]
    assert same > 0 > other
    assert longer < same
    # Where a name stands twice, the place counts where it stands alone.
    once, twice = (
        fits(base, [(ADA, FINCH, WORKS)], [((ADA,), ())])[0],
        fits(base, [(ADA, FINCH, WHERE, ADA)], [((ADA,), ())])[0],
    )
    assert twice >= once


def test_what_tells_a_relation_lies_beside_the_subject_and_before_the_value():
    assert places_asked((WHERE, ADA, BERG, LIVES), (ADA, BERG)) == [0, 3]
    assert places_asked((LIVES, ADA), (ADA,)) == [0, 1]
    assert places_told((ADA, LIVES, 50, 51), (ADA,), 2) == [1]
    assert places_told((LIVES, ADA, ADA, 51), (ADA,), 2) == [0, 1]
    assert places_told((50, 51), (), 0) == [0, 1]


def test_padding_changes_no_relation_and_the_last_places_count_most():
    torch.manual_seed(0)
    fit = RelationFit(16, 4)
    states = [torch.randn(length, 16) for length in (3, 7, 1)]
    places = [range(len(one)) for one in states]
    together = fit(Told.of(states, places), Told.of(states, places))
    for row, asked in enumerate(states):
        for column, told in enumerate(states):
            alone = fit(Told.of([asked], [range(len(asked))]), Told.of([told], [range(len(told))]))[0, 0]
            assert torch.allclose(alone, together[row, column], atol=1e-5)
    assert (together.argmax(1) == torch.arange(3)).all()
    first, last = states[1].clone(), states[1].clone()
    first[0], last[-1] = states[2][0], states[2][0]
    changed = fit(Told.of([first, last], places[1:2] * 2), Told.of(states[2:], places[2:]))[:, 0]
    assert changed[1] > changed[0]
    together.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fit.parameters())


def test_padding_and_what_else_is_looked_at_change_nothing(base):
    entries = [((ADA, BERG), (LIVES,)), ((ADA,), (WORKS, LIVES, WHERE))]
    together = fits(base, [(WHERE, ADA, LIVES), (ADA,)], entries)
    for row, question in enumerate([(WHERE, ADA, LIVES), (ADA,)]):
        for column, entry in enumerate(entries):
            assert torch.allclose(fits(base, [question], [entry])[0, 0], together[row, column], atol=1e-5)
    assert fits(base, [()], [((ADA,), ())]).isfinite().all()


def a_reader(base):
    modules = MemoryModules(shape_for(base, byte_tokenizer(), knowledge_dim=32, gate_rank=4, fusion_rank=16), seed=3)
    with torch.no_grad():
        modules.reader.pointer.sentinel_bias.fill_(1.0)
    model = MemoryModel(base, modules)
    prepare(model)
    return model


def found(address, row=1):
    return Candidate(f"m{row}", row, (ADA, BERG, LIVES, 50 + row), 1.0, address)


def test_what_does_not_fit_is_not_read_however_sure_the_finder_is(base):
    model, prompt = a_reader(base), [WHERE, ADA, BERG, LIVES]
    try:
        fitting = Address((ADA, BERG), (LIVES,), 3, (tuple(prompt),))
        other = Address((FINCH, BERG), (WORKS,), 3, (tuple(prompt),))
        alone, _ = generate_greedily(model, prompt, None, 6)
        closed = MemoryReading.of([found(other), found(other, 2)])
        assert not closed.is_closed
        answer, sources = generate_greedily(model, prompt, closed, 6)
        assert closed.is_closed
        assert answer == alone
        assert {source.kind for source in sources} == {"weights"}
        told = explain(model, prompt, answer, closed)
        assert [(one.source.kind, one.without) for one in told] == [("weights", {})] * len(answer)
        # Of several, only those that fit are there to be read; what has no address nobody judges.
        some = MemoryReading.of([found(other), found(fitting, 2), found(None, 3)])
        model.encoder.encode([some])
        assert sorted(set(some.encoded.entry.tolist())) == [1, 2]
        assert some.fits[1] > some.fits[0]
        assert some.fits[2] == 0
        assert some.without("m2").encoded.entry.tolist() == [1] * 4
        # Asked in another spelling, too, an entry fits.
        spelled = MemoryReading.of([found(Address((ADA, BERG), (LIVES,), 3, ((1, 2, 3), tuple(prompt))))])
        model.encoder.encode([spelled])
        assert not spelled.is_closed
        read, sources = generate_greedily(model, prompt, MemoryReading.of([found(fitting)]), 6)
        assert read != alone or {source.kind for source in sources} != {"weights"}
    finally:
        model.attachment.remove()


def test_an_entry_of_the_subject_that_tells_something_else_is_closed_by_a_threshold_of_its_own(base):
    """What the base makes of question and entry is compared before anything is read; entries are encoded only if they are named."""
    model, prompt = a_reader(base), [WHERE, ADA, BERG, LIVES]
    relation, shape = model.memory.reader.relation_fit, model.memory.shape
    try:
        alone, _ = generate_greedily(model, prompt, None, 6)

        def a_reading():
            return MemoryReading.of([found(Address((ADA, BERG), (LIVES,), 3, (tuple(prompt),))), found(None, 2)])

        (usual, told) = (a_reading(), a_reading())
        model.encoder.encode([usual])
        assert sorted(set(usual.encoded.entry.tolist())) == [0, 1]
        with torch.no_grad():
            relation.bias.fill_(-50.0)
        model.encoder.encode([told])
        assert set(told.encoded.entry.tolist()) == {1}
        assert told.fits[0] < usual.fits[0]
        assert told.fits[1] == 0
        one = MemoryReading.of([found(Address((ADA, BERG), (LIVES,), 3, (tuple(prompt),)))])
        answer, sources = generate_greedily(model, prompt, one, 6)
        assert one.is_closed
        assert (answer, {source.kind for source in sources}) == (alone, {"weights"})
        model.memory.shape = replace(shape, relation_closed_below=0.0)
        lax = MemoryModel(base, model.memory)
        again = a_reading()
        lax.encoder.encode([again])
        lax.attachment.remove()
        assert sorted(set(again.encoded.entry.tolist())) == [0, 1]
    finally:
        model.attachment.remove()
