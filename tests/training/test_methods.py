"""A method is one entry in each of the two tables, and what it prepares answers all that a run asks."""

import inspect
from typing import get_args

import pytest

from nightschool.config.recipe import Method
from nightschool.feedback.selection import DATA_PLANS
from nightschool.training.methods import METHODS
from nightschool.training.methods.prepared import PreparedRun


def test_the_recipe_and_both_halves_know_the_same_methods():
    assert set(METHODS) == set(DATA_PLANS) == set(get_args(Method))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_answers_all_that_a_run_asks(method):
    assert issubclass(METHODS[method], PreparedRun)
    assert not inspect.isabstract(METHODS[method])
