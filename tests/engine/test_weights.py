"""Weights in a second layout: the same products, only where they pay, within their limit."""

import pytest
import torch
from torch import nn

from nightschool.engine import weights
from nightschool.engine.weights import BlockedLinear, block_weights


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _it_pays(monkeypatch):
    monkeypatch.setattr(weights, "_speedup", lambda shapes, num_threads: 2.0)


def model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"wide": nn.Linear(128, 600), "small": nn.Linear(8, 8), "head": nn.Linear(600, 320, bias=False)}
    )


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("out", [100, 256, 300, 509, 512, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_layer(out, bias, num_threads):
    torch.set_num_threads(num_threads)
    torch.manual_seed(out)
    linear = nn.Linear(96, out, bias=bias)
    blocked = BlockedLinear(linear)
    with torch.inference_mode():
        for shape in [(1, 1), (1, 3), (1, 16), (2, 5), (1, 192), (1, 300)]:
            x = torch.randn(*shape, 96)
            assert torch.allclose(blocked(x), linear(x), atol=1e-5)
            assert blocked(x).is_contiguous()


@pytest.mark.usefixtures("_it_pays")
def test_large_layers_get_blocks_and_share_their_weights():
    layers = model()
    before = dict(layers.items())
    assert block_weights(layers, 1 << 30) == 4 * (128 * 600 + 600 * 320)
    assert [type(layer) for layer in layers.values()] == [BlockedLinear, nn.Linear, BlockedLinear]
    assert layers["wide"].weight is before["wide"].weight


@pytest.mark.usefixtures("_it_pays")
@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to("meta"), lambda m: m.bfloat16()])
def test_nothing_is_done_for_other_formats_and_devices(change):
    layers = change(model())
    assert block_weights(layers, 1 << 30) == 0
    assert {type(layer) for layer in layers.values()} == {nn.Linear}


@pytest.mark.usefixtures("_it_pays")
def test_the_limit_holds():
    layers = model()
    assert block_weights(layers, 1000) == 0
    assert {type(layer) for layer in layers.values()} == {nn.Linear}


def test_nothing_is_done_where_it_does_not_pay(monkeypatch):
    monkeypatch.setattr(weights, "_speedup", lambda shapes, num_threads: 1.0)
    assert block_weights(model(), 1 << 30) == 0


def test_what_pays_is_measured_once_for_the_same_shapes():
    weights._speedup.cache_clear()
    for _ in range(2):
        block_weights(model(), 1 << 30)
    assert weights._speedup.cache_info().misses == 1
