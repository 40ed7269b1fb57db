"""Adapters on the experts of stock mixtures: what they reach, that plain PEFT computes the same, and what it costs."""

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from nightschool.config.recipe import Lora
from nightschool.errors import ModelError
from nightschool.models.adapters import attach_lora, describe_adapter, merge_adapter

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "bos_token_id": 0}
SIZES |= {"eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.2}
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, head_dim=8),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, head_dim=8),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=4),
}
IDS = torch.arange(40).view(2, 20)
every_mixture = pytest.mark.parametrize("kind", CONFIGS)


def mixture(kind):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


def adapted(kind, targets, r=3):
    """An adapter that has learned something; a rank of 3 fills no row of 16 bytes."""
    wrapped = attach_lora(mixture(kind), Lora(r=r, alpha=2 * r, target_modules=targets), seed=0).eval()
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def gradients(wrapped):
    loss = wrapped(IDS, labels=IDS).loss
    loss.backward()
    return {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}


@every_mixture
def test_plain_peft_loads_what_was_trained_with_equal_logits_and_gradients(kind, tmp_path):
    wrapped = adapted(kind, ["attention", "experts"])
    ours = gradients(wrapped)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in ours.values())
    wrapped.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(mixture(kind), tmp_path, is_trainable=True).eval()
    theirs = gradients(plain)
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    with torch.no_grad():
        logits = wrapped(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, logits, rtol=1e-4, atol=1e-5)
        assert (logits - mixture(kind)(IDS).logits).abs().max() > 1e-2, "or nothing was compared"
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(IDS).logits, mixture(kind)(IDS).logits, rtol=0, atol=0)
        torch.testing.assert_close(merge_adapter(wrapped)(IDS).logits, logits, rtol=1e-4, atol=1e-5)


@every_mixture
def test_words_and_names_say_what_is_reached(kind):
    attention = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}
    experts = {"experts.gate_up_proj": 2, "experts.down_proj": 2}
    for targets, reached in (
        ("all-linear", attention | experts),
        (["attention"], attention),
        (["experts"], experts),
        (["experts", "q_proj"], experts | {"q_proj": 2}),
        (["down_proj"], {"experts.down_proj": 2}),
        (["gate", "v_proj"], {"gate": 2, "v_proj": 2}),
    ):
        facts = describe_adapter(attach_lora(mixture(kind), Lora(r=2, target_modules=targets), seed=0))
        assert facts.reached == reached, targets
    assert facts.text == "4 layers: 2 gate, 2 v_proj; not k_proj, o_proj, q_proj"


@every_mixture
def test_layers_that_experts_have_no_more_are_refused_with_what_to_write(kind):
    for name in ("up_proj", "w1"):
        with pytest.raises(ModelError, match=rf"{name}.*Its experts are one tensor a layer: write experts\."):
            attach_lora(mixture(kind), Lora(r=2, target_modules=["q_proj", name]), seed=0)


def test_what_was_asked_for_and_stayed_frozen_is_an_error():
    """PEFT takes `gate_proj` of a Qwen3-MoE for its experts, so that its dense layers would learn nothing."""
    config = CONFIGS["qwen3_moe"]()
    config.mlp_only_layers = [1]
    model = AutoModelForCausalLM.from_config(config)
    targets = ["q_proj", "gate_proj", "up_proj"]
    with pytest.raises(ModelError, match=r"asks for gate_proj, up_proj, and 2 of these, such as model\.layers\.1\.mlp"):
        attach_lora(model, Lora(r=2, target_modules=targets), seed=0)


def test_a_dense_model_has_no_experts():
    from nightschool.models.build import build_model

    with pytest.raises(ModelError, match=r"has experts, and this model has none .*Write all-linear or attention, or"):
        attach_lora(build_model("tiny-qwen3", 60, 0), Lora(r=2, target_modules=["experts"]), seed=0)
    reached = describe_adapter(
        attach_lora(build_model("tiny-qwen3", 60, 0), Lora(r=2, target_modules=["attention"]), seed=0)
    ).reached
    assert reached.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that anything makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        if isinstance(made, torch.Tensor) and function.is_view is False:
            self.numel = max(self.numel, made.numel())
        return made


def test_no_pass_makes_a_tensor_as_large_as_the_weights_of_all_experts(tmp_path):
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=32, head_dim=8)
    weights = 32 * 2 * 64 * 32
    wrapped = attach_lora(AutoModelForCausalLM.from_config(config), Lora(r=2, target_modules=["experts"]), seed=0)
    with Largest() as ours:
        wrapped(IDS, labels=IDS).loss.backward()
    assert ours.numel < weights / 4
    wrapped.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), tmp_path, is_trainable=True)
    with Largest() as theirs:
        plain(IDS, labels=IDS).loss.backward()
    assert theirs.numel >= weights, "PEFT makes one"
