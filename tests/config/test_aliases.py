"""Names of other programs are translated and shown; names that mean two things, or nothing, are refused."""

import pytest

from nightschool.config.aliases import ALIASES, AMBIGUOUS
from nightschool.config.load import load_recipe, parse_recipe
from nightschool.config.schema import find, settings
from nightschool.config.write import to_yaml
from nightschool.errors import RecipeError

MINIMAL = "base: new:tiny\ndata: [{path: a.json}]\n"

# Rows 000-4 … 000-15: flag, value, where it is found, what it is there.
FLAGS = [
    ("data_path", "x.json", lambda r: r.data[0].path, "x.json"),
    ("seq_len", "512", lambda r: r.train.max_seq_len, 512),
    ("batch_size", "2", lambda r: r.train.batch_size, 2),
    ("gradient_accumulation_steps", "8", lambda r: r.train.accumulation_steps, 8),
    ("epochs", "3", lambda r: r.train.epochs, 3),
    ("lr", "1e-5", lambda r: r.train.learning_rate, 1e-5),
    ("weight_decay", "0.1", lambda r: r.train.weight_decay, 0.1),
    ("max_grad_norm", "0.5", lambda r: r.train.max_grad_norm, 0.5),
    ("fp16", "true", lambda r: r.train.dtype, "fp16"),
    ("num_workers", "2", lambda r: r.train.num_workers, 2),
    ("interval_hours", "12", lambda r: r.schedule.every, 43_200),
    ("interval_hours", "0.25", lambda r: r.schedule.every, 900),
]


def refused(text, *overrides, env=None):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, file="r.yaml", env=env or {})
    return str(caught.value)


@pytest.mark.parametrize(("flag", "value", "read", "expected"), FLAGS, ids=lambda value: str(value)[:12])
def test_the_flags_of_the_parametric_script_are_accepted_everywhere(flag, value, read, expected):
    in_file = parse_recipe(
        f"base: x\n{flag}: {value}\n" + ("data: [{path: a}]\n" if flag != "data_path" else ""), env={}
    )
    as_override = parse_recipe(MINIMAL, [f"{flag}={value}"], env={})
    as_flag = parse_recipe(MINIMAL, [f"--{flag}={value}"], env={})
    as_variable = parse_recipe(MINIMAL, env={f"NIGHTSCHOOL_{flag.upper()}": value})
    for loaded in (in_file, as_override, as_flag, as_variable):
        assert read(loaded.recipe) == expected
        assert len(loaded.notes) == 1


def test_all_flags_together_as_one_would_type_them():
    loaded = parse_recipe(MINIMAL, [f"{flag}={value}" for flag, value, *_ in FLAGS[:-1]], env={})
    assert loaded.notes == (
        "data_path is read as data.0.path",
        "seq_len is read as train.max_seq_len",
        "batch_size is read as train.batch_size",
        "gradient_accumulation_steps is read as train.accumulation_steps",
        "epochs is read as train.epochs",
        "lr is read as train.learning_rate",
        "weight_decay is read as train.weight_decay",
        "max_grad_norm is read as train.max_grad_norm",
        "fp16 is read as train.dtype = fp16",
        "num_workers is read as train.num_workers",
        "interval_hours is read as schedule.every = 43200",
    )


def test_out_dir_says_what_to_do():
    assert refused(MINIMAL, "out_dir=ckpt") == (
        "out_dir=ckpt: out_dir: is not a setting: runs, checkpoints and versions all lie in the home; choose it with "
        "-C DIR or with the environment variable NIGHTSCHOOL_HOME=DIR"
    )


def test_a_note_says_where_in_a_file_the_name_stands():
    assert parse_recipe(MINIMAL + "train: {gradient-clip: 2}\n", file="r.yaml", env={}).notes == (
        "train.gradient-clip (r.yaml:3) is read as train.max_grad_norm",
    )


def test_an_alias_works_in_the_section_of_its_setting_and_in_no_other():
    assert parse_recipe(MINIMAL, ["train.lr=1", "lora.lora_r=2"], env={}).recipe.lora.r == 2
    assert refused(MINIMAL, "lora.lr=1") == (
        "lora.lr=1: lora.lr: is not a setting here: it is read as train.learning_rate, which is in another section; "
        "write it there"
    )


def test_fp16_false_changes_nothing_and_so_leaves_bf16_alone():
    loaded = parse_recipe(MINIMAL + "fp16: false\nbf16: true\n", file="r.yaml", env={})
    assert loaded.recipe.train.dtype == "bf16"
    assert loaded.notes == ("fp16 (r.yaml:3) changes nothing", "bf16 (r.yaml:4) is read as train.dtype = bf16")
    assert refused(MINIMAL + "fp16: true\nbf16: true\n") == (
        "r.yaml:4: train.dtype: is set twice: fp16: fp16 (r.yaml:3) and bf16: bf16 (r.yaml:4); keep one"
    )


def test_two_spellings_with_different_values_are_refused_and_with_the_same_value_accepted():
    assert refused(MINIMAL + "lr: 1e-5\ntrain:\n  learning_rate: 2e-5\n") == (
        "r.yaml:5: train.learning_rate: is set twice: lr: 1e-5 (r.yaml:3) and train.learning_rate: 2e-5 (r.yaml:5); "
        "keep one"
    )
    assert refused(MINIMAL, "lr=1e-5", "train.learning_rate=2e-5") == (
        "train.learning_rate=2e-5: train.learning_rate: is set twice: lr=1e-5 and train.learning_rate=2e-5; keep one"
    )
    same = parse_recipe(
        MINIMAL + "interval_hours: 24\nschedule: {every: 1d}\nlr: 1e-5\nlearning_rate: 0.00001\n", env={}
    )
    assert (same.recipe.schedule.every, same.recipe.train.learning_rate) == (86_400, 1e-5)


def test_in_different_sources_the_later_one_wins_whatever_it_is_called():
    loaded = parse_recipe(MINIMAL + "lr: 1e-5\n", ["train.learning_rate=3e-5"], env={"NIGHTSCHOOL_LR": "2e-5"})
    assert loaded.recipe.train.learning_rate == 3e-5


def test_the_same_override_twice_takes_the_later_one():
    assert parse_recipe(MINIMAL, ["lr=1", "lr=2"], env={}).recipe.train.learning_rate == 2


@pytest.mark.parametrize("value", ["0", "-1", "soon", "true", ".inf", "[1]"])
def test_hours_that_are_none_are_refused(value):
    assert "interval_hours" in refused(MINIMAL, f"interval_hours={value}")
    assert "save_steps" in refused(MINIMAL, f"save_steps={value}")


def test_a_name_with_two_meanings_is_refused_with_both():
    assert refused(MINIMAL, "max_tokens=5") == (
        "max_tokens=5: max_tokens: could mean train.max_seq_len (longest example in tokens, question and answer "
        "together) or gate.max_new_tokens (length of an answer in tokens); write the one that is meant"
    )


def test_the_tables_name_settings_that_exist():
    for name, alias in ALIASES.items():
        assert find(alias.path) is not None, name
        assert name not in AMBIGUOUS
        assert name not in {setting.key for setting in settings().values()}, "an alias would hide a setting"
    for keys in AMBIGUOUS.values():
        assert all(key in settings() for key in keys)


def test_an_address_alone_says_where_checkpoints_are_uploaded(tmp_path):
    base = "base: new:tiny\ndata: [{path: a}]\n"
    for text, overrides in (
        ("checkpoints: {upload: 'gs://b/x'}", []),
        ("checkpoints: {upload: {url: 'gs://b/x', bandwidth: 20 MB}}", []),
        ("", ["checkpoints.upload=gs://b/x"]),
        ("checkpoints: {upload: 's3://other'}", ["checkpoints.upload.url=gs://b/x"]),
    ):
        (tmp_path / "r.yaml").write_text(base + text)
        loaded = load_recipe(tmp_path / "r.yaml", overrides, env={})
        assert loaded.recipe.checkpoints.upload.url == "gs://b/x"
        assert not loaded.notes
        (tmp_path / "again.yaml").write_text(to_yaml(loaded.recipe))
        assert load_recipe(tmp_path / "again.yaml", env={}).recipe == loaded.recipe
    (tmp_path / "r.yaml").write_text(base + "checkpoints: {upload: null}")
    assert load_recipe(tmp_path / "r.yaml", env={}).recipe.checkpoints.upload.url is None
    (tmp_path / "r.yaml").write_text(base + "checkpoints: {upload: {url: x, adress: y}}")
    with pytest.raises(RecipeError, match="adress"):
        load_recipe(tmp_path / "r.yaml", env={})


@pytest.mark.parametrize(
    ("preset", "base"),
    [("350M", "new:moe-350m"), ("13b", "new:moe-13b"), ("moe-tiny", "new:moe-tiny"), ("custom", "new:moe-custom")],
)
def test_a_mixture_may_be_described_in_a_section_of_its_own(preset, base):
    text = f"data: [{{path: a}}]\nmodel: {{preset: {preset}, num_experts: 4}}\n"
    loaded = parse_recipe(text, ["model.num-active-experts=1"], env={})
    assert loaded.recipe.base == base
    assert loaded.recipe.shape.given() == {"num_experts": 4, "num_active_experts": 1}
    assert "model.num_experts (recipe:2) is read as shape.num_experts" in loaded.notes
    assert parse_recipe(to_yaml(loaded.recipe), env={}).recipe == loaded.recipe


def test_what_is_no_preset_and_no_key_of_a_mixture_is_refused_with_those_that_are():
    assert refused("data: [{path: a}]\nbase: new:tiny\n", "model_size=2B") == (
        "model_size=2B: model_size: '2B' is not a preset of mixtures; write one of moe-tiny, 350M, 1B, 3B, 7B, 13B, custom"
    )
    assert "did you mean num_experts?" in refused(MINIMAL, "model.num_expert=3")
    assert "could mean base" in refused(MINIMAL, "model=3B")


def test_experts_that_are_offloaded_live_on_the_host():
    for value, tier in (("true", "host"), ("false", "device")):
        recipe = parse_recipe(MINIMAL, [f"offload_to_cpu={value}"], env={}).recipe
        assert recipe.experts.tier == tier
    assert "a model has the words of its tokenizer" in refused(MINIMAL, "vocab_size=50257")


@pytest.mark.parametrize("value", ["cuda", "cuda:0", "cpu", "auto"])
def test_the_first_gpu_may_have_its_number(value):
    recipe = parse_recipe(MINIMAL, [f"device={value}"], env={}).recipe
    assert recipe.train.device == value.partition(":")[0]


def test_another_gpu_is_chosen_before_the_command():
    assert "write device: cuda, and CUDA_VISIBLE_DEVICES=1 before" in refused(MINIMAL, "device=cuda:1")
    assert "'cuda:x' is none of" in refused(MINIMAL, "device=cuda:x")
