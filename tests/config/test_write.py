"""A recipe that is written as YAML is complete, explains itself, and loads back to the same recipe."""

import io
import json

from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from nightschool.config.load import load_recipe, parse_recipe
from nightschool.config.recipe import Recipe
from nightschool.config.schema import settings as all_settings
from nightschool.config.write import quoted, to_yaml

texts = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() != "")
numbers = st.floats(min_value=1e-12, max_value=1e6, allow_nan=False)
rhythms = st.one_of(
    st.integers(1, 10**12).map(lambda n: f"{n} steps"),
    st.integers(1, 10**6).map(lambda n: f"{n} epochs"),
    st.floats(0.001, 1e7).map(lambda n: f"{n:f}s").filter(lambda text: float(text[:-1]) > 0),
)


def maybe(strategy):
    return st.none() | strategy


sources = st.one_of(
    st.fixed_dictionaries({"path": texts, "format": st.sampled_from(["auto", "messages", "text"])}),
    st.fixed_dictionaries(
        {
            "from": st.just("conversations"),
            "where": st.fixed_dictionaries(
                {
                    "rating": maybe(st.sampled_from(["good", "bad", "any"])),
                    "corrected": maybe(st.booleans()),
                    "model": maybe(texts),
                }
            ),
            "since": st.sampled_from(["always", "last_promoted"]),
        }
    ),
)
schedules = st.one_of(
    st.fixed_dictionaries({"every": st.floats(0.001, 1e9)}),
    st.fixed_dictionaries(
        {"cron": st.sampled_from(["0 3 * * *", "*/5 * * * 1-5"]), "timezone": st.just("Europe/Paris")}
    ),
)
recipes = st.builds(
    Recipe.model_validate,
    st.fixed_dictionaries(
        {
            "name": st.from_regex(r"[a-z0-9]([a-z0-9_-]|\.(?!\.)){0,20}", fullmatch=True),
            "base": texts,
            "method": st.sampled_from(["full", "lora"]),
            "data": st.lists(sources, min_size=1, max_size=3),
            "held_out": st.fixed_dictionaries({"share": st.floats(0, 1), "path": maybe(texts)}),
            "train": st.fixed_dictionaries(
                {
                    "learning_rate": numbers,
                    "max_steps": maybe(st.integers(1, 10**15)),
                    "tokens_per_batch": maybe(st.integers(1, 10**9)),
                    "compile": st.booleans(),
                    "evaluate_every": maybe(rhythms),
                }
            ),
            "lora": st.fixed_dictionaries({"target_modules": texts | st.lists(texts, max_size=3)}),
            "checkpoints": st.fixed_dictionaries({"every": maybe(rhythms)}),
            "gate": st.fixed_dictionaries(
                {"forgetting": st.sampled_from(["<= 2%", "< 0.5", None]), "pins": st.sampled_from(["all", "off"])}
            ),
            "schedule": schedules,
        }
    ),
)


@settings(max_examples=50, deadline=None)
@given(recipes)
def test_what_is_written_loads_back_equal(recipe):
    read = parse_recipe(to_yaml(recipe), env={})
    assert read.recipe == recipe
    assert read.notes == ()


@settings(max_examples=25, deadline=None)
@given(recipes)
def test_plain_values_load_back_equal_as_json_and_as_yaml_of_another_writer(recipe):
    plain = json.loads(json.dumps(recipe.as_plain()))
    assert Recipe.model_validate(plain) == recipe
    assert parse_recipe("", env={}, base_values=plain).recipe == recipe
    stream = io.StringIO()
    yaml = YAML()
    yaml.allow_unicode = False
    try:
        yaml.dump(plain, stream)
    except Exception:
        return
    assert parse_recipe(stream.getvalue(), env={}).recipe.train == recipe.train


@given(st.text())
def test_any_text_survives_quotes(text):
    assert YAML(typ="safe", pure=True).load(quoted(text)) == text


def test_a_stored_recipe_repeats_the_run_from_its_file(tmp_path):
    recipe = parse_recipe("base: b\ndata: [{path: p}]\nlr: 3e-7\n", env={}).recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(path, env={"NIGHTSCHOOL_HOME": "x"}).recipe == recipe


def test_every_setting_is_there_with_its_description():
    written = to_yaml(parse_recipe("base: b\ndata: [{path: p}]\n", env={}).recipe)
    for setting in all_settings().values():
        assert f"{setting.name}:" in written
        assert f"# {setting.description}" in written


def test_every_setting_has_a_description_of_its_own():
    described = [setting.description for setting in all_settings().values()]
    assert all(text.endswith(".") for text in described)


def test_origins_stand_in_the_place_of_descriptions():
    loaded = parse_recipe("base: b\ndata: [{path: p}]\n", ["lr=1e-5"], file="r.yaml", env={})
    written = to_yaml(loaded.recipe, loaded.origins)
    assert "  learning_rate: 1e-05  # override: lr=1e-5\n" in written
    assert "base: b  # recipe: r.yaml:1\n" in written
    assert "  epochs: 5  # default\n" in written


def test_an_override_cannot_write_a_line_of_its_own_into_the_recipe():
    loaded = parse_recipe("data: [{path: p}]\n", ['base="x\\ny: 1"', "name=a"], env={})
    assert parse_recipe(to_yaml(loaded.recipe, loaded.origins), env={}).recipe == loaded.recipe
