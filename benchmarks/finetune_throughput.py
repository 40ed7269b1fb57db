"""How many tokens does fine-tuning train per second, against TRL's SFTTrainer on the same chats?

Both start from the same weights, see the same number of tokens per step, and are judged by one held-out loss. The peer
runs twice: as it comes (padding, recomputed activations), and in its packed mode.

And how many of them are left where general answers are rehearsed beside the chats, as in a night (`--against rehearsal` asks that alone)? Counted are all tokens
that something is learned from, rehearsed ones among them; and, beside that, those of the chats alone. Forms of new examples are examples
like others, so that `study` changes nothing of it.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import real_model
import torch
from harness import Benchmark
from real_chats import chats, qwen3, tokenizer


@dataclass(frozen=True)
class Outcome:
    """Tokens that carried loss per wall second of training, the held-out loss after it, the dtype of the products, and the rate with rehearsed ones."""

    tokens_trained_per_second: float
    heldout_loss: float
    dtype: str
    rehearsed_too_per_second: float = 0.0


class Setting:
    """The model, the chats and the judge that all contestants share."""

    def __init__(self, num_chats: int, quick: bool, is_real: bool) -> None:
        from nightschool.data.batches import Batches
        from nightschool.data.chat.render import render_example
        from nightschool.data.example import Example, Message

        everything = chats()
        # A pretrained model forgets at a rate at which a fresh one learns, and takes ten times as long for a token.
        self.max_seq_len, self.batch_size, self.learning_rate = (
            (256, 2 if quick else 4, 2e-5) if is_real else (1024, 8, 1e-3)
        )
        if is_real:
            loaded = real_model.load()
            self.model, self.tokenizer = loaded.model, loaded.tokenizer
        else:
            self.tokenizer = tokenizer(everything)
            self.model = qwen3(len(self.tokenizer))
        # Every seventh chat is held out, so that both kinds are on both sides.
        self.train = [row for number, row in enumerate(everything) if number % 7][:num_chats]
        heldout = everything[::7][: 10 if quick and is_real else 40 if quick else 120]

        def render(rows: list[list[dict[str, str]]]) -> list[Any]:
            examples = [Example(messages=tuple(Message(m["role"], m["content"]) for m in row)) for row in rows]  # type: ignore[arg-type]
            return [
                piece
                for example in examples
                for piece in as_list(render_example(self.tokenizer, example, self.max_seq_len))
            ]

        self.rendered = render(self.train)
        self.heldout = Batches(render(heldout), batch_size=8, seed=0)

    def judge(self, model: Any) -> float:
        """Held-out loss in nats per token, in fp32."""
        from nightschool.evaluation.heldout import heldout_loss

        return heldout_loss(model, [self.heldout.get(0, i) for i in range(self.heldout.num_batches(0))])[0]


def as_list(value: Any) -> list[Any]:
    """One rendering, or several."""
    return value if isinstance(value, list) else [value]


def ours(
    setting: Setting,
    *,
    steps: int,
    packed: bool,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    rehearsal: Any = None,
    judged: bool = True,
) -> Outcome:
    """Our loop with the recipe's defaults but for batch and rate."""
    from nightschool.config.recipe import Train
    from nightschool.data.batches import Batches
    from nightschool.models.dtype import resolve_dtype
    from nightschool.training.loop import Budget, fit
    from nightschool.training.methods.finetune import FinetuneTask
    from nightschool.training.metrics import MetricsLog
    from nightschool.training.optimizer import Schedule
    from nightschool.training.planning.speed import choose_by_measuring
    from nightschool.training.state import TrainState

    model = copy.deepcopy(setting.model)
    size: dict[str, int] = (
        {"tokens_per_batch": setting.batch_size * setting.max_seq_len} if packed else {"batch_size": setting.batch_size}
    )
    batches = Batches(setting.rendered, seed=0, **size)
    train = Train(learning_rate=setting.learning_rate, accumulation_steps=1, lr_schedule="constant", weight_decay=0.0)
    choice = resolve_dtype(dtype, torch.device("cpu"), hidden_size=model.config.hidden_size)
    task = FinetuneTask(model, batches, train, compute_dtype=choice.compute)
    if dtype == "auto":
        choice = choose_by_measuring(task, choice, model.config.hidden_size)
    task.rehearsal = rehearsal
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        metrics = MetricsLog(Path(folder) / "metrics.jsonl")
        fit(
            task,
            TrainState(task.fingerprint),
            Budget(steps_total=steps, max_grad_norm=1.0),
            schedule=Schedule(setting.learning_rate, steps, "constant"),
            metrics=metrics,
            on_row=rows.append,
        )
        metrics.close()
    timed = rows[1:]  # the first step compiles what it has not seen; the peer's first step is left out as well
    seconds = sum(row["tokens_trained"] / row["tokens_per_second"] for row in timed)
    trained = sum(row["tokens_trained"] for row in timed)
    rehearsed = sum(row["tokens_trained"] * row.get("rehearsed_per_token", 0.0) for row in timed)
    heldout = setting.judge(model) if judged else float("nan")
    dtype_name = str(choice.compute).removeprefix("torch.")
    return Outcome(trained / seconds, heldout, dtype_name, (trained + rehearsed) / seconds)


def rehearsed(setting: Setting, num_prompts: int) -> Any:
    """What the model says to general prompts, half as many beside a micro-batch as it has chats."""
    from nightschool.evaluation.general import rehearsed_prompts
    from nightschool.layers.forward import prepare
    from nightschool.training.rehearsal import Rehearsal, ask

    prompts = rehearsed_prompts("default", "default", Path())
    model = copy.deepcopy(setting.model)
    rows = ask(model, prepare(model), setting.tokenizer, prompts[:: len(prompts) // num_prompts], 64)
    return Rehearsal(rows, ratio=0.5, weight=1.0, seed=0)


def with_and_without(setting: Setting, *, steps: int, rounds: int, num_prompts: int) -> dict[str, float]:
    """Tokens learned from per second with a rehearsal, by those without: all of them, and those of the chats alone; in turn, fp32."""
    started = time.perf_counter()
    rehearsal = rehearsed(setting, num_prompts)
    asking = time.perf_counter() - started
    pairs = []
    for _ in range(rounds):
        plain = ours(setting, steps=steps, packed=False, dtype="fp32", judged=False)
        pairs.append((ours(setting, steps=steps, packed=False, dtype="fp32", judged=False, rehearsal=rehearsal), plain))
    return {
        "rehearsing": round(
            statistics.median(a.rehearsed_too_per_second / b.tokens_trained_per_second for a, b in pairs), 3
        ),
        "rehearsing_chats_alone": round(
            statistics.median(a.tokens_trained_per_second / b.tokens_trained_per_second for a, b in pairs), 3
        ),
        "rehearsing_asked_seconds": round(asking, 1),
    }


def trl(setting: Setting, *, steps: int, packed: bool) -> Outcome:
    """TRL's SFTTrainer with its defaults but for rate, schedule and the mask that it needs to train on answers only."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    moments: list[float] = []
    counts: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            counts.append(int((inputs["labels"] != -100).sum()))
            return super().training_step(model, inputs, *rest, **named)

    processor = copy.deepcopy(setting.tokenizer)
    processor.chat_template = marked()
    model = copy.deepcopy(setting.model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Counting(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                use_cpu=True,
                max_steps=steps,
                packing=packed,
                max_length=setting.max_seq_len,
                learning_rate=setting.learning_rate,
                lr_scheduler_type="constant",
                assistant_only_loss=True,
                per_device_train_batch_size=setting.batch_size,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=1,
            ),
            train_dataset=Dataset.from_list([{"messages": row} for row in setting.train]),
            processing_class=processor,
            callbacks=[Clock()],
        )
        trainer.train()
    rate = sum(counts[1:]) / (moments[-1] - moments[0])
    return Outcome(rate, setting.judge(model.float()), "bfloat16" if trainer.args.bf16 else "float32")


def marked() -> str:
    """Our template with the marks that the peer needs to find what the assistant says."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def main() -> None:
    bench = Benchmark(
        "finetune_throughput",
        "Tokens trained per second against TRL's SFTTrainer, same model, chats and tokens per step",
        {
            "vs_trl_default": {"min": 2.5},
            "vs_trl_packed": {"min": 1.1},
            "heldout_difference_default": {"max": 0.01},
            "heldout_difference_packed": {"max": 0.01},
            "rehearsing": {"min": 0.85},
        },
        has_real=True,
        choices={"against": ("all", "trl", "rehearsal")},
    )
    torch.set_num_threads(2)
    setting = Setting(150 if bench.quick else 1500, bench.quick, bench.is_real)
    # Batches hold different numbers of tokens that carry loss, so that a ratio over one or two of them says little.
    steps = {False: 9 if bench.quick else 24, True: 7 if bench.quick else 12}
    rounds = 1 if bench.quick else 3
    figures: dict[str, float] = {"parameters": setting.model.num_parameters()}
    against = bench.chosen["against"]
    bench.goals = {
        name: goal
        for name, goal in bench.goals.items()
        if against == "all" or (name == "rehearsing") == (against == "rehearsal")
    }
    if against != "trl":
        figures |= with_and_without(setting, steps=steps[False], rounds=rounds, num_prompts=12 if bench.quick else 48)
    for packed, name in ((False, "default"), (True, "packed")) if against != "rehearsal" else ():
        count = steps[packed]
        pairs = [
            (ours(setting, steps=count, packed=packed), trl(setting, steps=count, packed=packed)) for _ in range(rounds)
        ]
        mine, theirs = pairs[-1]
        bench.table(
            [
                (
                    f"ours, {name} ({mine.dtype})",
                    f"{statistics.median(a.tokens_trained_per_second for a, _ in pairs):7.0f} tokens/s  held-out {mine.heldout_loss:.4f}",
                ),
                (
                    f"TRL, {name} ({theirs.dtype})",
                    f"{statistics.median(b.tokens_trained_per_second for _, b in pairs):7.0f} tokens/s  held-out {theirs.heldout_loss:.4f}",
                ),
            ]
        )
        figures[f"vs_trl_{name}"] = round(
            statistics.median(a.tokens_trained_per_second / b.tokens_trained_per_second for a, b in pairs), 3
        )
        figures[f"heldout_difference_{name}"] = round(
            statistics.median(max(0.0, a.heldout_loss / b.heldout_loss - 1) for a, b in pairs), 5
        )
    bench.finish(figures)


if __name__ == "__main__":
    main()
