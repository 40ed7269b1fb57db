"""Mixtures that are made here have as many parameters as their names say, and what cannot be is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nightschool.config.mixtures import CUSTOM, MIXTURES
from nightschool.engine.model_runner import ModelRunner
from nightschool.errors import ModelError
from nightschool.models.build import build_config, build_model
from nightschool.models.cost import count_parameters
from nightschool.models.export import prove_export, save_version_folder
from tests.support.tokenizers_for_tests import byte_tokenizer

SIZED = [name for name, mixture in MIXTURES.items() if mixture.parameters]


def counted(name, vocab_size, **shape):
    with torch.device("meta"):
        model = build_model(f"new:{name}", vocab_size, 0, shape=shape)
    return model, count_parameters(model)


@pytest.mark.parametrize("vocab_size", [2048, 50257])
@pytest.mark.parametrize("name", SIZED)
def test_a_preset_has_the_parameters_of_its_name(name, vocab_size):
    mixture = MIXTURES[name]
    model, count = counted(name, vocab_size)
    assert count.total == pytest.approx(mixture.parameters, rel=0.01)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers) == (mixture.hidden_size, mixture.num_layers)
    assert (config.num_experts, config.num_experts_per_tok) == (mixture.num_experts, 2)
    assert count.active == count.total - count.experts * (1 - 2 / mixture.num_experts)
    assert config.moe_intermediate_size % 8 == 0
    assert config._experts_implementation == "grouped_mm"  # `eager` zeroes all experts for each of them on the way back


def test_more_experts_are_as_wide_so_the_model_grows_by_them_and_their_rows_of_the_router():
    usual, before = counted("moe-350m", 2048)
    model, count = counted("moe-350m", 2048, num_experts=16)
    width = model.config.moe_intermediate_size
    assert width == usual.config.moe_intermediate_size
    assert count.total - before.total == 8 * 8 * (3 * 512 * width + 512)


def test_a_custom_one_is_built_from_what_the_recipe_says():
    model, _ = counted(CUSTOM, 300, hidden_size=96, num_hidden_layers=3, num_experts=5, head_dim=32)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_experts) == (96, 3, 5)
    assert (config.num_attention_heads, config.num_key_value_heads) == (3, 3)
    assert 2 * config.moe_intermediate_size == pytest.approx(96 * 8 / 3, abs=16)
    model, _ = counted(
        CUSTOM, 300, hidden_size=64, num_hidden_layers=1, num_experts=3, num_active_experts=3, expert_size=7
    )
    assert (model.config.num_experts_per_tok, model.config.moe_intermediate_size) == (3, 7)


def test_a_shared_expert_is_there_for_all_tokens_and_plain_transformers_loads_it(tmp_path):
    usual, before = counted("moe-tiny", 300)
    model, count = counted("moe-tiny", 300, shared_expert_size=64)
    assert model.config.moe_intermediate_size == usual.config.moe_intermediate_size
    of_shared = 4 * (3 * 128 * 64 + 128)
    gate_of_attention = 4 * 128 * 128
    assert count.total - before.total == of_shared + gate_of_attention
    assert count.active - before.active == of_shared + gate_of_attention, "no token passes it by"
    tokenizer = byte_tokenizer()
    made = build_model("new:moe-tiny", len(tokenizer), 0, shape={"shared_expert_size": 64, "num_hidden_layers": 2})
    save_version_folder(made, tokenizer, tmp_path)
    assert prove_export(made, tmp_path, tokenizer) == 0.0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.config.architectures == ["Qwen3NextForCausalLM"]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = made.eval()(ids).logits
        assert torch.equal(plain(ids).logits, expected)
        for layer in plain.model.layers:
            layer.mlp.shared_expert.down_proj.weight.zero_()
        assert (plain(ids).logits - expected).abs().max() > 1e-3
    assert ModelRunner(made).shapes, "it can be served"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("moe-tiny", {"num_active_experts": 9}, "shape.num_active_experts is 9, and there are 8 experts in a layer"),
        ("moe-tiny", {"num_experts": 1}, "shape.num_active_experts is 2, and there are 1 experts in a layer"),
        ("tiny-mixtral", {"num_experts": 1}, "shape.num_active_experts is 2, and there are 1 experts"),
        ("moe-350m", {"hidden_size": 100}, "shape.hidden_size is 100, and heads of 64 channels do not divide it"),
        ("moe-350m", {"num_key_value_heads": 3}, "num_key_value_heads is 3, and does not divide the 8 heads"),
        ("moe-350m", {"intermediate_size": 64}, "Write shape.expert_size"),
        ("moe-custom", {"hidden_size": 64}, "shape.num_hidden_layers, shape.num_experts are not written"),
        ("moe-2b", {}, "Presets are .*moe-tiny, moe-350m, moe-1b, moe-3b, moe-7b, moe-13b, moe-custom"),
        ("tiny", {"shared_expert_size": 4}, "shape: shared_expert_size is not a field of a qwen3 model"),
        ("tiny", {"num_experts": 4}, "shape: num_experts is not a field of a qwen3 model"),
    ],
)
def test_what_cannot_be_is_refused(name, shape, message):
    with pytest.raises(ModelError, match=message):
        build_config(f"new:{name}", 300, shape=shape)


def test_a_vocabulary_that_leaves_nothing_for_experts_is_refused():
    with pytest.raises(ModelError, match="With 700,000 words nothing of moe-350m is left for its experts"):
        build_config("new:moe-350m", 700_000)
