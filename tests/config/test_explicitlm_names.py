"""The settings of ExplicitLM's scripts, as its README writes them: read, or refused with what to do."""

import re

import pytest

from nightschool.config.aliases import GROUPS, REFUSED
from nightschool.config.load import parse_recipe
from nightschool.errors import RecipeError

RECIPE = "name: bot\nbase: x\nmethod: memory\ndata: [{path: a.jsonl}]\n"
READ = [
    ("model.qwen3_model_path=./qwen", lambda r: r.base, "./qwen"),
    ("model.max_seq_len=512", lambda r: r.train.max_seq_len, 512),
    ("model.knowledge_dim=64", lambda r: r.memory.knowledge_dim, 64),
    ("model.knowledge_length=32", lambda r: r.memory.knowledge_length, 32),
    ("model.gate_rank=16", lambda r: r.memory.gate_rank, 16),
    ("model.fusion_rank=0", lambda r: r.memory.fusion_rank, 0),
    ("dataset.sft_dataset_path=sft.jsonl", lambda r: r.data[0].path, "sft.jsonl"),
    ("dataset.sft_val_dataset_path=eval.jsonl", lambda r: r.held_out.path, "eval.jsonl"),
    ("training.learning_rate=5e-5", lambda r: r.train.learning_rate, 5e-5),
    ("training.batch_size=1", lambda r: r.train.batch_size, 1),
    ("training.accumulation_steps=128", lambda r: r.train.accumulation_steps, 128),
    ("training.epochs=3", lambda r: r.train.epochs, 3),
    ("training.zero_stage=0", lambda r: r.train.zero_stage, 0),
    ("training.num_candidates=8", lambda r: r.memory.num_candidates, 8),
    ("training.similarity_loss_coef=0.2", lambda r: r.memory.similarity_loss_coef, 0.2),
    ("training.diversity_loss_coef=0.1", lambda r: r.memory.diversity_loss_coef, 0.1),
    ("training.eval_interval=500", lambda r: str(r.train.evaluate_every), "500 steps"),
    ("training.seed=1337", lambda r: r.train.seed, 1337),
    ("training.mixed_precision=bf16", lambda r: r.train.dtype, "bf16"),
    ("training.mixed_precision=no", lambda r: r.train.dtype, "fp32"),
    ("logging.log_interval=10", lambda r: r.train.log_every, 10),
]


def refused(*overrides, text=RECIPE):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, file="r.yaml", env={})
    return str(caught.value)


@pytest.mark.parametrize(("override", "read", "expected"), READ, ids=[override for override, *_ in READ])
def test_settings_are_read_in_their_groups(override, read, expected):
    assert read(parse_recipe(RECIPE, [override], env={}).recipe) == expected


def test_in_a_file_too():
    loaded = parse_recipe(
        RECIPE + "model: {gate_rank: 8}\ntraining: {batch_size: 2, epochs: 1}\n", file="r.yaml", env={}
    )
    assert (loaded.recipe.memory.gate_rank, loaded.recipe.train.batch_size, loaded.recipe.train.epochs) == (8, 2, 1)
    assert loaded.notes[0] == "model.gate_rank (r.yaml:5) is read as memory.gate_rank"


@pytest.mark.parametrize(("override", "said"), [
    ("model.knowledge_num=1000", "model.knowledge_num: is not a setting of a recipe: .*1000 a perfect square: the next one is 1024"),
    ("model.knowledge_num=1048576", "--knowledge-num to nightschool memory build, keys and export$"),
    ("model.knowledge_dim=7", "7 is odd, and an address has two halves; write 8"),
    ("model.cache_path=knowledge_cache.pt", "nightschool memory build NAME"),
    ("model.keys_path=keys.pt", "nightschool memory keys NAME --from keys.pt"),
    ("dataset.pretrained_router_path=gate.pth", "base: NAME@VERSION"),
    ("training.zero_stage=2", "`train.zero_stage` shares out weights that learn, and memory modules have few; write 0"),
    ("training.mixed_precision=fp8", "'fp8' is none of no, fp32, bf16, fp16"),
    ("logging.use_swanlab=true", "nothing is sent anywhere"),
    ("logging.save_dir=out", "-C DIR"),
    ("training.nonsense=1", "training.nonsense: is not a setting"),
    ("model=x", "could mean base .* or name"),
])  # fmt: skip
def test_what_is_no_setting_here_is_refused_with_what_to_do(override, said):
    assert re.search(said, refused(override))


def test_each_refused_name_is_refused_in_each_group():
    for name, said in REFUSED.items():
        for group in GROUPS:
            assert said in refused(f"{group}.{name}=x"), name
