"""Expert routers with a bias are balanced by it: after each step, by the loads of the whole step, wherever experts live."""

import pytest
import torch

from nightschool.config.recipe import Experts, Train
from nightschool.data.batches import Batches
from nightschool.errors import ModelError, NonFiniteLoss
from nightschool.layers.expert_balance import ExpertBalance
from nightschool.layers.expert_streaming.record import WEIGHTS
from nightschool.layers.expert_streaming.store import Visit
from nightschool.models.build import build_config, build_model
from nightschool.models.export import save_version_folder
from nightschool.models.load import load_base
from nightschool.models.streamed import ExpertPlace, build_streamed, expert_stream
from nightschool.store.home import Home
from nightschool.training.distributed.world import ALONE
from nightschool.training.methods.finetune import FinetuneTask
from tests.support.tokenizers_for_tests import byte_tokenizer
from tests.support.training_setups import VOCAB_SIZE, deterministic_threads, random_documents

RATE = 2.0**-6
COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "max_position_embeddings": 256, "n_routed_experts": 6,
}  # fmt: skip
GLM = COMMON | {"model_type": "glm4_moe", "num_key_value_heads": 2, "head_dim": 8, "first_k_dense_replace": 0}
DEEPSEEK = COMMON | {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
MINIMAX = {name: field for name, field in COMMON.items() if name[:2] != "n_" and name[0] != "t"} | {
    "model_type": "minimax_m2", "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "rotary_dim": 4, "eos_token_id": 0,
}  # fmt: skip
DOCUMENTS = random_documents(4, seed=3)


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def task_of(architecture=GLM, *, rate=RATE, batch_size=4, place=None, **train):
    if place is None:
        model = build_model(architecture, VOCAB_SIZE, 1)
    else:
        model = build_streamed(build_config(architecture, VOCAB_SIZE), 1, place, "cpu")
    settings = Train(**({"learning_rate": 1e-2} | train))
    return FinetuneTask(
        model, Batches(DOCUMENTS, batch_size=batch_size, seed=0), settings, experts=Experts(bias_update_rate=rate)
    )


def step(task, rate=1e-2):
    window = [task.batch(0, place) for place in range(task.epoch_length(0))]
    task.accumulate(window, sum(batch.loss_units for batch in window))
    task.update(rate, 1.0, None, ALONE)
    return {name: float(figure) for name, figure in task.figures().items()}


def biases(task):
    return {name: tensor.clone() for name, tensor in task.saved_tensors().items() if name.endswith("correction_bias")}


def chosen(task):
    """Tokens by expert, of each router, in a pass over all documents."""
    counts = []

    def count(module, _, outputs):
        counts.append(torch.bincount(outputs[2].reshape(-1), minlength=module.num_experts).double())

    hooks = [m.register_forward_hook(count) for m in task.model.modules() if hasattr(m, "e_score_correction_bias")]
    with torch.no_grad():
        task.loss(task.batch(0, 0))
    for hook in hooks:
        hook.remove()
    return torch.stack(counts)


@pytest.mark.parametrize("architecture", [GLM, DEEPSEEK], ids=["glm", "deepseek"])
def test_a_bias_grows_for_experts_with_little_and_shrinks_for_those_with_much(architecture):
    task = task_of(architecture)
    loads = chosen(task)
    figures = step(task, rate=0.0)
    wanted = RATE * torch.sign(loads.mean(dim=1, keepdim=True) - loads)
    assert torch.equal(torch.stack(list(biases(task).values())).double(), wanted)
    assert wanted.unique().numel() > 1
    assert figures["max_violation"] == pytest.approx(float((loads.amax(1) / loads.mean(1) - 1).mean()))
    assert figures["dead_experts"] == float((loads == 0).sum())
    assert task.optimizer_facts()["hyper_parameters"]["experts.bias_update_rate"] == RATE
    assert "expert_loads" not in task.optimizer_facts()


@pytest.mark.trains
def test_it_spreads_tokens_that_all_went_to_two_experts():
    reached = {}
    for rate in (0.02, 0.0):
        task = task_of(rate=rate)
        with torch.no_grad():
            for name, parameter in task.model.named_parameters():
                if "mlp.gate." in name:
                    parameter[:2] += 0.2
            task.model.get_input_embeddings().weight.add_(0.02)
        first = step(task, 0.0)
        for _ in range(30):
            last = step(task, 0.0)
        reached[rate] = (first["max_violation"], last["max_violation"])
    assert reached[0.02][0] == reached[0.0][0] > 1
    assert reached[0.02][1] < 1 < reached[0.0][1], reached


def test_how_a_step_is_cut_or_computed_twice_changes_no_bias():
    tasks = [task_of(), task_of(batch_size=1), task_of(gradient_checkpointing=True)]
    for task in tasks:
        step(task)
    whole, cut, twice = map(biases, tasks)
    assert all(torch.equal(bias, cut[name]) and torch.equal(bias, twice[name]) for name, bias in whole.items())


@pytest.mark.parametrize("architecture", [GLM, DEEPSEEK], ids=["glm", "deepseek"])
def test_it_is_the_same_on_every_tier_and_a_resumed_run_goes_on_from_it(architecture, tmp_path):
    tasks = [
        task_of(architecture),
        *(task_of(architecture, place=ExpertPlace(t, tmp_path, 2)) for t in ("host", "disk")),
    ]
    for task in tasks:
        step(task)
    saved, optimizer = ({source.name: source.tensor().clone() for source in sources}
                        for sources in (tasks[0].weights(), tasks[0].optimizer_state()))  # fmt: skip
    facts = tasks[0].optimizer_facts()
    for task in tasks:
        step(task)
    resumed = task_of(architecture)
    resumed.optimizer.load_state(optimizer, set(facts["without_state"]))
    resumed.load_weights(saved, "a checkpoint")
    step(resumed)
    wanted = {source.name: source.tensor().clone() for source in tasks[0].weights()}
    for task in (*tasks[1:], resumed):
        found = {source.name: source.tensor() for source in task.weights()}
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_a_stock_folder_is_streamed_with_its_biases_in_full(tmp_path):
    tokenizer = byte_tokenizer()
    model = build_model(DEEPSEEK, len(tokenizer), seed=3)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.add_(torch.arange(6) / 7)
    save_version_folder(model, tokenizer, tmp_path / "stock")
    loaded = load_base(
        str(tmp_path / "stock"), Home(tmp_path), experts=ExpertPlace("disk", tmp_path, 2), dtype=torch.bfloat16
    )
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(loaded.model.state_dict()[name], model.state_dict()[name])
    ids = torch.arange(24)[None]
    plain = load_base(str(tmp_path / "stock"), Home(tmp_path), dtype=torch.bfloat16).model
    assert torch.equal(loaded.model(ids).logits, plain(ids).logits)


def test_a_step_that_is_refused_changes_no_bias(tmp_path):
    task = task_of(place=ExpertPlace("disk", tmp_path, 2))
    step(task)
    stream = expert_stream(task.model)
    task.weights()
    for _, record in stream.store.walk([Visit(stream.index(1, 4), (WEIGHTS,), (WEIGHTS,))]):
        record[WEIGHTS][5] = float("nan")
    before = biases(task)
    with pytest.raises(NonFiniteLoss, match=r"expert 4 of layer model\.layers\.1"):
        step(task)
    assert all(torch.equal(bias, before[name]) for name, bias in biases(task).items())


def test_settings_of_the_other_kind_are_refused_and_routers_that_nothing_balances_are_told():
    with pytest.raises(ModelError, match=r"experts\.z_loss_coef does nothing here.*write experts\.bias_update_rate"):
        ExpertBalance(build_model(GLM, VOCAB_SIZE, 0), Experts(z_loss_coef=0.1))
    with pytest.raises(ModelError, match=r"bias_update_rate does nothing here.*experts\.load_balancing_loss_coef"):
        ExpertBalance(build_model("tiny-qwen3-moe", VOCAB_SIZE, 0), Experts(bias_update_rate=0.1))
    model = build_model(MINIMAX, VOCAB_SIZE, 0)
    note = ExpertBalance(model, Experts()).note
    assert "expert routers of MiniMaxM2SparseMoeBlock in balance" in note
    with pytest.raises(ModelError, match=r"Take experts\.bias_update_rate out"):
        ExpertBalance(model, Experts(bias_update_rate=0.1))
    assert ExpertBalance(model.requires_grad_(requires_grad=False), Experts()).note == ""
    for known in (GLM, "tiny-qwen3-moe", "tiny-qwen3"):
        assert ExpertBalance(build_model(known, VOCAB_SIZE, 0), Experts()).note == ""
