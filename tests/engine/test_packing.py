"""Formats of few bits are found in fp32 weights, and only where they give back every number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.engine.kernels import kernel
from nightschool.engine.packing import GROUP, pack

SCALES = st.floats(2.0**-10, 4.0, width=16)
SIGNS = st.sampled_from([1.0, -1.0])


def codes(least, most):
    return st.lists(st.integers(least, most), min_size=GROUP, max_size=GROUP)


@st.composite
def q4_1(draw):
    """step × code + low, both fp16; the least has the code 0, the largest 15. Some sums are rounded."""
    step, low = draw(SCALES), draw(SIGNS) * draw(SCALES)
    return torch.tensor([step * code + low for code in [*draw(codes(0, 15))[:-2], 0, 15]])


@st.composite
def evenly_spaced(draw):
    """Not every code is there."""
    step, low = draw(st.integers(1, 99)) / 256, draw(st.integers(-99, 99)) / 256
    chosen = draw(st.sets(st.integers(0, 15), min_size=1))
    return torch.tensor([step * sorted(chosen)[code % len(chosen)] + low for code in draw(codes(0, 15))])


@st.composite
def q4_0(draw):
    """step × (code - 8), where step may be negative."""
    step = draw(SIGNS) * draw(SCALES)
    return torch.tensor([step * code for code in draw(codes(-8, 7))])


@st.composite
def q8_0(draw):
    """step × code; the largest has the code 127."""
    step = draw(SCALES)
    numbers = draw(codes(-127, 127))
    numbers[draw(st.integers(0, GROUP - 1))] = 127 * int(draw(SIGNS))
    return torch.tensor([step * code for code in numbers])


@st.composite
def sixteen(draw, dtype):
    numbers = draw(st.lists(st.floats(-100, 100, width=32), min_size=GROUP, max_size=GROUP))
    return torch.tensor(numbers).to(dtype).float()


KINDS = {
    "Q4_0": (q4_0(), {4}),
    "Q4_1": (q4_1(), {4}),
    "evenly spaced": (evenly_spaced(), {4}),
    "Q8_0": (q8_0(), {4, 8}),
    "bf16": (sixteen(torch.bfloat16), {4, 8, 16}),
    "fp16": (sixteen(torch.float16), {4, 8, 16}),
    "constant": (SCALES.map(lambda number: torch.full((GROUP,), number)), {4}),
    "zeros": (st.just(torch.zeros(GROUP)), {4}),
}


def unpacked(packed):
    """What the kernel multiplies with: the product with the unit matrix."""
    with torch.inference_mode():
        return kernel(packed.format)(torch.eye(packed.shape[1]), packed).T


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_comes_back_as_it_was(kind):
    groups, bits = KINDS[kind]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(groups, min_size=6, max_size=6), st.integers(1, 3))
    def check(drawn, rows):
        weight = torch.stack(drawn).view(3, 2 * GROUP)[:rows]
        packed = pack(weight)
        assert packed is not None
        assert packed.format.bits in bits
        assert torch.equal(unpacked(packed), weight)

    check()


def affine(out, groups, *, step, low):
    torch.manual_seed(out)
    numbers = torch.randint(0, 16, (out, groups, GROUP)).float()
    numbers[..., 0], numbers[..., 1] = 0, 15
    return (step * numbers + low).view(out, -1)


def test_formats_are_named_and_take_few_bits():
    four = affine(64, 3, step=2.0**-7, low=-0.0625)
    weights = {
        "4-bit": four,
        "4-bit with fp32 scales": affine(64, 3, step=1 + 2.0**-18, low=-8.0),
        "8-bit": torch.randint(-127, 127, (64, 3, GROUP)).float().index_fill(2, torch.tensor([5]), 127).view(64, -1)
        / 3.0,
        "bf16": torch.randn(64, 96).bfloat16().float(),
        "fp16": torch.randn(64, 96).half().float(),
    }
    # Thirds are no fp32 numbers, so that the steps are made of them first.
    weights["8-bit"] = (weights["8-bit"] * 3).round() * torch.tensor(1 / 3).half().float()
    sizes = {}
    for name, weight in weights.items():
        packed = pack(weight)
        assert packed is not None
        assert packed.format.name == name
        assert torch.equal(unpacked(packed), weight)
        sizes[name] = 8 * packed.nbytes / weight.numel()
    assert sizes == {"4-bit": 5, "4-bit with fp32 scales": 6, "8-bit": 9, "bf16": 16, "fp16": 16}


def test_what_no_format_holds_is_refused():
    torch.manual_seed(0)
    assert pack(torch.randn(64, 96)) is None
    assert pack(torch.ones(64, 40)) is None, "the columns are no whole groups"


@pytest.mark.parametrize("row", [0, 63, 900])
def test_one_number_that_does_not_fit_refuses_a_format(row):
    weight = affine(901, 3, step=2.0**-7, low=-0.0625)
    weight[row, 40] = torch.nextafter(weight[row, 40], torch.tensor(9.0))
    assert pack(weight) is None
    weight[row, 40] = 1.0
    packed = pack(weight)
    assert packed is not None
    assert packed.format.name == "bf16"
