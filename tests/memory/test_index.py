"""The memory index: what it finds is what an exhaustive scan of the same addresses finds, whatever was written before."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nightschool.errors import Conflict, Damaged, NotFound
from nightschool.memory.index.cells import TAIL, CellLists
from nightschool.memory.index.files import META, open_index, save_index
from nightschool.memory.index.hamming import nearest
from nightschool.memory.index.index import MemoryIndex
from nightschool.memory.index.quantiser import Quantiser

HALF, WIDTH = 16, 8
MADE_OF = {"store": "s1", "encoder": "e1", "tokenizer": "t1"}


def units(rng, *shape):
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class World:
    """Subjects with a few relations each; the tokens of a line are the subject's number, the relation's and the value's."""

    def __init__(self, subjects=200, relations=5, *, seed=0, knowledge_num=1024):
        rng = np.random.default_rng(seed)
        self.subjects, self.relations = units(rng, subjects, HALF), units(rng, relations, HALF)
        grid = np.array([(s, r) for s in range(subjects) for r in range(relations)])
        self.of = grid
        self.e1, self.e2 = self.subjects[grid[:, 0]], self.relations[grid[:, 1]]
        self.index = MemoryIndex.empty(Quantiser.fit(self.e1, self.e2, knowledge_num), WIDTH, keeps_keys=True)

    def tokens(self, of, value=9000):
        lines = np.zeros((len(of), WIDTH), np.int32)
        lines[:, 0], lines[:, 1], lines[:, 2] = of[:, 0] + 1, of[:, 1] + 5000, value
        return lines

    def add(self, first_row=1, count=None, revision=1):
        of = self.of[:count]
        rows = np.arange(first_row, first_row + len(of))
        self.index.add(rows, self.tokens(of), self.e1[: len(of)], self.e2[: len(of)], revision,
                       spans=np.tile([1, 2], (len(of), 1)), lengths=np.full(len(of), 3))  # fmt: skip
        return rows

    def ask(self, of, *, k=4, tokens=None, **kwargs):
        of = np.atleast_2d(of)
        return self.index.search(self.subjects[of[:, 0]], self.relations[of[:, 1]], tokens, k, **kwargs)


@pytest.fixture
def world():
    world = World()
    world.add()
    return world


def test_each_entry_is_found_by_its_own_address(world):
    hits = world.ask(world.of)
    assert hits.rows[:, 0].tolist() == list(range(1, 1001))
    assert np.allclose(hits.subject_cosines[:, 0], 1, atol=2e-3)
    assert (np.diff(hits.scores, axis=1) <= 0).all()


def test_what_is_found_is_what_a_scan_of_all_addresses_finds(world):
    rng = np.random.default_rng(1)
    queries = world.e1[::7] + 0.1 * units(rng, len(world.e1[::7]), HALF)
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    relations = world.e2[::7]
    scores = queries @ world.e1.T + relations @ world.e2.T
    hits = world.index.search(queries, relations, None, 1)
    assert (hits.rows[:, 0] - 1 == scores.argmax(axis=1)).mean() > 0.98


def test_what_came_after_the_codebooks_were_fitted_is_found(world):
    rng = np.random.default_rng(2)
    new = units(rng, 50, HALF)
    world.index.add(np.arange(2001, 2051), np.zeros((50, WIDTH), np.int32), new, world.relations[[0] * 50], 2)
    hits = world.index.search(new, world.relations[[0] * 50], None, 1)
    assert hits.rows[:, 0].tolist() == list(range(2001, 2051))


def test_an_edit_takes_the_address_and_a_reader_of_the_old_revision_sees_the_old_row(world):
    world.index.replace(1, 5001, world.tokens(world.of[:1], value=9999)[0], 2)
    assert world.ask([0, 0], k=1).rows[0, 0] == 5001
    assert world.ask([0, 0], k=1, revision=1).rows[0, 0] == 1
    found = world.ask([0, 0], k=1000)
    assert 1 not in found.rows


def test_what_has_ended_is_not_found_but_by_readers_of_before(world):
    world.index.end(1, 2)
    world.index.end(2, 3)
    assert not {1, 2} & set(world.ask([0, 0], k=900).rows[0].tolist())
    assert world.ask([0, 1], k=1, revision=2).rows[0, 0] == 2
    assert {1, 2} <= set(world.ask([0, 0], k=900, revision=1).rows[0].tolist())


def test_what_is_born_later_is_not_seen_at_an_earlier_revision(world):
    world.index.add([1500], world.tokens(world.of[:1]), world.e1[:1], world.e2[:1], 4)
    world.index.end(3, 5)
    assert world.ask([0, 0], k=1, revision=3).rows[0, 0] == 1
    assert 1500 in world.ask([0, 0], k=2, revision=4).rows


def test_a_purged_row_is_gone_from_every_revision_and_from_every_array(world):
    world.index.end(1, 2)
    assert world.index.purge(1)
    assert not world.index.purge(77_777)
    for revision in (None, 1, 2):
        assert 1 not in world.ask([0, 0], k=900, revision=revision, tokens=[[1, 5000]]).rows
    columns = world.index.columns
    assert not any(array[0].any() for array in (columns.tokens, columns.codes, columns.keys, columns.spans))
    assert not columns.hashes[:, 0].any()
    assert 0 not in world.index.postings.of_token(1)


def test_ten_thousand_edits_of_one_fact_leave_one_answer():
    world = World(20)
    rows = world.add()
    row = 1
    for edit in range(10_000):
        new = int(rows[-1]) + 1 + edit
        world.index.replace(row, new, world.tokens(world.of[:1], value=edit)[0], 2 + edit)
        row = new
    hits = world.ask([0, 0], k=100)
    assert hits.rows[0, 0] == row
    assert len(set(hits.rows[0].tolist()) - {0}) == 100
    assert len(world.index) == 100
    assert world.ask([0, 0], k=1, revision=5000).rows[0, 0] == int(rows[-1]) + 4999


class Names:
    """Scores finalists by their first two tokens."""

    certain, relation_weight = 0.9, 1.0

    def __call__(self, lines):
        return (lines.tokens[:, 0] == 43).astype(np.float32), (lines.tokens[:, 1] == 5002).astype(np.float32)


def test_a_name_that_the_encoder_does_not_know_is_found_by_its_tokens(world):
    unknown = -world.subjects[42:43]
    asked = world.index.search(unknown, world.relations[:1], None, 5, rescorer=Names())
    assert 42 * 5 + 3 not in asked.rows[0]
    named = world.index.search(unknown, world.relations[:1], [[43, 5002]], 5, rescorer=Names())
    assert named.rows[0, 0] == 42 * 5 + 3


def test_the_bits_find_what_cells_do_not():
    """All lie in one cell of the subject's codebook, and the question's subject is nearest to another."""
    rng = np.random.default_rng(4)
    hashes = rng.integers(0, 2**63, (4, 5000)).astype(np.uint64)
    query = hashes[:, 1234].copy()
    query[0] ^= np.uint64(0b1011)
    assert 1234 in nearest(query, hashes, 1)
    assert len(nearest(query, hashes, 1)) == 1
    assert len(nearest(~hashes[:, 7], hashes, 5000)) == 5000


def test_rows_must_ascend(world):
    with pytest.raises(ValueError, match="must ascend from 1001"):
        world.index.add([1000], world.tokens(world.of[:1]), world.e1[:1], world.e2[:1], 2)
    with pytest.raises(KeyError):
        world.index.end(4000, 2)


def test_an_empty_index_finds_nothing():
    world = World()
    hits = world.ask([0, 0], tokens=[[1]])
    assert hits.rows.tolist() == [[0, 0, 0, 0]]
    assert np.isneginf(hits.scores).all()


def test_cells_are_the_best_however_many_are_empty():
    rng = np.random.default_rng(5)
    cells = np.concatenate([np.full(300, 5 * 64 + 7), rng.integers(0, 64 * 64, 200)]).astype(np.int32)
    lists = CellLists.of(64, np.arange(500, dtype=np.int32), cells)
    for _ in range(20):
        one, other = (rng.standard_normal(64).astype(np.float32) for _ in range(2))
        scores = one[cells // 64] + other[cells % 64]
        wanted = int(rng.integers(1, 400))
        found = lists.nearest(one, other, wanted)
        assert len(found) >= wanted
        assert scores[found].min() >= np.sort(scores)[-wanted] - 1e-6


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from("aerm"), st.integers(0, 10**6)), max_size=40), st.booleans())
def test_any_sequence_of_writes_is_seen_at_every_revision(writes, bulk):
    """Against a list of rows with born and died: additions, edits, ends, and a merge now and then."""
    world = World(12, 3, knowledge_num=64)
    model = {}
    if bulk:
        world.add()
        model = {row: [row - 1, 1, None] for row in range(1, 37)}
    next_row, revision = 37, 1
    for kind, number in writes:
        revision += 1
        live = [row for row, (_, _, died) in model.items() if died is None]
        if kind == "a":
            place = number % 36
            world.index.add([next_row], world.tokens(world.of[place : place + 1]), world.e1[place : place + 1],
                            world.e2[place : place + 1], revision)  # fmt: skip
            model[next_row] = [place, revision, None]
            next_row += 1
        elif kind == "e" and live:
            old = live[number % len(live)]
            world.index.replace(old, next_row, np.full(WIDTH, number % 999, np.int32), revision)
            model[old][2] = revision
            model[next_row] = [model[old][0], revision, None]
            next_row += 1
        elif kind == "r" and live:
            old = live[number % len(live)]
            world.index.end(old, revision)
            model[old][2] = revision
        elif kind == "m":
            world.index.rebuild_lists()
    for at in {1, max(revision // 2, 1), revision}:
        hits = world.ask([0, 0], k=120, revision=at)
        seen = {row for row, (_, born, died) in model.items() if born <= at and (died is None or died > at)}
        assert set(hits.rows[0].tolist()) - {0} == seen


def test_a_long_tail_is_merged(world):
    rng = np.random.default_rng(6)
    count = TAIL + 100
    new, row = units(rng, count, HALF), 5000
    for begin in range(0, count, 64):
        part = new[begin : begin + 64]
        world.index.add(np.arange(row, row + len(part)), np.zeros((len(part), WIDTH), np.int32), part,
                        np.repeat(world.relations[:1], len(part), axis=0), 2)  # fmt: skip
        row += len(part)
    hits = world.index.search(new[::97], world.relations[[0] * len(new[::97])], None, 1)
    assert (hits.rows[:, 0] == np.arange(5000, 5000 + count)[::97]).mean() > 0.98
    assert len(world.index) == 1000 + count


def test_saved_and_opened_it_finds_the_same_and_takes_more(world, tmp_path):
    world.index.replace(1, 5001, world.tokens(world.of[:1])[0], 2)
    world.index.end(2, 3)
    before = world.ask(world.of[:50], tokens=[[1]] * 50)
    save_index(world.index, tmp_path / "index", MADE_OF)
    world.index = open_index(tmp_path / "index", MADE_OF, verify=True)
    after = world.ask(world.of[:50], tokens=[[1]] * 50)
    assert after.rows.tolist() == before.rows.tolist()
    assert world.index.revision == 3
    world.index.add([6000], world.tokens(world.of[1:2]), world.e1[1:2], world.e2[1:2], 4)
    assert world.ask([0, 1], k=1).rows[0, 0] == 6000
    again = open_index(tmp_path / "index", MADE_OF)
    assert again.revision == 3  # what is written in memory reaches no file


@pytest.mark.parametrize("name", ["tokens.npy", "codes.npy", "order.npy", "codebooks.npy", "posting_slots.npy"])
def test_a_cut_or_missing_array_is_noticed(world, tmp_path, name):
    save_index(world.index, tmp_path / "index", MADE_OF)
    path = tmp_path / "index" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(Damaged):
        open_index(tmp_path / "index", MADE_OF)
    path.unlink()
    with pytest.raises(Damaged):
        open_index(tmp_path / "index", MADE_OF)


def test_a_flipped_bit_is_noticed_when_every_byte_is_read(world, tmp_path):
    save_index(world.index, tmp_path / "index", MADE_OF)
    path = tmp_path / "index" / "codes.npy"
    content = bytearray(path.read_bytes())
    content[400] ^= 4
    path.write_bytes(content)
    with pytest.raises(Damaged, match="checksum"):
        open_index(tmp_path / "index", MADE_OF, verify=True)


def test_an_index_of_something_else_is_refused(world, tmp_path):
    with pytest.raises(NotFound):
        open_index(tmp_path / "index", MADE_OF)
    save_index(world.index, tmp_path / "index", MADE_OF)
    with pytest.raises(Conflict, match="encoder 'e1', now 'e2'"):
        open_index(tmp_path / "index", MADE_OF | {"encoder": "e2"})


@pytest.mark.parametrize(
    "change", [{"length": "x"}, {"knowledge_num": 4}, {"checksums": None, "length": 10**9}, {"revision": None}]
)
def test_nonsense_in_its_description_is_noticed(world, tmp_path, change):
    save_index(world.index, tmp_path / "index", MADE_OF)
    meta = tmp_path / "index" / META
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(Damaged):
        open_index(tmp_path / "index", MADE_OF)
