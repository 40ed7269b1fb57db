"""What all tests of uploads share."""

import os

import pytest


@pytest.fixture(autouse=True)
def priority_of_the_tests(monkeypatch):
    """The uploader lowers its priority; called in here it would lower that of all tests that follow."""
    monkeypatch.setattr(os, "nice", lambda increment: increment)
