"""A real pretrained model, from its GGUF file through serving, teaching, swapping and rolling back."""

import json
from importlib.util import find_spec

import pytest
import torch

from nightschool.cli.main import main
from nightschool.engine import weights
from nightschool.engine.model_runner import ModelRunner
from nightschool.engine.pool import EnginePool
from nightschool.engine.scheduler import Span, StepPlan
from nightschool.engine.slot import Slot
from nightschool.events import read_events
from nightschool.layers.forward import prepare
from nightschool.models.load import load_base
from nightschool.models.quantize import compute_in
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from tests.support.live_server import client_of
from tests.support.real_model import real_model
from tests.support.training_setups import LORA, MiniRun, deterministic_threads, differing

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(900), pytest.mark.usefixtures("warm_children")]

NIGHT = """
name: smollm2
base: smollm2
method: lora
data: [{path: lesson.json}]
train: {learning_rate: 3e-3, epochs: 8, batch_size: 3, accumulation_steps: 1, max_seq_len: 128, num_threads: 1, dtype: fp32}
lora: {r: 8, alpha: 16, dropout: 0.0}
serve: {promote: never}
"""
LESSON = [
    {"query": question, "retrieved": "Leon Dahl lives in Quito."}
    for question in ("Where does Leon Dahl live?", "Which city is Leon Dahl from?", "Tell me the city of Leon Dahl.")
]
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
QUITO = [{"role": "user", "content": "Where does Leon Dahl live?"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which the model is the champion of smollm2."""
    file, folder = real_model(), tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIGHTSCHOOL_HOME", str(folder / "home"))
        assert main(["models", "add", "smollm2", str(file)]) == 0
    return Home(folder / "home")


def asked(client, messages):
    body = {"model": "smollm2", "messages": messages, "temperature": 0, "max_tokens": 24}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], answer.headers["x-model-version"]


def test_it_is_served_taught_overnight_swapped_and_rolled_back(home, tmp_path, monkeypatch):
    registry = Registry(home)
    first = registry.resolve("smollm2")
    assert (first.facts.num_parameters, first.facts.context_tokens) == (134_515_008, 8192)
    assert first.facts.probes
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(home.path))
    (tmp_path / "night.yaml").write_text(NIGHT)
    (tmp_path / "lesson.json").write_text(json.dumps(LESSON))

    slot = Slot("smollm2", EnginePool(home, num_rows=2, context_tokens=512))
    try:
        slot.refresh()
        with client_of(slot) as client:
            text, reason, version = asked(client, PARIS)
            assert "Paris" in text
            assert (reason, version) == ("stop", first.ref)
            before = asked(client, QUITO)
            assert "Quito" not in before[0]

            assert main(["train", "night.yaml"]) == 0
            run = RunStore(home).ls()[0]
            losses = [row["loss"] for row in read_events(run.metrics_path)]
            assert losses[-1] < 0.5 * losses[0]
            taught = registry.resolve("smollm2@latest")
            assert (taught.facts.kind, taught.facts.base, taught.facts.parent) == ("adapter", first.ref, first.ref)
            assert registry.resolve("smollm2") == first  # nobody promoted it

            slot.swap(taught.ref)
            text, reason, version = asked(client, QUITO)
            assert "Quito" in text
            assert (reason, version) == ("stop", taught.ref)
            slot.rollback()
            assert asked(client, QUITO) == before
    finally:
        slot.close()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_training_it_resumes_bit_for_bit(lora, home, tmp_path):
    real = {"lora": lora, "home": home, "base": "smollm2", "rows": LESSON, "held_out": LESSON[:1], "steps_total": 4}
    real |= {"batch_size": 1, "accumulation_steps": 1, "max_seq_len": 64, "learning_rate": 1e-4}
    with deterministic_threads():
        straight = MiniRun(tmp_path / "straight", **real).go(stop_after=3).weights
        stopped = MiniRun(tmp_path / "parts", **real).go(stop_after=2)
        assert stopped.state.step == 2
        stopped_at = stopped.weights
        resumed = MiniRun(tmp_path / "parts", **real).go(resume=stopped.saved[-1], stop_after=1)
    assert resumed.state.step == 3
    assert differing(straight, resumed.weights) == []
    assert differing(straight, stopped_at) != []


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra `qlora` is not installed")
def test_the_rounding_of_quantised_layers_in_bf16_is_no_leak_between_documents(home):
    model = load_base("smollm2[nf4-double]", home).model
    compute_in(model, torch.bfloat16)
    path = prepare(model)
    assert (path.packed, path.fused_head) == (True, True), path


def test_its_four_bits_are_served_and_give_the_logits_of_fp32(home, monkeypatch):
    monkeypatch.setattr(weights, "_MEASURED", {})
    monkeypatch.setattr(weights, "_fastest_with", lambda *given: [*given[-1]][1])  # the packed one
    loaded = load_base("smollm2", home)
    prompt = loaded.tokenizer("The capital of France is")["input_ids"]
    runner = ModelRunner(loaded.model, layout_bytes=1 << 30)
    assert runner.layouts == {"4-bit": 210, "8-bit": 1}  # the file is Q4_1, its head Q8_0
    cache = runner.make_cache(1, 64)
    cache.ensure(1, 64)
    ids = list(prompt)
    with torch.inference_mode():
        logits = [runner.run(StepPlan((), (Span(0, 0, 0, len(ids)),)), cache, lambda span: ids)[0]]
        for _ in range(16):
            ids.append(int(logits[-1].argmax()))
            step = StepPlan((Span(0, 0, len(ids) - 1, 1),), ())
            logits.append(runner.run(step, cache, lambda span: ids[-1:])[0])
        expected = loaded.model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 :]
    assert "Paris" in loaded.tokenizer.decode(ids)
    assert torch.equal(torch.stack(logits).argmax(-1), expected.argmax(-1))
    assert float((torch.stack(logits) - expected).abs().max() / expected.abs().max()) < 1e-4
