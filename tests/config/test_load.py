"""Recipes are loaded from files, variables and overrides, in that order, and every setting knows who set it."""

import os
import re
from pathlib import Path

import pytest

from nightschool.config.assignments import Origin
from nightschool.config.load import load_recipe, parse_recipe
from nightschool.errors import NotFound, RecipeError
from nightschool.units import Every

MINIMAL = "base: new:tiny\ndata: [{path: a.json}]\n"


def load(text=MINIMAL, *overrides, env=None):
    return parse_recipe(text, overrides, file="r.yaml", env=env or {})


def test_each_layer_wins_over_the_one_below_and_is_named():
    text = MINIMAL + "train:\n  epochs: 2\n  seed: 1\n  batch_size: 8\n"
    env = {"NIGHTSCHOOL_TRAIN__SEED": "2", "NIGHTSCHOOL_TRAIN__BATCH_SIZE": "16"}
    loaded = load(text, "train.batch_size=32", env=env)
    train = loaded.recipe.train
    assert (train.accumulation_steps, train.epochs, train.seed, train.batch_size) == (4, 2, 2, 32)
    assert loaded.origins["train.accumulation_steps"] == Origin("default")
    assert loaded.origins["train.epochs"] == Origin("recipe", "r.yaml:4")
    assert loaded.origins["train.seed"] == Origin("environment", "NIGHTSCHOOL_TRAIN__SEED")
    assert loaded.origins["train.batch_size"] == Origin("override", "train.batch_size=32")


def test_every_setting_of_the_resolved_recipe_has_an_origin():
    loaded = load()

    def keys(plain, prefix=""):
        for key, value in plain.items():
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}{key}.")
            elif key == "data":
                for index, source in enumerate(value):
                    yield from keys(source, f"data.{index}.")
            else:
                yield prefix + key

    assert set(keys(loaded.recipe.as_plain())) == set(loaded.origins)


def test_variables_of_the_process_count_unless_others_are_given(monkeypatch):
    monkeypatch.setenv("NIGHTSCHOOL_TRAIN__EPOCHS", "9")
    assert parse_recipe(MINIMAL).recipe.train.epochs == 9
    assert parse_recipe(MINIMAL, env={}).recipe.train.epochs == 5


def test_variables_that_are_no_settings_are_left_alone():
    env = {
        "NIGHTSCHOOL_HOME": "/somewhere",
        "NIGHTSCHOOL_API_KEY": "secret",
        "NIGHTSCHOOL_DEBUG": "1",
        "NIGHTSCHOOL_SERVICE_HOST": "10.0.0.1",
        "NIGHTSCHOOL_TEST_KILLS": "20",
        "NIGHTSCHOOL_PORT_8001_TCP": "tcp://10.0.0.1:8001",
        "OTHER_TRAIN__EPOCHS": "1",
    }
    assert load(env=env).recipe == load().recipe


def test_a_variable_with_a_typing_error_is_refused():
    with pytest.raises(RecipeError) as caught:
        load(env={"NIGHTSCHOOL_TRAIN__EPOCH": "3"})
    assert str(caught.value) == "NIGHTSCHOOL_TRAIN__EPOCH: train.epoch: is not a setting; did you mean train.epochs?"


def test_overrides_alone_make_a_recipe():
    recipe = load_recipe(None, ["base=new:tiny", "data.0.path=x.json"], env={}).recipe
    assert (recipe.base, recipe.data[0].path) == ("new:tiny", "x.json")


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.learning_rate=1e-5", lambda r: r.train.learning_rate, 1e-5),
        ("train.compile=true", lambda r: r.train.compile, True),
        ("train.max_steps=null", lambda r: r.train.max_steps, None),
        ("train.max_seq_len=16k tokens", lambda r: r.train.max_seq_len, 16_000),
        ("checkpoints.every=500 steps", lambda r: r.checkpoints.every, Every(500, "steps")),
        ("checkpoints.every=1e3", lambda r: r.checkpoints.every, Every(1000, "steps")),
        ("gate.new_facts=>= 40%", lambda r: r.gate.new_facts, ">= 40%"),
        ("gate.forgetting=off", lambda r: r.gate.forgetting, None),
        ("gate.forgetting=null", lambda r: r.gate.forgetting, None),
        ("held_out.share=5%", lambda r: r.held_out.share, 0.05),
        ("schedule.cron=0 3 * * *", lambda r: r.schedule.cron, "0 3 * * *"),
        ("lora.target_modules=[q_proj, v_proj]", lambda r: r.lora.target_modules, ["q_proj", "v_proj"]),
        ("lora.target_modules=[all-linear]", lambda r: r.lora.target_modules, "all-linear"),
        ("data.0.path=2024", lambda r: r.data[0].path, "2024"),
        ("data.0.path=[ab].json", lambda r: r.data[0].path, "[ab].json"),
        ("data.0.path=a=b.json", lambda r: r.data[0].path, "a=b.json"),
        ('data.0.path="x.json"', lambda r: r.data[0].path, "x.json"),
        ("name=007", lambda r: r.name, "007"),
        ("train={epochs: 7}", lambda r: r.train.epochs, 7),
        ("--batch-size=2", lambda r: r.train.batch_size, 2),
    ],
)
def test_values_of_overrides_are_yaml_and_texts_stay_texts(override, read, value):
    assert read(load(MINIMAL, override).recipe) == value


def test_a_mapping_as_override_leaves_its_neighbours():
    recipe = load(MINIMAL + "train: {seed: 7}\n", "train={epochs: 3}").recipe
    assert (recipe.train.seed, recipe.train.epochs) == (7, 3)


def test_an_index_one_beyond_the_end_adds_an_entry_and_a_further_one_is_refused():
    recipe = load(MINIMAL, "data.1.path=b.json", "data.2.from=conversations").recipe
    assert [source.path for source in recipe.data] == ["a.json", "b.json", None]
    with pytest.raises(RecipeError) as caught:
        load(MINIMAL, "data.3.path=b.json")
    assert str(caught.value) == (
        "data.3.path=b.json: data.3.path: lies beyond the end: data has 1 entry; the next one is data.1"
    )


def test_a_list_in_a_higher_layer_replaces_the_lower_one():
    recipe = load("base: x\ndata: [{path: a}, {path: b}]\n", "data=[{path: c}]").recipe
    assert [source.path for source in recipe.data] == ["c"]


def test_a_section_with_nothing_below_it_keeps_its_defaults():
    assert load(MINIMAL + "train:\n  # epochs: 3\n").recipe.train == load().recipe.train


def test_anchors_and_merges_are_followed():
    text = "base: x\ndata:\n  - &first {path: a, format: messages}\n  - {<<: *first, path: b}\n"
    assert [(d.path, d.format) for d in load(text).recipe.data] == [("a", "messages"), ("b", "messages")]


def test_json_is_a_recipe_too():
    assert load('{"base": "x", "data": [{"path": "a"}], "train": {"epochs": 3}}').recipe.train.epochs == 3


def test_base_values_lie_below_the_recipe():
    loaded = parse_recipe("train: {epochs: 3}", env={}, base_values={"base": "b", "data": [{"path": "p"}]})
    assert (loaded.recipe.base, loaded.recipe.data[0].path, loaded.recipe.train.epochs) == ("b", "p", 3)
    assert loaded.origins["base"].kind == "default"


def test_cron_and_every_replace_each_other_across_layers():
    by_clock = MINIMAL + 'schedule: {cron: "0 3 * * *"}\n'
    by_hours = MINIMAL + "schedule: {every: 12h}\n"
    assert load(by_clock, "interval_hours=12").recipe.schedule.cron is None
    assert load(by_clock, "interval_hours=12").recipe.schedule.every == 43_200
    assert load(by_hours, "schedule.cron=0 3 * * *").recipe.schedule.cron == "0 3 * * *"
    with pytest.raises(RecipeError) as caught:
        load(MINIMAL + 'schedule:\n  every: 12h\n  cron: "0 3 * * *"\n')
    assert str(caught.value) == (
        "r.yaml:4: schedule: `every: 12h` counts from the first cycle, and `cron: 0 3 * * *` goes by the clock; "
        "write one of the two"
    )


def test_a_stored_recipe_with_cron_loads_again():
    recipe = load(MINIMAL, "schedule.cron=0 3 * * *").recipe
    assert type(recipe).model_validate(recipe.as_plain()) == recipe


def test_a_file_that_does_not_exist_is_not_found(tmp_path):
    with pytest.raises(NotFound, match="does not exist"):
        load_recipe(tmp_path / "none.yaml", env={})


def test_a_folder_a_data_file_and_a_secret_file_are_no_recipes(tmp_path):
    with pytest.raises(RecipeError, match="is a folder; name a YAML file in it"):
        load_recipe(tmp_path, env={})
    large = tmp_path / "train.json"
    large.write_bytes(b"[" + b'"x",' * 300_000)
    with pytest.raises(RecipeError, match=r"larger than 1000000 bytes.*data\.0\.path="):
        load_recipe(large, env={})
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RecipeError, match=r"pipe\.yaml: is no regular file, but a pipe"):
        load_recipe(tmp_path / "pipe.yaml", env={})
    if os.geteuid() != 0:  # root reads everything
        secret = tmp_path / "secret.yaml"
        secret.write_text(MINIMAL)
        secret.chmod(0)
        with pytest.raises(RecipeError, match="cannot be read: Permission denied"):
            load_recipe(secret, env={})


def test_bad_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"base: x\nname: caf\xe9\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, env={})
    assert str(caught.value) == f"{path}:2: the byte 0xe9 is no UTF-8; save the file as UTF-8"


def test_a_byte_order_mark_is_no_problem(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(path, env={}).recipe.base == "new:tiny"


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_we_ship_load(path):
    assert load_recipe(path, env={}).notes == ()


def test_the_parametric_recipe_has_the_defaults_of_rows_000_4_to_000_15():
    recipe = load_recipe(Path("recipes/parametric.yaml"), env={}).recipe
    train = recipe.train
    assert recipe.base == "Qwen/Qwen2.5-7B"
    assert recipe.data[0].path == "data/example.json"
    assert Path("data/example.json").is_file()
    assert (train.max_seq_len, train.batch_size, train.accumulation_steps, train.epochs) == (1024, 4, 4, 5)
    assert (train.learning_rate, train.weight_decay, train.max_grad_norm) == (2e-6, 0.01, 1.0)
    assert (train.dtype, train.num_workers, train.seed, recipe.schedule.every) == ("auto", 4, 42, 86_400)


def test_the_shipped_facts_are_those_of_the_generator(tmp_path):
    from nightschool.data.synthetic import make_world, write_world

    write_world(make_world(0, 6), tmp_path, new_facts=3)
    for name in ("old_facts.json", "new_facts.json"):
        assert (tmp_path / name).read_text() == Path("data", name).read_text(), "the facts changed: write data/ anew"


@pytest.mark.parametrize("written", ["dataset: chat,code", "dataset: [chat, code]", "data: [{dataset: 'chat, code'}]"])
def test_data_sets_are_named_in_a_list_or_with_commas(written):
    recipe = parse_recipe(f"name: a\nbase: x\n{written}\n", env={}).recipe
    assert recipe.data[0].dataset == ["chat", "code"]


def test_a_data_set_on_the_command_line_replaces_the_path_of_the_recipe():
    text = "name: a\nbase: x\ndata: [{path: a.json, format: messages, repeat: 2}, {path: b.json}]\n"
    recipe = parse_recipe(text, ["dataset=chat", "max_samples=5"], env={}).recipe
    assert [(one.path, one.dataset) for one in recipe.data] == [(None, ["chat"]), ("b.json", None)]
    assert (recipe.data[0].format, recipe.data[0].repeat, recipe.data[0].max_samples) == ("auto", 2, 5)
    back = parse_recipe("name: a\nbase: x\ndataset: chat\ndata_dir: sets\n", ["data.0.path=c.json"], env={}).recipe
    assert (back.data[0].path, back.data[0].dataset, back.data[0].folder) == ("c.json", None, None)


@pytest.mark.parametrize(("written", "said"), [
    ("dataset: chta", "'chta' is no data set; did you mean chat?"),
    ("dataset: zzz", "'zzz' is no data set. There are all, chat"),
    ("dataset: humaneval", "humaneval is there to be asked, and is never trained"),
    ("data: [{path: x, folder: y}]", "`folder` belongs to `dataset`"),
    ("data: [{dataset: chat, format: messages}]", "`format` belongs to `path` or `from`"),
    ("data: [{path: x, prompt: '{q}'}]", "write both, or none"),
    ("data: [{path: x, prompt: '{q}', answer: '{a}', format: alpaca}]", "so does `format: alpaca`"),
    ("data: [{path: x, weight: 2}, {path: y}]", "some sources have a `weight` and some have none"),
    ("data: [{from: conversations, max_samples: 3}]", "`max_samples` belongs to `path` or `dataset`"),
])  # fmt: skip
def test_what_a_source_cannot_be(written, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        parse_recipe(f"name: a\nbase: x\n{written}\n", env={})
