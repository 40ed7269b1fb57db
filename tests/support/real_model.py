"""The pretrained model that `make real-model` fetches."""

import pytest
from benchmarks.real_model import find


def real_model():
    """Its GGUF file; the test is skipped where it is not there."""
    path = find()
    if path is None:
        pytest.skip("there is no real model here: run make real-model")
    return path
