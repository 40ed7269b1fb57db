"""What systems like this get wrong: one test for each mistake, here or where `PROVEN_ELSEWHERE` says."""

import ast
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import httpx2
import pytest
import torch
from pydantic import BaseModel

from nightschool.config.recipe import Recipe, Shape
from nightschool.data.chat import rendered_data
from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Example, Message
from nightschool.engine.pool import EnginePool
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.engine.slot import Slot
from nightschool.errors import NightschoolError
from nightschool.evaluation.eval_set import eval_set_of_run
from nightschool.evaluation.gate import decide
from nightschool.evaluation.questions import make_questions
from nightschool.evaluation.scores import ScoreSheet
from nightschool.events import read_events
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.feedback.selection import Selection
from nightschool.feedback.skipping import reason_to_skip
from nightschool.feedback.training_data import load_sources
from nightschool.jobs.schedule import Timetable
from nightschool.models.export import save_version_folder
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.store.versions import VersionMetadata
from nightschool.training.methods import METHODS
from nightschool.training.methods.prepared import Setup
from nightschool.training.planning.plan import plan_of
from nightschool.training.run import execute, prepare
from nightschool.work.stop import Stop
from tests.support.engine_setups import lively_model
from tests.support.live_server import eventually, live
from tests.support.tokenizers_for_tests import byte_tokenizer

TESTS = Path(__file__).parent

PROVEN_ELSEWHERE = {
    "adding padding must not change loss, accuracy or gradients": [
        "training/test_loop.py::test_adding_padding_changes_neither_loss_nor_gradients",
        "layers/test_attention.py::test_packed_and_padded_give_one_loss_and_one_gradient",
        "training/test_pretrain.py::test_adding_padding_changes_no_loss",
    ],
    "the model must overfit one example and reproduce its answer greedily": [
        "training/test_loop.py::test_the_model_overfits_one_example_and_repeats_its_answer_greedily",
        "training/test_run.py::test_a_published_version_generates_what_was_taught_under_plain_transformers",
        "training/test_pretrain.py::test_it_overfits_one_sequence_and_writes_it_greedily",
        "data/test_token_batches.py::test_labels_are_the_next_tokens_and_none_is_shifted_twice",
    ],
    "printed counts equal numel(); measured peak memory reported": [
        "models/test_cost.py::test_counts_add_up_to_numel",
        "models/test_cost.py::test_expected_bytes_are_within_a_factor_of_two_of_measured_ones",
        "training/test_plan.py::test_the_plan_counts_what_is_there",
        "training/test_pretrain.py::test_presets_are_called_what_they_are",
    ],
    "a half-written or failed version is never served": [
        "store/test_registry.py::test_a_half_written_version_is_invisible",
        "store/test_registry.py::test_a_damaged_version_is_neither_promoted_nor_rolled_back_to",
        "engine/test_slot.py::test_a_swap_that_fails_changes_nothing",
        "server/test_real.py::test_a_tampered_version_is_refused_and_the_old_one_serves_on",
    ],
    "/health answers during generate (how fast: benchmarks/event_loop.py); cancel stops within one step": [
        "server/test_real.py::test_health_answers_while_a_step_is_computed",
        "server/test_operations.py::test_health_answers_while_a_model_loads_and_readiness_waits",
        "engine/test_generate.py::test_a_cancelled_request_leaves_its_row_to_the_next_at_once",
    ],
    "interrupted+resumed run equals the uninterrupted one bit for bit": [
        "training/test_resume.py::test_interrupted_and_resumed_equals_uninterrupted",
        "training/test_run.py::test_sigterm_saves_and_exits_75_and_resume_goes_on_exactly",
        "training/test_pretrain.py::test_interrupted_and_resumed_equals_uninterrupted",
        "training/test_world.py::test_stopped_and_resumed_by_two_and_once_by_one",
    ],
    "failures surface with a non-zero exit / error code": [
        "training/test_run.py::test_what_cannot_be_trained_fails_with_its_error",
        "cli/test_train.py::test_train_exits_as_its_cycle_ended",
        "engine/test_compare.py::test_an_answer_that_fails_is_no_wrong_answer_but_the_end",
        "server/test_parametric_memory.py::test_a_failed_refresh_is_500_is_counted_and_the_old_version_serves_on",
        "server/test_openai.py::test_a_failure_in_the_middle_of_a_stream_reaches_the_client_as_an_error",
        "training/test_ranks_end.py::test_what_is_not_whole_everywhere_is_not_saved_and_said",
        "training/test_saver.py::test_a_full_disk_stops_the_run_at_the_next_save",
    ],
}


def exists(test):
    file, name = test.split("::")
    tree = ast.parse((TESTS / file).read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


@pytest.mark.parametrize("mistake", PROVEN_ELSEWHERE)
def test_each_mistake_has_its_tests(mistake):
    assert [test for test in PROVEN_ELSEWHERE[mistake] if not exists(test)] == []


def test_a_test_that_is_gone_would_be_noticed():
    assert not exists("models/test_cost.py::test_counts")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


# Each option changes an observable.

NAMES = ["Bela", "Mista", "Toron", "Ilka", "Sonno", "Vera", "Ondo", "Palu"]


class Place:
    """A home with accepted examples and kept conversations, two bases, and files to study."""

    def __init__(self, path):
        self.root = path
        self.home = Home(path / "home").ensure()
        self.tokenizer = byte_tokenizer()
        for seed, name in enumerate(("base", "other")):
            (path / name).mkdir()
            save_version_folder(lively_model("tiny-llama", seed=seed), self.tokenizer, path / name)
        self.write("train", [(f"{name}?", f"{name} lives in {'Rome' * (n % 3 + 1)}.") for n, name in enumerate(NAMES)])
        self.write("fewer", [("Bela?", "Rome"), ("Mista?", "Oslo")])
        self.write("held", [("Ilka lives?", "Graz")])
        pairs = [{"prompt": f"{name}?", "chosen": f"Ask {name}.", "rejected": f"No {name}."} for name in NAMES]
        (path / "pairs.json").write_text(json.dumps(pairs))
        facts = [
            {
                "prompt": f"{name}?",
                "completion": f"{town}.",
                "fact": {"subject": name, "relation": "lives in", "value": town},
            }
            for name, town in zip(NAMES, ["Rome", "Oslo", "Graz", "Lima"] * 2, strict=True)
        ]
        (path / "facts.json").write_text(json.dumps(facts))
        database = Database(self.home).connect()
        accepted = [
            Example((Message("user", f"Who is {n}?"), Message("assistant", f"Number {n}"))).to_json() for n in range(12)
        ]
        AcceptedExamples(database).add("bot", "20260101_000000", accepted)
        self.conversations = ConversationStore(database)
        for number, (model, rating, correction) in enumerate(
            [("bot", "good", None), ("bot", "bad", "Oslo."), ("bot", "bad", None), ("aide", "good", "Bern.")]
        ):
            asked = [{"role": "user", "content": f"Question {number}?"}]
            self.conversations.record(f"r{number}", model, "20260101_000000", asked, f"Answer {number}.")
            self.conversations.feedback(f"r{number}", rating, correction)
        database.close()

    def count_tokens(self, text):
        return len(self.tokenizer(text)["input_ids"])

    def write(self, name, rows):
        (self.root / f"{name}.json").write_text(json.dumps([{"query": q, "retrieved": a} for q, a in rows]))

    def recipe(self, changes):
        """The recipe of these tests, small and short, with some settings changed by their dotted names."""
        plain = {
            "name": "bot",
            "base": "./base",
            "data": [{"path": "train.json"}],
            "held_out": {"share": 0.4, "min_examples": 0},
            "train": {
                "learning_rate": 1e-2, "epochs": 2, "batch_size": 2, "accumulation_steps": 2, "max_seq_len": 128,
                "max_cut_share": 0.9, "weight_decay": 0.01, "dtype": "fp32", "num_threads": 1,
            },
            "lora": {"r": 4, "alpha": 8},
            "checkpoints": {"background": False},
        }  # fmt: skip
        for dotted, value in changes.items():
            *way, last = dotted.split(".")
            place = plain
            for key in way:
                place = place.setdefault(key, {})
            place[last] = value
        return Recipe.model_validate(plain)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


def a_run(place, recipe, monkeypatch):
    """Everything that can be seen of a whole training, without files."""
    seen = {"evaluated": [], "saved": [], "rows": [], "compiled": 0, "blocks": 0}
    render = rendered_data.render_examples

    def rendering(*arguments, num_workers=1):
        seen["workers"] = max(seen.get("workers", 0), num_workers)
        return render(*arguments)

    def compiling(module, **_):
        seen["compiled"] += 1

    ready = []

    def preparing(*arguments, **more):
        prepared = prepare(*arguments, **more)
        ready.append(prepared)
        for name, module in prepared.task.model.named_modules():
            if name.endswith("layers.0.mlp"):
                # Before, not after: recomputing stops in the middle, as soon as it has all that it needs.
                module.register_forward_pre_hook(lambda *_: seen.update(blocks=seen["blocks"] + 1))
        return prepared

    monkeypatch.setattr(rendered_data, "render_examples", rendering)
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    monkeypatch.setattr("nightschool.training.run.prepare", preparing)
    run = RunStore(place.home).create(recipe.as_plain(), name=recipe.name)
    try:
        execute(place.home, run, resume=None, root=place.root, stop=Stop())
    except NightschoolError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        monkeypatch.undo()
    events = list(read_events(run.events.path))
    for event in events:
        if event["event"] in ("heldout", "saving"):
            seen["evaluated" if event["event"] == "heldout" else "saved"].append(event["step"])
    seen["rows"] = [(row["step"], row["loss"], row["learning_rate"]) for row in read_events(run.metrics_path)]
    prepared = ready[0]
    weights = {
        name: float(weight.detach().double().square().sum()) for name, weight in prepared.task.trainable().items()
    }
    examples = [
        sorted(e.digest for e in part)
        for part in (prepared.data.selection.new, prepared.data.selection.replayed, prepared.data.selection.held_out)
    ]
    return seen | {
        "weights": weights,
        "examples": examples,
        "dtype": prepared.dtype.compute,
        "device": str(next(prepared.task.model.parameters()).device),
        "threads": torch.get_num_threads(),
    }


def studied(place, recipe, monkeypatch):
    """The examples that the sources give."""
    loaded = load_sources(recipe.data, root=place.root, home=place.home, name=recipe.name)
    return sorted((example.question, example.answer) for example in loaded.examples)


def disk(place, recipe, monkeypatch):
    """What the plan reserves for checkpoints."""
    prepared = METHODS[recipe.method].prepare(Setup(recipe, place.home, place.root))
    return plan_of(prepared, place.home).facts["disk_needed_bytes"]


def reading(place, recipe, monkeypatch):
    """What learns to read a memory, of which draws, and its first loss; or why it is refused."""
    try:
        prepared = METHODS[recipe.method].prepare(Setup(recipe, place.home, place.root))
    except NightschoolError as error:
        return str(error)
    batches = [prepared.task.batch(epoch, 0) for epoch in range(4)]
    learns = {name: tuple(weight.shape) for name, weight in prepared.task.trainable().items()}
    drawn = [(batch.input_ids.tolist(), batch.candidates, batch.right, batch.misled) for batch in batches]
    loss = sum(float(prepared.task.loss(batch).sum.detach()) for batch in batches)
    return learns, prepared.task.model.memory.shape, drawn, loss


def judged(place, recipe, monkeypatch):
    """The rules that the gate applies, and their limits."""
    new = [Example((Message("user", "Bela?"), Message("assistant", "Rome")))]
    questions = make_questions(new, [], [], 10, 0)
    sheet = ScoreSheet("bot@1", 1.0, 10, tuple(question.answered("Rome") for question in questions))
    return [(result.rule, result.limit) for result in decide(sheet, sheet, recipe.gate).rules]


def asked(place, recipe, monkeypatch):
    """What the gate asks, and how long an answer may be."""
    run = RunStore(place.home).create(recipe.as_plain(), name=recipe.name)
    eval_set = eval_set_of_run(place.home, recipe.name, run, place.count_tokens, candidate="none")
    return len(eval_set.questions), eval_set.limits.max_new_tokens


def next_night(place, recipe, monkeypatch):
    moment = datetime(2026, 7, 1, 12, tzinfo=UTC)
    return Timetable.of(recipe.schedule).next_due(moment - timedelta(minutes=1), moment)


def skipped(place, recipe, monkeypatch):
    new = [Example(text="a text")]
    return reason_to_skip(recipe, Selection(new, num_new=1, num_all=1), "fingerprint", None)


KEPT = {"data": [{"from": "conversations", "where": {"rating": "any", "corrected": None}}]}


def kept(**where):
    source = {"from": "conversations", "where": {"rating": "any", "corrected": None} | where}
    return {"data": [source]}


LORA = {"method": "lora"}
QLORA = {"method": "qlora"}
DPO = {"method": "dpo", "data": [{"path": "pairs.json"}]}
MEMORY = {
    "method": "memory", "data": [{"path": "facts.json"}], "train.batch_size": 8, "memory.knowledge_length": 30,
    "memory.knowledge_dim": 16, "memory.gate_rank": 4, "memory.fusion_rank": 8, "memory.num_candidates": 4,
    "memory.irrelevant_share": 0.5,
}  # fmt: skip
EVERY_STEP = {"train.evaluate_every": "1 steps"}
CRON = {"schedule.cron": "0 3 * * *"}

# For each setting: who looks, at which recipe, and what is changed in it. Or the test that proves it.
OBSERVED = {
    "name": (a_run, {}, {"name": "another"}),
    "base": (a_run, {}, {"base": "./other"}),
    "start": "feedback/test_retraining.py::test_a_line_that_was_tainted_from_its_first_night_begins_with_its_base_again",
    "from_checkpoint": "training/test_early_stopping.py::test_a_new_run_begins_with_the_weights_of_a_checkpoint",
    "method": (a_run, {}, LORA),
    "data.path": (a_run, {}, {"data": [{"path": "fewer.json"}]}),
    "data.dataset": "data/test_data_sets.py::test_a_task_is_its_data_sets_each_parted_as_its_makers_part_it",
    "data.folder": "data/test_data_sets.py::test_what_is_not_there_is_an_error_that_says_what_to_do",
    "data.prompt_style": "data/test_data_sets.py::test_how_a_row_is_asked",
    "data.prompt": "data/test_data_sets.py::test_a_set_of_ones_own_is_an_entry_of_the_recipe",
    "data.answer": "data/test_data_sets.py::test_a_set_of_ones_own_is_an_entry_of_the_recipe",
    "data.held_out": "data/test_data_sets.py::test_a_set_of_ones_own_is_an_entry_of_the_recipe",
    "data.max_samples": "data/test_data_sets.py::test_the_split_is_of_the_whole_set_whatever_the_cap",
    "data.weight": "data/test_data_sets.py::test_weights_of_a_recipe_say_how_much_is_studied",
    "data.repeat": "data/test_repeat.py::test_a_new_example_is_studied_as_often_as_its_source_says",
    "data.redact": "data/test_redact.py::test_a_source_is_redacted_as_it_asks_and_says_how_much",
    "data.format": "data/test_load.py::test_a_pinned_format_is_used",
    "data.from_": (studied, {}, KEPT),
    "data.where.rating": (studied, KEPT, kept(rating="good")),
    "data.where.corrected": (studied, KEPT, kept(corrected=True)),
    "data.where.model": (studied, KEPT, kept(model="aide")),
    "data.since": "data/test_load.py::test_since_the_last_promotion_means_since_its_run_began",
    "held_out.share": (a_run, {}, {"held_out.share": 0.8}),
    "held_out.min_examples": (a_run, {}, {"held_out.min_examples": 100}),
    "held_out.path": (a_run, {}, {"held_out.path": "held.json"}),
    "replay.ratio": (a_run, {}, {"replay.ratio": 0.5}),
    "replay.minimum": (a_run, {}, {"replay.minimum": 10}),
    "replay.path": (a_run, {}, {"replay.path": "held.json"}),
    "train.learning_rate": (a_run, {}, {"train.learning_rate": 5e-3}),
    "train.epochs": (a_run, {}, {"train.epochs": 1}),
    "train.max_steps": (a_run, {}, {"train.max_steps": 1}),
    "train.batch_size": (a_run, {}, {"train.batch_size": 3}),
    "train.tokens_per_batch": (a_run, {}, {"train.tokens_per_batch": 200}),
    "train.accumulation_steps": (a_run, {}, {"train.accumulation_steps": 1}),
    "train.max_seq_len": (a_run, {}, {"train.max_seq_len": 48}),
    "train.max_cut_share": (a_run, {"train.max_seq_len": 48}, {"train.max_cut_share": 0.01}),
    "train.weight_decay": (a_run, {}, {"train.weight_decay": 0.5}),
    "train.beta1": (a_run, {}, {"train.beta1": 0.5}),
    "train.beta2": (a_run, {}, {"train.beta2": 0.9}),
    "train.epsilon": (a_run, {}, {"train.epsilon": 1e-3}),
    "train.max_grad_norm": (a_run, {"train.epsilon": 1e-3}, {"train.max_grad_norm": 0.01}),
    "train.lr_schedule": (a_run, {}, {"train.lr_schedule": "constant"}),
    "train.warmup_steps": (a_run, {}, {"train.warmup_steps": 2}),
    "train.min_lr_ratio": (a_run, {}, {"train.min_lr_ratio": 0.5}),
    "train.dtype": (a_run, {"train.max_steps": 1}, {"train.dtype": "bf16"}),
    "train.gradient_checkpointing": (a_run, {}, {"train.gradient_checkpointing": True}),
    "train.compile": (a_run, {}, {"train.compile": True}),
    "train.device": (a_run, {"train.device": "cpu"}, {"train.device": "cuda"}),
    "train.num_threads": (a_run, {}, {"train.num_threads": 2}),
    "train.num_workers": (a_run, {}, {"train.num_workers": 2}),
    "train.seed": (a_run, {}, {"train.seed": 43}),
    "train.log_every": (a_run, {}, {"train.log_every": 2}),
    "train.evaluate_every": (a_run, {}, {"train.evaluate_every": "1 steps"}),
    "train.optimizer": (a_run, {}, {"train.optimizer": "adamw_8bit"}),
    "train.early_stopping.patience": (
        a_run,
        EVERY_STEP | {"train.early_stopping.min_delta": 9.0},
        {"train.early_stopping.patience": 1},
    ),
    "train.early_stopping.min_delta": (
        a_run,
        EVERY_STEP | {"train.early_stopping.patience": 1},
        {"train.early_stopping.min_delta": 9.0},
    ),
    "train.early_stopping.every": "training/test_spot_check.py::test_a_check_is_an_event_and_in_the_row_of_its_step",
    "train.early_stopping.learned": "training/test_spot_check.py::test_a_run_ends_when_it_knows_enough",
    "train.early_stopping.interpolate": "training/test_interpolation.py::test_a_run_publishes_the_nearest_point_that_knows_as_much",
    "train.early_stopping.drift": "training/test_spot_check.py::test_the_plan_says_what_is_checked",
    "quantization.bits": (a_run, QLORA, {"quantization.bits": 8}),
    "quantization.type": (a_run, QLORA, {"quantization.type": "fp4"}),
    "quantization.double": (a_run, QLORA, {"quantization.double": False}),
    "quantization.compute_dtype": (a_run, QLORA, {"quantization.compute_dtype": "bfloat16"}),
    "lora.r": (a_run, LORA, {"lora.r": 2}),
    "lora.alpha": (a_run, LORA, {"lora.alpha": 16}),
    "lora.dropout": (a_run, LORA, {"lora.dropout": 0.3}),
    "lora.target_modules": (a_run, LORA, {"lora.target_modules": ["q_proj"]}),
    "dpo.beta": (a_run, DPO, {"dpo.beta": 0.5}),
    "dpo.label_smoothing": (a_run, DPO, {"dpo.label_smoothing": 0.2}),
    "dpo.sft_weight": (a_run, DPO, {"dpo.sft_weight": 1.0}),
    "memory.stage": (reading, MEMORY, {"memory.stage": "fusion"}),
    "memory.name": "training/test_memory_method.py::test_stages_follow_each_other_and_publish_modules_on_the_base",
    "memory.gate_rank": (reading, MEMORY, {"memory.gate_rank": 2}),
    "memory.fusion_rank": (reading, MEMORY, {"memory.fusion_rank": 4}),
    "memory.knowledge_dim": (reading, MEMORY, {"memory.knowledge_dim": 8}),
    "memory.knowledge_length": (reading, MEMORY, {"memory.knowledge_length": 3}),
    "memory.num_candidates": (reading, MEMORY, {"memory.num_candidates": 2}),
    "memory.encoder_layers": (reading, MEMORY, {"memory.encoder_layers": 1}),
    "memory.fusion_layers": (reading, MEMORY | {"memory.encoder_layers": 1}, {"memory.fusion_layers": [1]}),
    "memory.similarity_loss_coef": (reading, MEMORY, {"memory.similarity_loss_coef": 1.0}),
    "memory.diversity_loss_coef": (reading, MEMORY, {"memory.diversity_loss_coef": 1.0}),
    "memory.irrelevant_share": (reading, MEMORY, {"memory.irrelevant_share": 0.0}),
    "memory.misled_share": (reading, MEMORY, {"memory.misled_share": 1.0}),
    "memory.subject_closed_below": (reading, MEMORY, {"memory.subject_closed_below": 0.2}),
    "memory.relation_closed_below": (reading, MEMORY, {"memory.relation_closed_below": 0.2}),
    "memory.redraw_values": (reading, MEMORY, {"memory.redraw_values": False}),
    "checkpoints.every": (a_run, {}, {"checkpoints.every": "1 steps"}),
    "checkpoints.keep.last": (disk, {}, {"checkpoints.keep.last": 1}),
    "checkpoints.keep.best": (disk, {}, {"checkpoints.keep.best": 0}),
    "checkpoints.keep.every": "store/test_checkpoints.py::test_milestones_stay_for_ever",
    "checkpoints.background": (
        "training/test_saver.py::test_what_is_saved_is_the_state_at_the_call_whatever_the_next_step_does"
    ),
    "checkpoints.each_epoch": "training/test_emergency.py::test_every_checkpoint_says_what_it_was_saved_for",
    "checkpoints.on_full_disk": "training/test_saver.py::test_a_full_disk_lets_the_run_go_on_if_the_recipe_says_so",
    "checkpoints.publish": "training/test_run.py::test_the_newest_checkpoints_become_versions_under_aliases_and_the_last_weights_are_the_candidate",
    "checkpoints.upload.url": "uploads/test_uploads.py::test_what_is_committed_is_pending_until_it_is_uploaded",
    "checkpoints.upload.background": "uploads/test_uploads.py::test_a_trainer_can_wait_for_its_upload",
    "checkpoints.upload.archive": "cli/test_uploads.py::test_an_archive_is_pushed_as_documented",
    "checkpoints.upload.bandwidth": "remotes/test_remotes.py::test_a_throttle_keeps_to_its_rate",
    "checkpoints.upload.max_pending": "uploads/test_faults.py::test_a_run_waits_until_enough_is_uploaded",
    "checkpoints.upload.wait_at_stop": (
        "uploads/test_faults.py::test_a_run_that_stops_waits_for_its_uploads_but_not_for_ever"
    ),
    "pretrain.cache_limit": "data/test_remote_shards.py::test_no_more_is_kept_than_the_limit_allows",
    "pretrain.group_shards": "data/test_token_batches.py::test_what_decides_the_order_is_in_the_fingerprint",
    "pretrain.held_out_tokens": "data/test_token_batches.py::test_what_is_held_out_is_never_trained",
    "pretrain.loss_across_documents": "data/test_token_batches.py::test_what_decides_the_order_is_in_the_fingerprint",
    "pretrain.max_files": "data/test_shards.py::test_a_folder_with_an_index",
    "pretrain.sample_tokens": "training/test_pretrain.py::test_a_run_learns_and_publishes_what_it_learned",
    "tokenizer": "training/test_pretrain.py::test_adding_padding_changes_no_loss",
    "lora.init": "training/test_null_space.py::test_what_is_rehearsed_hardly_reaches_the_directions",
    "train.num_processes": "training/test_world.py::test_two_processes_learn_what_one_learns_from_twice_the_batch",
    "train.zero_stage": "training/test_world.py::test_sharded_processes_learn_the_same_and_each_saves_its_part",
    **dict.fromkeys(
        (f"shape.{name}" for name in Shape.model_fields),
        "training/test_pretrain.py::test_each_field_of_a_shape_shapes_the_model",
    ),
    "gate.holdout_loss": (judged, {}, {"gate.holdout_loss": "<= 1.5"}),
    "gate.forgetting": (judged, {}, {"gate.forgetting": "<= 1%"}),
    "gate.new_facts": (judged, {}, {"gate.new_facts": "off"}),
    "gate.general": (judged, {}, {"gate.general": "off"}),
    "gate.general_lost": (judged, {}, {"gate.general_lost": "<= 5%"}),
    "gate.drift": (judged, {}, {"gate.drift": "<= 0.5"}),
    "gate.preferences": (judged, {}, {"gate.preferences": ">= 60%"}),
    "gate.pins": "engine/test_compare.py::test_a_pin_that_is_lost_stands_in_the_way_alone",
    "gate.judge.url": "evaluation/test_model_judge.py::test_what_the_judge_changes_decides_and_is_shown",
    "gate.judge.model": "evaluation/test_model_judge.py::test_what_the_judge_changes_decides_and_is_shown",
    "gate.judge.timeout": "evaluation/test_model_judge.py::test_a_judge_that_does_not_answer_in_time_lets_nobody_through",
    "gate.sample": (asked, {}, {"gate.sample": 2}),
    "gate.max_new_tokens": (asked, {}, {"gate.max_new_tokens": 7}),
    "schedule.every": (next_night, {}, {"schedule.every": "6h"}),
    "schedule.cron": (next_night, {}, CRON),
    "schedule.timezone": (next_night, CRON, {"schedule.timezone": "Asia/Tokyo"}),
    "schedule.missed": "jobs/test_scheduler.py::test_what_was_missed_is_skipped_where_the_recipe_says_so",
    "schedule.overlap": "jobs/test_scheduler.py::test_cycles_that_fall_due_while_one_runs_are_skipped_and_counted",
    "schedule.min_new_examples": (skipped, {}, {"schedule.min_new_examples": 2}),
    "experts.tier": "training/test_expert_streaming.py::test_the_plan_says_on_which_tier_the_bytes_lie",
    "experts.resident": "layers/test_expert_stores.py::test_a_file_keeps_what_memory_keeps",
    "experts.bias_update_rate": (
        "layers/test_expert_bias.py::test_a_bias_grows_for_experts_with_little_and_shrinks_for_those_with_much"
    ),
    "study.write": "feedback/test_study.py::test_files_and_corrections_are_studied_in_forms_and_an_epoch_counts_them",
    "study.objective": "training/test_self_distillation.py::test_a_lesson_is_a_new_question_and_answer_in_any_form_below_its_fact",
    "study.contradictions": "feedback/test_contradictions.py::test_two_answers_that_say_different_things_are_not_trained_or_the_later_one_is",
    "study.facts_per_night": "feedback/test_study.py::test_what_is_more_than_a_night_has_room_for_waits_and_what_people_said_goes_first",
    "study.write_for": "training/test_written_forms.py::test_what_the_gate_asks_was_rejected_or_has_no_time_is_not_written",
    "study.forms": "data/study/test_forms.py::test_an_example_is_studied_in_as_many_forms_as_wanted_and_one_is_kept_aside",
    "rehearse.prompts": "training/test_rehearsal.py::test_what_the_exam_asks_is_never_rehearsed",
    "rehearse.redact": "evaluation/test_rehearsed.py::test_personal_data_are_replaced_unless_a_recipe_says_otherwise",
    "rehearse.max_conversations": "evaluation/test_rehearsed.py::test_what_users_asked_comes_newest_first_each_once_and_takes_turns_with_others",
    "rehearse.ratio": "training/test_rehearsal.py::test_as_many_answers_as_the_ratio_says_lie_beside_a_micro_batch",
    "rehearse.weight": "training/test_rehearsal.py::test_with_a_rehearsal_less_is_unlearned",
    "rehearse.teacher": "training/test_rehearsal.py::test_a_base_is_asked_once_whatever_its_adapter_has_learned",
    "rehearse.max_new_tokens": "training/test_rehearsal.py::test_as_many_answers_as_the_ratio_says_lie_beside_a_micro_batch",
    "experts.load_balancing_loss_coef": "layers/test_expert_balance.py::test_gradients_are_those_of_the_formulas",
    "experts.z_loss_coef": "layers/test_expert_balance.py::test_gradients_are_those_of_the_formulas",
    "train.local_blocks": "layers/test_local_blocks.py::test_no_gradient_crosses_a_block_and_the_last_loss_is_that_of_the_whole_model",
    "train.expert_learning_rate": (
        "layers/test_expert_balance.py::test_experts_learn_at_a_rate_of_their_own_and_everything_else_as_without_it"
    ),
    "jobs.share_base": "jobs/test_shared_base.py::test_a_job_that_cannot_share_trains_alone",
    "serve.promote": "jobs/test_cycle.py::test_the_recipe_says_when_the_champion_moves",
    "serve.model_check_interval": (
        "cli/test_train.py::test_serve_takes_what_a_recipe_wishes_unless_an_option_says_otherwise"
    ),
    "serve.record_conversations": (
        "cli/test_train.py::test_serve_takes_what_a_recipe_wishes_unless_an_option_says_otherwise"
    ),
}


# Where the change is to be refused: a message names the setting by itself, or the machine has no GPU.
REFUSING = ("train.device",)


def settings_of(model, prefix=""):
    """The dotted names of all settings; the places of a list are left out."""
    names = []
    for name, field in model.model_fields.items():
        parts = [field.annotation, *get_args(field.annotation)]
        section = next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
        names += settings_of(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return names


def test_each_option_has_an_observer():
    assert sorted(settings_of(Recipe)) == sorted(OBSERVED)


def test_an_option_without_an_observer_would_be_noticed():
    class Wider(Recipe):
        num_candidates: int = 1

    assert set(settings_of(Wider)) - set(OBSERVED) == {"num_candidates"}


def test_the_same_recipe_looks_the_same_twice(place, monkeypatch):
    observers = {
        (look, json.dumps(before)) for look, before, _ in filter(lambda o: not isinstance(o, str), OBSERVED.values())
    }
    for look, before in sorted(observers, key=str):
        recipe = place.recipe(json.loads(before))
        assert look(place, recipe, monkeypatch) == look(place, recipe, monkeypatch)


@pytest.fixture(scope="module")
def looked():
    return {}


@pytest.mark.parametrize("option", OBSERVED)
def test_each_option_changes_an_observable(place, looked, monkeypatch, option):
    if isinstance(OBSERVED[option], str):
        assert exists(OBSERVED[option])
        return
    look, before, change = OBSERVED[option]
    key = look.__name__, json.dumps(before)
    if key not in looked:
        looked[key] = look(place, place.recipe(before), monkeypatch)
        assert not isinstance(looked[key], str), looked[key]
    changed = look(place, place.recipe(before | change), monkeypatch)
    assert changed != looked[key]
    if look is a_run and isinstance(changed, str):
        assert option in changed or option in REFUSING, f"it does not run at all: {changed}"


# The event loop is never blocked.


class Bot:
    """A home with a version that is served, another one to be promoted, and a base to train."""

    def __init__(self, path):
        self.path, self.tokenizer = path, byte_tokenizer()
        self.home = Home(path / "home").ensure()
        self.registry = Registry(self.home)
        self.models = {}
        for seed in (1, 2):
            model = lively_model("tiny-llama", seed=seed)
            version = self.registry.publish(
                "bot", lambda folder, model=model: save_version_folder(model, self.tokenizer, folder), VersionMetadata()
            )
            self.models[version.id] = model
        self.old, self.new = self.models
        self.registry.promote("bot", self.old, by="test")

    def expected(self, version, question, max_new_tokens):
        ids = torch.tensor([render_prompt(self.tokenizer, [Message("user", question)])])
        stop = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        with torch.inference_mode():
            out = self.models[version].generate(ids, max_new_tokens=max_new_tokens, do_sample=False, **stop)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def bot(tmp_path):
    return Bot(tmp_path)


@pytest.fixture
def server(bot):
    slot = Slot("bot", EnginePool(bot.home, num_rows=4))
    with live(slot, registry=bot.registry) as server:
        server.slot = slot
        yield server


def generate(server, question, **more):
    body = {"query": question, "max_new_tokens": 12, "temperature": 0} | more
    return httpx2.post(f"{server.url}/generate", json=body, timeout=60)


@pytest.mark.usefixtures("warm_children")
def test_health_answers_during_train_load_generate(bot, server):
    """The run is a process of its own; loads and answers are in this one, on other threads than the event loop."""
    (bot.path / "train.json").write_text(json.dumps([{"query": "Bela?", "retrieved": "Rome " * 20}] * 8))
    recipe = {
        "name": "night",
        "base": f"bot@{bot.old}",
        "data": [{"path": str(bot.path / "train.json")}],
        "train": {"max_steps": 100_000, "dtype": "fp32", "num_threads": 1, "max_seq_len": 128},
    }
    run = RunStore(bot.home).create(Recipe.model_validate(recipe).as_plain(), name="night")
    command = [sys.executable, "-m", "nightschool.training.run", "--home", str(bot.home.path), "--run", run.id]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (bot.path / "log").open("wb") as log:
        training = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=bot.path)
    versions, working_threads = set(), set()
    refresh = server.slot.refresh

    def watched_refresh():
        working_threads.add(threading.get_ident())
        return refresh()

    server.slot.refresh = watched_refresh
    try:
        eventually(lambda: training.poll() is not None or run.status.step > 3, 60)
        assert training.poll() is None, (bot.path / "log").read_text()
        first_step = run.status.step
        with httpx2.Client() as client:
            number = 0
            while number < 200 or len(versions) < 2:  # until the other version is loaded, however long it takes
                if number % 100 == 50:
                    bot.registry.promote("bot", (bot.new, bot.old)[number // 100 % 2], by="test")
                    with suppress(httpx2.TimeoutException):  # nobody waits for the end of the load
                        client.get(f"{server.url}/refresh_model", timeout=0.001)
                if number % 20 == 0:
                    with suppress(httpx2.TimeoutException):
                        client.post(f"{server.url}/generate", json={"query": "Bela?"}, timeout=0.001)
                health = client.get(f"{server.url}/health", timeout=30)
                assert health.json()["model_loaded"] is True
                versions.add(server.slot.current.version.id)
                number += 1
                time.sleep(0.01)
        eventually(lambda: run.status.step > first_step)
        assert training.poll() is None
    finally:
        training.kill()
        training.wait()
    assert versions == {bot.old, bot.new}
    assert working_threads
    assert server.thread.ident not in working_threads


# Failures surface.


def test_failures_surface_with_an_error_code_and_their_reason(bot, server):
    engine = server.slot.current.engine
    run, engine._runner.run = engine._runner.run, lambda *_: (_ for _ in ()).throw(RuntimeError("a broken expert"))
    answer = generate(server, "Bela?")
    assert answer.status_code == 500
    assert "a broken expert" in answer.json()["detail"]
    chat = {"model": "bot", "messages": [{"role": "user", "content": "Bela?"}]}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60)
    assert (answer.status_code, "choices" in answer.json()) == (500, False)
    stream = httpx2.post(f"{server.url}/v1/chat/completions", json=chat | {"stream": True}, timeout=60).text
    assert "a broken expert" in stream
    assert '"finish_reason":"stop"' not in stream.replace(" ", "")
    engine._runner.run = run
    assert generate(server, "Bela?").json()["response"] == bot.expected(bot.old, "Bela?", 12)


# Temperature 0.


def test_0_means_greedy_deterministic_through_both_routes_whatever_else_is_asked(bot, server):
    question = "Who sings?"
    expected = bot.expected(bot.old, question, 12)
    chat = {"model": "bot", "messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0}
    for seed in (None, 1, 2):
        engine = server.slot.current.engine
        noise = [
            engine.submit(
                GenerationRequest("noise", engine.binding, [n, n + 1], SamplingParams(max_new_tokens=40, seed=n))
            )
            for n in range(5, 8)
        ]
        assert generate(server, question).json()["response"] == expected
        more = {} if seed is None else {"seed": seed, "top_p": 0.5}
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=chat | more, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == expected
        for handle in noise:
            handle.cancel()
    warm = [generate(server, question, temperature=1.5).json()["response"] for _ in range(4)]
    assert len({*warm, expected}) > 2, "and 1.5 does not"
