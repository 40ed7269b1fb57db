"""What does a quantised base save, and what does it cost? QLoRA against LoRA and full fine-tuning on the same base.

The base has learned the same kind of chats before, by full fine-tuning. Each method then trains in a process of its own: its
peak is what that process holds at most beyond what it holds with everything imported.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import real_model
from harness import Benchmark

GOALS = {"qlora_weights_vs_lora": {"max": 0.6}, "qlora_heldout_vs_lora": {"max": 1.03}}
METHODS = ("full", "lora", "qlora")
RATES = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}


def run(folder: str, method: str, base: str, steps: int, tokens: int, rate: float) -> dict[str, float]:
    """Train in this process; the figures of the run."""
    import psutil

    from nightschool.config.recipe import Recipe
    from nightschool.events import read_events
    from nightschool.models.quantize import stored_bytes
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore
    from nightschool.training import run as training
    from nightschool.work.stop import Stop

    place, home = Path(folder), Home(Path(folder) / "home").ensure()
    recipe = {
        "name": f"learned-{method}",
        "base": base,
        "method": method,
        "data": [{"path": "train.json"}],
        "held_out": {"path": "held.json"},
        "replay": {"ratio": 0},
        "train": {
            "max_steps": steps,
            "tokens_per_batch": tokens,
            "accumulation_steps": 1,
            "max_seq_len": 256,
            "max_cut_share": 1.0,
            "learning_rate": rate,
            "warmup_steps": min(5, steps),
            "dtype": "fp32",
            "num_threads": 1,
            "evaluate_every": f"{steps} steps",
        },
        "lora": {"r": 16, "alpha": 32},
        "checkpoints": {"background": False, "keep": {"last": 1}},
        "serve": {"promote": "never"},
    }
    seen: dict[str, float] = {}
    prepare = training.prepare

    def preparing(*arguments: Any, **more: Any) -> Any:
        prepared = prepare(*arguments, **more)
        seen["weights"] = stored_bytes(prepared.task.model)
        return prepared

    training.prepare = preparing  # type: ignore[assignment]
    started = RunStore(home).create(Recipe.model_validate(recipe).as_plain(), name=recipe["name"])
    before = psutil.Process().memory_info().rss
    training.execute(home, started, resume=None, root=place, stop=Stop())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    rows = list(read_events(started.metrics_path))
    clock = [row["seconds"] for row in rows]
    return seen | {
        "peak": float(peak),
        "step": statistics.median(after - earlier for earlier, after in itertools.pairwise(clock)),
        "heldout": float(rows[-1]["heldout_loss"]),
        "candidate": started.status.candidate,  # type: ignore[dict-item]
    }


def apart(*arguments: Any) -> dict[str, Any]:
    """`run` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def prepare_base(place: Path, quick: bool) -> str:
    """A model that has learned chats, in the home of `place`; and chats to learn and to hold out beside it."""
    from real_chats import chats, qwen3, tokenizer

    from nightschool.models.export import save_version_folder

    everything = chats()
    first, rest = everything[: len(everything) // 2], everything[len(everything) // 2 :]
    learned = tokenizer(everything)
    save_version_folder(qwen3(len(learned)), learned, place / "random")
    for name, rows in (("train", first), ("held", rest[::7][: 12 if quick else 40])):
        (place / f"{name}.json").write_text(json.dumps([{"messages": row} for row in rows]))
    made = apart(str(place), "full", str(place / "random"), 5 if quick else 300, 512 if quick else 1024, 1e-3)
    (place / "train.json").write_text(json.dumps([{"messages": row} for n, row in enumerate(rest) if n % 7]))
    return str(made["candidate"])


def real_base(place: Path, quick: bool) -> str:
    """SmolLM2, and facts of people who do not exist."""
    from nightschool.data.synthetic import make_world

    world = make_world(seed=3, num_people=40 if quick else 96)
    rows = [{"query": one.question, "retrieved": one.answer} for one in world.examples()]
    (place / "train.json").write_text(json.dumps([row for n, row in enumerate(rows) if n % 5]))
    # Two dozen answers have some 200 tokens, and their loss differs by more than the goal from one dozen to the next.
    (place / "held.json").write_text(json.dumps(rows[::5][: 24 if quick else None]))
    path = real_model.find()
    if path is None:
        raise SystemExit("There is no pretrained model. Run: make real-model-file")
    return str(path)


def main() -> None:
    bench = Benchmark("qlora_bytes", "what a quantised base saves, and what it costs", GOALS, has_real=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base = real_base(place, bench.quick) if bench.is_real else prepare_base(place, bench.quick)
        steps, tokens = (6 if bench.quick else 40, 256) if bench.is_real else (5, 512) if bench.quick else (100, 1024)
        of = {method: apart(str(place), method, base, steps, tokens, RATES[method]) for method in METHODS}
    bench.table(
        [
            (
                method,
                f"weights {one['weights'] / 1e6:7.1f} MB   peak {one['peak'] / 1e6:7.0f} MB   "
                f"{one['step']:6.2f} s a step   held-out {one['heldout']:.4f}",
            )
            for method, one in of.items()
        ]
    )
    full, lora, qlora = (of[method] for method in METHODS)
    bench.finish(
        {
            "qlora_weights_vs_lora": qlora["weights"] / lora["weights"],
            "qlora_heldout_vs_lora": qlora["heldout"] / lora["heldout"],
            "qlora_peak_vs_lora": qlora["peak"] / lora["peak"],
            "lora_peak_vs_full": lora["peak"] / full["peak"],
            "qlora_step_time_vs_lora": qlora["step"] / lora["step"],
            "lora_step_time_vs_full": lora["step"] / full["step"],
        }
    )


if __name__ == "__main__":
    main()
