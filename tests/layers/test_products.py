"""Products in fp32, whichever library multiplies: each test runs with the one that this machine takes, and with oneDNN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nightschool.layers import products
from nightschool.layers.products import linear, multiplies_wider


@pytest.fixture(params=["as here", "oneDNN"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "oneDNN":
        if not torch.backends.mkldnn.is_available():
            pytest.skip("torch was built without oneDNN")
        monkeypatch.setattr(products, "_mkl_is_narrow", lambda: True)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_product_in_double_precision(rows: int, with_bias: bool) -> None:
    x, weight = _random(rows, 128), _random(160, 128)
    bias = _random(160) if with_bias else None
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    place = torch.empty(rows, 160)
    torch.testing.assert_close(linear(x, weight, bias).double(), wanted, rtol=0, atol=1e-4)
    assert linear(x, weight, bias, out=place) is place
    torch.testing.assert_close(place.double(), wanted, rtol=0, atol=1e-4)


def test_takes_what_lies_transposed() -> None:
    x, weight = _random(128, 33).T, _random(128, 160).T
    wanted = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x, weight).double(), wanted, rtol=0, atol=1e-4)
    wide = _random(33, 256)
    torch.testing.assert_close(
        linear(wide[:, :128], weight).double(), wide[:, :128].double() @ weight.double().T, rtol=0, atol=1e-4
    )


def test_keeps_what_is_no_number_to_its_row() -> None:
    x, weight = _random(64, 128), _random(160, 128)
    broken = x.clone()
    broken[20] = float("nan")
    others = torch.arange(64) != 20
    found = linear(broken, weight)
    assert found[20].isnan().all()
    torch.testing.assert_close(found[others], linear(x, weight)[others], rtol=0, atol=0)


def test_small_weights_and_other_dtypes_keep_their_library() -> None:
    assert not multiplies_wider(_random(5, 16), _random(8, 16))
    x, weight = _random(5, 128).to(torch.bfloat16), _random(160, 128).to(torch.bfloat16)
    assert not multiplies_wider(x, weight)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=0, atol=0)
