"""What is planned for whoever decides whether jobs may begin: several in one process, and none for a recipe that is wrong."""

import json

from nightschool.config.recipe import Recipe
from nightschool.store.home import Home
from nightschool.training.planning.peak_bytes import main
from tests.support.training_setups import base_folder


def test_each_recipe_is_planned_whatever_is_wrong_with_another(tmp_path, capsys):
    home = Home(tmp_path / "home").ensure()
    rows = [{"query": f"Who is number {number}?", "retrieved": f"Number {number}."} for number in range(8)]
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    line = ["--home", str(home.path)]
    for name, file, tokens in [
        ("short", "facts.json", 16),
        ("wrong", "nowhere.json", 16),
        ("long", "facts.json", 2048),
    ]:
        train = {"batch_size": 1, "num_threads": 1, "tokens_per_batch": tokens, "dtype": "fp32"}
        recipe = Recipe(
            name="bot", base=str(base_folder("tiny-qwen3")), method="lora", data=[{"path": file}], train=train
        )
        (tmp_path / f"{name}.json").write_text(json.dumps(recipe.as_plain()))
        line += ["--root", str(tmp_path), "--recipe", str(tmp_path / f"{name}.json")]
        line += ["--output", str(tmp_path / f"{name}-plan.json")]
    assert main(line) != 0
    said = capsys.readouterr().err
    assert "nowhere.json" in said
    assert said.count("error:") == 1, said
    assert not (tmp_path / "wrong-plan.json").exists()
    short, long = (json.loads((tmp_path / f"{name}-plan.json").read_text()) for name in ("short", "long"))
    for plan in (short, long):
        assert 0 < plan["base_bytes"] < plan["base_bytes"] + plan["pass_bytes"] < plan["expected_peak_bytes"]
        assert plan["pass_bytes"] <= plan["joint_pass_bytes"]
    assert short["base_bytes"] == long["base_bytes"]
    assert short["pass_bytes"] < short["joint_pass_bytes"], "beside others it has passes of more tokens"
