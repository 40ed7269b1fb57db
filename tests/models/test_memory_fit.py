"""Whether an entry fits a question: told from the words of both; what does not fit is not read, whatever it was found with."""

import pytest
import torch

from nightschool.layers.forward import prepare
from nightschool.layers.memory_fit import EntryFit, PaddedTexts
from nightschool.layers.memory_gate import GateFeatures
from nightschool.layers.memory_reading import Address, Candidate, MemoryReading
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
    """Log-odds of an untrained fit; an entry is its subject and its relation."""
    torch.manual_seed(0)
    features = GateFeatures(base.get_input_embeddings().weight)
    texts = (questions, [subject for subject, _ in entries], [relation for _, relation in entries])
    with torch.no_grad():
        return EntryFit(64, 4)(*(PaddedTexts.of(features, one, "cpu") for one in texts))


def test_words_that_are_missing_or_go_on_beside_the_subject_speak_against_an_entry(base):
    asked = [(WHERE, ADA, BERG, LIVES)]
    whole, other, part = fits(base, asked, [((ADA, BERG), (LIVES,)), ((ADA, FINCH), (LIVES,)), ((ADA,), (LIVES,))])[0]
    assert whole > part > other
    means, means_not = fits(base, asked, [((ADA, BERG), (LIVES,)), ((ADA, BERG), (WORKS,))])[0]
    assert means > means_not


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
        fitting = Address((ADA, BERG), (LIVES,), (tuple(prompt),))
        other = Address((FINCH, BERG), (WORKS,), (tuple(prompt),))
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
        spelled = MemoryReading.of([found(Address((ADA, BERG), (LIVES,), ((1, 2, 3), tuple(prompt))))])
        model.encoder.encode([spelled])
        assert not spelled.is_closed
        read, sources = generate_greedily(model, prompt, MemoryReading.of([found(fitting)]), 6)
        assert read != alone or {source.kind for source in sources} != {"weights"}
    finally:
        model.attachment.remove()
