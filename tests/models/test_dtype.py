"""Number formats are chosen by measurement, and the choice says why."""

import os

import pytest
import torch

from nightschool.errors import ModelError
from nightschool.models import dtype as module
from nightschool.models.dtype import bf16_speedup, num_threads_here, probe_dtype, resolve_device, resolve_dtype


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(("speedup", "compute"), [(7.3, torch.bfloat16), (2.4, torch.float32), (0.014, torch.float32)])
def test_auto_takes_bf16_on_a_cpu_only_where_it_is_much_faster(monkeypatch, speedup, compute):
    monkeypatch.setattr(module, "bf16_speedup", lambda width: speedup)
    choice = resolve_dtype("auto", "cpu")
    assert (choice.parameters, choice.compute) == (torch.float32, compute)
    assert f"{speedup:.2g} times as fast" in choice.why
    assert probe_dtype("cpu") is compute


@pytest.mark.parametrize(
    ("wanted", "compute"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_what_the_recipe_says_is_obeyed_without_a_probe(monkeypatch, wanted, compute):
    monkeypatch.setattr(module, "bf16_speedup", lambda width: pytest.fail("probed"))
    choice = resolve_dtype(wanted, "cpu")
    assert choice.compute is compute
    assert choice.needs_loss_scaling == (wanted == "fp16")
    assert "as the recipe says" in choice.why


def test_the_probe_is_made_once_and_under_no_grad_too(monkeypatch):
    measured, seconds = [], module._seconds

    def counted(*args, **kwargs):
        measured.append(args)
        return seconds(*args, **kwargs)

    monkeypatch.setattr(module, "_seconds", counted)
    bf16_speedup.cache_clear()
    with torch.no_grad():
        first = bf16_speedup(256)
    assert first > 0
    assert len(measured) in (2, 4)
    assert bf16_speedup(256) == first
    assert len(measured) in (2, 4)


def test_where_bf16_is_emulated_nothing_large_is_tried(monkeypatch):
    tried = []

    def seconds(num_tokens, width, *, bf16):
        tried.append((num_tokens, width))
        return 1.0 if bf16 else 0.014

    monkeypatch.setattr(module, "_seconds", seconds)
    bf16_speedup.cache_clear()
    assert bf16_speedup(512) == 0.014
    assert set(tried) == {(32, 128)}
    bf16_speedup.cache_clear()


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ModelError, match="device is cuda, and this machine has no usable GPU"):
        resolve_device("cuda")


def test_a_gpu_takes_bf16_if_it_computes_it_natively(monkeypatch):
    for native, compute in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert resolve_dtype("auto", "cuda").compute is compute


def test_threads_are_at_least_one_and_no_more_than_allowed():
    assert 1 <= num_threads_here() <= (os.cpu_count() or 1)
