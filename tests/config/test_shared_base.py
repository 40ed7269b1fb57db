"""Which jobs may share a base, and with whom."""

import pytest

from nightschool.config.recipe import Recipe
from nightschool.config.shared_base import share_key


def key(root="/data", **changes):
    plain = {"name": "bot", "base": "org/base", "method": "lora", "data": [{"path": "a.json"}]} | changes
    return share_key(Recipe.model_validate(plain).as_plain(), root)


def test_adapters_on_one_base_may_whatever_else_they_want():
    assert key() is not None
    other = {"learning_rate": 1e-3, "epochs": 1, "batch_size": 1, "seed": 7, "max_seq_len": 64}
    assert key() == key("/other", name="zoo/bot", train=other, lora={"r": 2, "dropout": 0.1}, data=[{"path": "b.json"}])


def test_a_base_on_the_disk_is_the_same_however_it_is_spelled():
    assert key("/data", base="./base") == key("/data/jobs", base="../base") == key(base="/data/base")
    assert key("/data", base="./base") != key("/data/jobs", base="./base")


@pytest.mark.parametrize(
    "changes",
    [{"base": "org/other"}, {"train": {"dtype": "bf16"}}, {"train": {"device": "cpu"}}, {"train": {"num_threads": 1}},
     {"train": {"gradient_checkpointing": True}}],
    ids=str,
)  # fmt: skip
def test_what_a_process_has_once_must_be_the_same(changes):
    assert key(**changes) not in (None, key())


@pytest.mark.parametrize(
    "changes",
    [{"method": "full"}, {"method": "qlora"}, {"method": "dpo"}, {"base": "new:tiny"}, {"jobs": {"share_base": False}},
     {"from_checkpoint": "run"}, {"train": {"dtype": "fp16"}}, {"train": {"compile": True}},
     {"train": {"num_processes": 2}}],
    ids=str,
)  # fmt: skip
def test_whoever_cannot_trains_alone(changes):
    assert key(**changes) is None
