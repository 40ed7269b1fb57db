"""An adapter exported with its base: one plain folder that answers as the adapter does, or none."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nightschool.cli.main import main
from nightschool.models import load
from nightschool.store.home import Home
from tests.support.adapter_setups import House
from tests.support.engine_setups import greedy


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    return Home(tmp_path / "home").ensure()


def test_an_adapter_is_exported_merged_and_answers_alike(home, capsys):
    house = House(home.path)
    assert main(["models", "export", house.one.ref, "merged", "--merge", "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["logit_difference"] < 1e-3
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert greedy(merged, [5, 6, 7], 12) == house.one.greedy([5, 6, 7], 12) != house.two.greedy([5, 6, 7], 12)
    assert not Path("merged", "adapter_config.json").exists()
    assert main(["models", "export", house.base.ref, "base", "--merge"]) == 2
    assert "no adapter" in capsys.readouterr().err
    assert not Path("base").exists()


def test_a_merged_export_that_answers_otherwise_is_not_written(home, monkeypatch, capsys, tmp_path):
    house = House(home.path)
    merge = load.merge_adapter

    def wrong(wrapped):
        merged = merge(wrapped)
        with torch.no_grad():
            next(p for n, p in merged.named_parameters() if "up_proj" in n).mul_(1.1)
        return merged

    monkeypatch.setattr(load, "merge_adapter", wrong)
    assert main(["models", "export", house.one.ref, "merged", "--merge"]) == 1
    assert "gives other logits" in capsys.readouterr().err
    assert not Path("merged").exists()
