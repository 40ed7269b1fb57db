"""What a training step frees on a CPU stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Page faults of twenty turns that take 80 MB and free it, before the call and after it.
COUNT = """
import resource
import torch
from nightschool.config.recipe import Recipe
from nightschool.training.environment import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
recipe = Recipe.model_validate({
    "name": "bot", "base": "new:qwen3-tiny", "data": [{"path": "chats.jsonl"}], "train": {"device": "cpu"}
})
given_back = page_faults()
kept = keep_freed_memory(recipe)
page_faults()
print(given_back, int(kept), page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is nothing to set in this C library")
def test_memory_that_was_freed_is_there_for_the_next_step() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    given_back, kept, faults = map(int, done.stdout.split())
    if given_back == 0:
        pytest.skip("this kernel counts no page faults")
    assert kept == 1
    assert faults < given_back / 10, "each turn finds its pages anew"


def test_a_run_on_a_gpu_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from nightschool.config.recipe import Recipe
    from nightschool.training import environment

    monkeypatch.setattr(environment, "resolve_device", lambda _: torch.device("cuda"))
    recipe = Recipe.model_validate({"name": "bot", "base": "new:qwen3-tiny", "data": [{"path": "chats.jsonl"}]})
    assert not environment.keep_freed_memory(recipe)
