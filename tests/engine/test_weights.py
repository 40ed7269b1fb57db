"""Weights in further layouts: the same products, only where they pay, within their limit."""

import itertools
import logging

import pytest
import torch
from torch import nn

from nightschool.engine import kernels, weights
from nightschool.engine.packing import pack
from nightschool.engine.weights import BLOCKS, PLAIN, Blocks, LaidOutLinear, Narrow, Plain, lay_out
from tests.support.engine_setups import loaded_model, running


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    monkeypatch.setattr(weights, "_MEASURED", {})


@pytest.fixture
def fastest(monkeypatch):
    """Let the first of these names win that takes part."""

    def choose(*names):
        def measured(rows, shapes, others, contestants):
            return next(name for name in (*names, PLAIN) if name in contestants)

        monkeypatch.setattr(weights, "_fastest_with", measured)

    return choose


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = {"wide": nn.Linear(128, 600), "small": nn.Linear(8, 8), "head": nn.Linear(608, 320, bias=False)}
    return nn.ModuleDict(layers).to(dtype).float()


def as_layouts(linear):
    packed = pack(linear.weight)
    made = [Plain(linear.weight), Blocks(linear.weight), *([Narrow(packed)] if packed else [])]
    return {layout.name: layout for layout in made}


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("out", [100, 256, 300, 509, 512, 1000])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [BLOCKS, "bf16"])
def test_products_are_those_of_the_layer(name, out, bias, num_threads):
    torch.set_num_threads(num_threads)
    torch.manual_seed(out)
    linear = nn.Linear(96, out, bias=bias).bfloat16().float()
    laid_out = LaidOutLinear(linear, [as_layouts(linear)[name]] * 4)
    with torch.inference_mode():
        for shape in [(1, 1), (1, 3), (1, 16), (2, 5), (1, 192), (1, 300)]:
            x = torch.randn(*shape, 96)
            assert torch.allclose(laid_out(x), linear(x), atol=1e-5)
            assert laid_out(x).is_contiguous()
        assert torch.allclose(laid_out(x.transpose(0, 1)), linear(x.transpose(0, 1)), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_differs_from_torch_by_the_order_of_sums_alone(dtype):
    linear = nn.Linear(2048, 64, bias=False).to(dtype).float()
    narrow = as_layouts(linear)[str(dtype).removeprefix("torch.").replace("float16", "fp16").replace("bfp", "bf")]
    torch.manual_seed(1)
    with torch.inference_mode():
        for rows in range(1, 20):
            x = torch.randn(rows, 2048)
            exact = x.double() @ linear.weight.double().T
            scale = x.abs().double() @ linear.weight.abs().double().T
            # Of 2048 products added up in fp32 in any order, each sum may be off by so much.
            assert float(((narrow.product(x) - exact).abs() / scale).max()) < 2048 * 2.0**-24


def test_each_number_of_rows_has_its_layout():
    linear = nn.Linear(96, 64)
    asked = []

    class Spied(Plain):
        def __init__(self, name):
            super().__init__(linear.weight)
            self.name = name

        def product(self, x_rc):
            asked.append(self.name)
            return super().product(x_rc)

    laid_out = LaidOutLinear(linear, [Spied("one"), Spied("few"), Plain(linear.weight), Spied("many")])
    with torch.inference_mode():
        for rows in (1, 2, 3, 8, 9, 32, 33, 192, 193):
            laid_out(torch.zeros(1, rows, 96))
    assert asked == ["one", "one", "few", "few", "many", "many"]


def test_large_layers_get_layouts_and_share_their_weights(fastest):
    fastest(BLOCKS)
    layers = model()
    before = dict(layers.items())
    assert lay_out(layers, 1 << 30) == {BLOCKS: 2}
    assert [type(layer) for layer in layers.values()] == [LaidOutLinear, nn.Linear, LaidOutLinear]
    assert layers["wide"].weight is before["wide"].weight


def test_weights_of_sixteen_bits_are_packed(fastest):
    fastest("bf16", BLOCKS)
    layers = model(torch.bfloat16)
    with torch.no_grad():
        layers["head"].weight[0, 0] = 0.1  # which 16 bits do not hold
    assert lay_out(layers, 1 << 30) == {"bf16": 1, BLOCKS: 1}


def test_without_the_compiler_there_are_blocks(fastest, monkeypatch):
    fastest("bf16", BLOCKS)
    monkeypatch.setattr(kernels, "is_available", lambda: False)
    assert lay_out(model(torch.bfloat16), 1 << 30) == {BLOCKS: 2}


@pytest.mark.parametrize(
    ("machine", "features", "available"),
    [
        ("x86_64", {"fma": True, "f16c": True}, True),
        ("AMD64", {"fma": True, "f16c": True}, True),
        ("x86_64", {"fma": True, "f16c": False}, False),
        ("x86_64", {}, False),
        ("arm64", {}, True),
        ("riscv64", {"fma": True, "f16c": True}, False),
    ],
)
def test_kernels_are_made_only_for_machines_that_have_their_instructions(machine, features, available, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: features)
    kernels.is_available.cache_clear()
    assert kernels.is_available() == available
    kernels.is_available.cache_clear()


def test_the_log_says_how_many_layers_have_what(fastest, monkeypatch, caplog):
    fastest(BLOCKS)
    monkeypatch.setattr(weights, "_LEAST_NUMBERS", 1)
    with caplog.at_level(logging.INFO, "nightschool.engine"), running(loaded_model("tiny-llama")) as engine:
        base = engine.base
    [record] = [record for record in caplog.records if "layout" in record.getMessage()]
    assert record.facts["base"] == base
    assert record.facts["layers"][BLOCKS] > 5


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to("meta"), lambda m: m.bfloat16()])
def test_nothing_is_done_for_other_formats_and_devices(change, fastest):
    fastest("bf16", BLOCKS)
    layers = change(model())
    assert lay_out(layers, 1 << 30) == {}
    assert {type(layer) for layer in layers.values()} == {nn.Linear}


def test_the_limit_holds(fastest):
    fastest(BLOCKS)
    of_blocks = 4 * (128 * 600 + 608 * 320)
    assert lay_out(model(), of_blocks - 1) == {}
    assert lay_out(model(), of_blocks) == {BLOCKS: 2}
    fastest("bf16")
    of_words = 2 * (128 * 608 + 608 * 320)
    assert lay_out(model(torch.bfloat16), of_words - 1) == {"bf16": 1}
    assert lay_out(model(torch.bfloat16), of_words) == {"bf16": 2}


def seconds(monkeypatch, **of_layouts):
    """Measure these instead: seconds of each layout, or of each in turn."""
    turns = {name: itertools.cycle(times) for name, times in of_layouts.items()}
    monkeypatch.setattr(
        weights,
        "_round",
        lambda inputs, others, contestants: {name: next(turns[name.split()[-1]]) for name in contestants},
    )


def test_nothing_is_done_where_it_does_not_pay(monkeypatch):
    seconds(monkeypatch, fp32=[1.0], bf16=[0.97], blocks=[0.98])
    assert lay_out(model(torch.bfloat16), 1 << 30) == {}


@pytest.mark.parametrize(
    ("bf16", "blocks", "winner"), [(0.5, 0.49, "bf16"), (0.5, 0.4, BLOCKS), (2.0, 0.9, BLOCKS), (0.9, 1.0, "bf16")]
)
def test_the_fastest_wins_and_of_two_alike_the_smaller(bf16, blocks, winner, monkeypatch):
    seconds(monkeypatch, fp32=[1.0], bf16=[bf16], blocks=[blocks])
    assert lay_out(model(torch.bfloat16), 1 << 30) == {winner: 2}


def test_one_busy_moment_decides_nothing(monkeypatch):
    seconds(monkeypatch, fp32=[1.0], bf16=[0.9, 0.9, 9.0], blocks=[1.0])
    assert lay_out(model(torch.bfloat16), 1 << 30) == {"bf16": 2}


def test_what_pays_is_measured_once_for_the_same_shapes(monkeypatch):
    measured = []
    fastest_with = weights._fastest_with
    monkeypatch.setattr(
        weights, "_fastest_with", lambda rows, *arguments: (measured.append(rows), fastest_with(rows, *arguments))[1]
    )
    for _ in range(2):
        lay_out(model(), 1 << 30)
    assert measured == [1, 4, 16, 64]
