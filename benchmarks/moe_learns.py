"""Is a mixture of experts worth its weights? About twenty CPU minutes on English texts and Python programs.

Two models learn the same tokens in the same order on one thread each: a mixture of eight experts of which two work for a token, and a dense model
whose feed-forward part is as wide as these two, so that as many parameters work for a token in both. Beside them stand n-grams that are
counted on the same tokens.

It can be run in pieces: what is finished is kept (`kept.py`).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import learns
import torch
from harness import DATA, Benchmark
from kept import Kept
from learns import ngram_losses, ours, prepared_run

VOCAB_SIZE = 4096
STEPS, QUICK_STEPS = 1500, 6
HELD_OUT_TOKENS, QUICK_HELD_OUT_TOKENS = 60_000, 8_000
EXPERT_SIZE, ACTIVE, EXPERTS = 192, 2, 8
COMMON = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"base": "new:tiny", "shape": {**COMMON, "intermediate_size": ACTIVE * EXPERT_SIZE}},
    "moe": {
        "base": "new:moe-custom",
        "shape": {
            **COMMON,
            "head_dim": 32,
            "num_experts": EXPERTS,
            "num_active_experts": ACTIVE,
            "expert_size": EXPERT_SIZE,
        },
        "experts": {"load_balancing_loss_coef": 0.01, "z_loss_coef": 0.001},
    },
}
# Over the last steps of a run: an expert that is idle in one step may have had tokens in the next.
LAST_STEPS = 100
GOALS = {"moe_vs_dense": {"max": 1.0}, "moe_vs_unigram": {"max": 0.75}, "dead_experts": {"max": 0.0}}
SOURCES = ("layers/*.py", "models/mixture.py", "models/build.py", "training/loop.py", "training/methods/pretrain.py")


def recipe(model: str, place: Path, steps: int, held_out_tokens: int) -> dict[str, Any]:
    """The run of one of the models; all but the model is the same, and most of it as in `learns.py`."""
    plain = learns.recipe(str(place), steps, held_out_tokens)
    plain["train"]["warmup_steps"] = min(50, steps // 2)
    return plain | {"name": model, "held_out": {"share": 0.04}} | MODELS[model]


def make_shards(folder: Path) -> Path:
    """Texts and programs as shards, in rows of one length; made once."""
    from nightschool.data.shards.tokenize import tokenize, train_tokenizer

    place, programs = folder / "shards", folder / "programs.jsonl"
    texts = sorted((DATA / "text").glob("*.txt"))
    code = [json.loads(line) for line in _lines("mbpp")], [json.loads(line) for line in _lines("humaneval")]
    if not texts or not any(code):
        sys.exit(
            f"This benchmark reads texts and programs below {DATA.name}/text and {DATA.name}/code; there are none."
        )
    if not place.exists():
        documents = [f'"""{row["text"]}"""\n{row["code"]}\n' for row in code[0]]
        documents += [row["prompt"] + row["canonical_solution"] for row in code[1]]
        programs.write_text("".join(json.dumps({"text": text.replace("\r\n", "\n")}) + "\n" for text in documents))
        files = [*texts, programs]
        tokenize(files, place, train_tokenizer(files, f"train:bpe-{VOCAB_SIZE}"), row_tokens=learns.SEQ_LEN)
    return place


def _lines(name: str) -> list[str]:
    path = DATA / "code" / f"{name}.jsonl"
    return path.read_text("utf-8").splitlines() if path.exists() else []


def train(plain: dict[str, Any]) -> dict[str, Any]:
    """What is shown of one run. Where in some step every expert had a token, none is dead."""
    with tempfile.TemporaryDirectory() as home:
        outcome = ours(plain, Path(home))
    rows = outcome["rows"]
    last = [row for row in rows[-LAST_STEPS:] if "dead_experts" in row]
    return {
        "bits_per_byte": rows[-1]["heldout_bits_per_byte"],
        "heldout_loss": rows[-1]["heldout_loss"],
        "tokens": rows[-1]["tokens_trained_total"],
        "cpu_minutes": outcome["cpu_seconds"] / 60,
        "dead_experts": min((row["dead_experts"] for row in last), default=0.0),
        "idle_in_a_step": max((row["dead_experts"] for row in last), default=0.0),
        "router_entropy": sum(row["expert_router_entropy"] for row in last) / len(last) if last else 0.0,
        "load_balancing_loss": sum(row["load_balancing_loss"] for row in last) / len(last) if last else 0.0,
    }


def parameters(model: str) -> tuple[int, int]:
    """All of a model, and those that work for a token."""
    from nightschool.models.build import build_model
    from nightschool.models.cost import count_parameters

    entry = MODELS[model]
    count = count_parameters(build_model(entry["base"], VOCAB_SIZE, 0, shape=entry["shape"]))
    return count.total, count.active


def main() -> None:
    bench = Benchmark("moe_learns", "Does a mixture learn more than a dense model of as many active parameters?", GOALS)
    torch.set_num_threads(1)
    steps = QUICK_STEPS if bench.quick else STEPS
    held_out_tokens = QUICK_HELD_OUT_TOKENS if bench.quick else HELD_OUT_TOKENS
    package = Path(__file__).resolve().parents[1] / "src" / "nightschool"
    sources = [Path(__file__), *(path for pattern in SOURCES for path in package.glob(pattern))]
    kept = Kept("moe_learns", {"steps": steps, "held_out_tokens": held_out_tokens}, sources)
    place = make_shards(kept.folder)

    def counted() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as home:
            prepared = prepared_run(recipe("dense", place, 1, held_out_tokens), Path(home))
        bytes_per_token = prepared._heldout_bytes_per_token()
        return {name: loss / math.log(2) / bytes_per_token for name, loss in ngram_losses(prepared).items()}

    ngrams = kept.once("ngrams", counted)
    bench.table([(name, f"{value:.4f} bits a byte") for name, value in ngrams.items()])
    found: dict[str, dict[str, Any]] = {}
    for model in MODELS:
        found[model] = kept.once(
            model,
            lambda model=model: train(recipe(model, place, steps, held_out_tokens)),
        )
        total, active = parameters(model)
        bench.table(
            [
                (
                    model,
                    f"{found[model]['bits_per_byte']:.4f} bits a byte, {found[model]['heldout_loss']:.4f} nats a token after {steps} steps, "
                    f"{found[model]['tokens'] / 1e6:.2f} M tokens, {found[model]['cpu_minutes']:.1f} CPU minutes; {total:,} parameters, {active:,} active",
                )
            ]
        )
    moe, dense = found["moe"], found["dense"]
    figures = {
        "moe_bits_per_byte": round(moe["bits_per_byte"], 4),
        "dense_bits_per_byte": round(dense["bits_per_byte"], 4),
        "unigram_bits_per_byte": round(ngrams["unigram"], 4),
        "trigram_bits_per_byte": round(ngrams["trigram"], 4),
        "router_entropy": round(moe["router_entropy"], 3),
        "load_balancing_loss": round(moe["load_balancing_loss"], 3),
        "idle_in_a_step": moe["idle_in_a_step"],
        "cpu_minutes": round(moe["cpu_minutes"] + dense["cpu_minutes"], 1),
        "steps": steps,
    }
    if not bench.quick:  # nothing is learned in a few steps
        figures |= {
            "moe_vs_dense": round(moe["bits_per_byte"] / dense["bits_per_byte"], 4),
            "moe_vs_unigram": round(moe["bits_per_byte"] / ngrams["unigram"], 4),
            "dead_experts": moe["dead_experts"],
        }
    bench.finish(figures)


if __name__ == "__main__":
    main()
