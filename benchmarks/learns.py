"""Does pretraining learn? About fifteen CPU minutes on English texts, against n-grams and against a reference loop.

One thread, so that a busy machine changes the time and not the outcome.

The n-grams are counted on the same training tokens: interpolated Kneser-Ney, with the discounts estimated from the counts. The
reference is a plain PyTorch loop over the model of transformers, with the same seed, order and settings: its loss must be ours.
"""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import DATA, Benchmark

VOCAB_SIZE, SEQ_LEN, BATCH = 8192, 256, 8
SHAPE = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "tie_word_embeddings": True}
STEPS, QUICK_STEPS = 1900, 10
REFERENCE_STEPS = 200
GOALS = {"bits_per_byte_vs_trigram": {"max": 1.0}, "reference_difference": {"max": 1e-3}}


def recipe(place: str, steps: int, held_out_tokens: int = 60_000) -> dict[str, Any]:
    """The run that ours and the reference do."""
    return {
        "name": "learns",
        "base": "new:neox-tiny",
        "method": "pretrain",
        "shape": SHAPE,
        "data": [{"path": place}],
        "held_out": {"share": 0.02},
        "pretrain": {"held_out_tokens": held_out_tokens, "loss_across_documents": True, "sample_tokens": 0},
        "train": {
            "max_steps": steps,
            "max_seq_len": SEQ_LEN,
            "batch_size": BATCH,
            "accumulation_steps": 1,
            "learning_rate": 3e-3,
            "warmup_steps": 50,
            "min_lr_ratio": 0.05,
            "weight_decay": 0.1,
            "beta2": 0.95,
            "max_grad_norm": 1.0,
            "dtype": "fp32",
            "num_threads": 1,
            "log_every": 1,
            "evaluate_every": "500 steps",
        },
        "checkpoints": {"every": "500 steps", "keep": {"last": 1}},
        "serve": {"promote": "never"},
    }


def prepared_run(plain: dict[str, Any], home: Path) -> Any:
    """Model, batches and optimizer settings of the recipe."""
    from nightschool.config.recipe import Recipe
    from nightschool.store.home import Home
    from nightschool.training.methods.prepared import Setup
    from nightschool.training.methods.pretrain import Pretrain

    return Pretrain.prepare(Setup(Recipe.model_validate(plain), Home(home), Path.cwd()))


def ours(plain: dict[str, Any], home_path: Path) -> dict[str, Any]:
    """A whole run in a process of its own; its rows of metrics."""
    from nightschool.events import read_events
    from nightschool.store.home import Home
    from nightschool.store.runs import RunStore

    home = Home(home_path)
    home.ensure()
    run = RunStore(home).create(plain, name="learns")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "nightschool.training.run", "--home", str(home_path), "--run", run.id],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        sys.exit(f"the run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"rows": list(read_events(run.metrics_path)), "cpu_seconds": cpu_seconds}


def reference(plain: dict[str, Any], home: Path, steps: int) -> list[float]:
    """Plain PyTorch: the model's own loss, torch's AdamW, a rate by formula."""
    from nightschool.models.build import build_model

    prepared = prepared_run(plain, home)
    train = prepared.recipe.train
    model = build_model(prepared.recipe.base, prepared.loaded.vocab_size, train.seed, shape=SHAPE)
    model.train()
    embeddings = {id(model.get_input_embeddings().weight)}
    decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    rest = [p for p in model.parameters() if p.ndim < 2 or id(p) in embeddings]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
    )
    losses = []
    for step in range(steps):
        place = (step * BATCH) % prepared.task.epoch_length(0)
        batch = prepared.task.batch(step * BATCH // prepared.task.epoch_length(0), place)
        logits = model(input_ids=batch.input_ids.view(-1, SEQ_LEN), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        total, warm = train.max_steps, train.warmup_steps
        progress = (step - warm) / (total - warm)
        cosine = train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
        rate = train.learning_rate * ((step + 1) / warm if step < warm else cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class KneserNey:
    """Interpolated Kneser-Ney up to trigrams, vectorized over NumPy; one discount an order, from the counts of counts."""

    def __init__(self, streams: list[np.ndarray], vocab_size: int) -> None:
        self.v = vocab_size
        pairs = np.concatenate([s[:-1].astype(np.int64) * vocab_size + s[1:] for s in streams])
        triples = np.concatenate(
            [(s[:-2].astype(np.int64) * vocab_size + s[1:-1]) * vocab_size + s[2:] for s in streams]
        )
        self.unigram_counts = np.bincount(np.concatenate(streams), minlength=vocab_size)
        self.pair_keys, self.pair_counts = np.unique(pairs, return_counts=True)
        self.triple_keys, self.triple_counts = np.unique(triples, return_counts=True)
        # For Kneser-Ney the lower orders count contexts, not occurrences.
        self.continuation = np.bincount(self.pair_keys % vocab_size, minlength=vocab_size)
        self.pair_continuation_keys, self.pair_continuation = np.unique(
            self.triple_keys % (vocab_size * vocab_size), return_counts=True
        )

    @staticmethod
    def discount(counts: np.ndarray) -> float:
        once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
        return once / (once + 2 * twice)

    @staticmethod
    def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)

    def unigram(self, w: np.ndarray) -> np.ndarray:
        counts = self.unigram_counts + 0.5
        return counts[w] / counts.sum()

    def _base(self, w: np.ndarray) -> np.ndarray:
        d, total = 0.75, self.continuation.sum()
        kinds = np.count_nonzero(self.continuation)
        return np.maximum(self.continuation[w] - d, 0) / total + d * kinds / total / self.v

    def _order(
        self, keys: np.ndarray, counts: np.ndarray, context: np.ndarray, w: np.ndarray, lower: np.ndarray
    ) -> np.ndarray:
        d = self.discount(counts)
        contexts, starts, kinds = np.unique(keys // self.v, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, starts)
        seen = self.look_up(contexts, totals, context)
        different = self.look_up(contexts, kinds, context)
        own = np.maximum(self.look_up(keys, counts, context * self.v + w) - d, 0)
        known = np.maximum(seen, 1)
        return np.where(seen > 0, own / known + d * different / known * lower, lower)

    def bigram(self, b: np.ndarray, w: np.ndarray) -> np.ndarray:
        return self._order(self.pair_keys, self.pair_counts, b, w, self._base(w))

    def trigram(self, a: np.ndarray, b: np.ndarray, w: np.ndarray) -> np.ndarray:
        lower = self._order(self.pair_continuation_keys, self.pair_continuation, b, w, self._base(w))
        return self._order(self.triple_keys, self.triple_counts, a * self.v + b, w, lower)


def ngram_losses(prepared: Any) -> dict[str, float]:
    """Nats per held-out token of unigrams, bigrams and trigrams counted on what is trained."""
    batches = prepared.task.batches
    train = [
        np.append(batches.get(0, place, 1).input_ids[0].numpy(), batches.get(0, place, 1).labels[0, -1:].numpy())
        for place in range(batches.num_sequences)
    ]
    model = KneserNey(train, prepared.loaded.vocab_size)
    sums, count = {"unigram": 0.0, "bigram": 0.0, "trigram": 0.0}, 0
    for place in range(batches.num_held_out):
        batch = batches.held_out(place, 1)
        ids, w = batch.input_ids[0].numpy(), batch.labels[0].numpy()
        # The first place has one token before it, which for the trigram is a bigram.
        p2 = model.bigram(ids, w)
        p3 = np.append(p2[:1], model.trigram(ids[:-1], ids[1:], w[1:]))
        sums["unigram"] -= float(np.log(model.unigram(w)).sum())
        sums["bigram"] -= float(np.log(p2).sum())
        sums["trigram"] -= float(np.log(p3).sum())
        count += len(w)
    return {name: value / count for name, value in sums.items()}


def make_shards(folder: Path) -> Path:
    """The shared English texts as shards."""
    from nightschool.data.shards.tokenize import tokenize, train_tokenizer

    files = sorted((DATA / "text").glob("*.txt"))
    if not files:
        sys.exit(f"This benchmark reads plain texts below {DATA.name}/text beside the checkout; there are none.")
    tokenize(files, folder / "shards", train_tokenizer(files, f"train:bpe-{VOCAB_SIZE}"), row_tokens=SEQ_LEN)
    return folder / "shards"


def main() -> None:
    bench = Benchmark("learns", "Does pretraining learn, and as a reference loop does?", GOALS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        place = make_shards(Path(scratch))
        held_out_tokens = 8_000 if bench.quick else 60_000
        prepared = prepared_run(recipe(str(place), 1, held_out_tokens), Path(scratch) / "home")
        bytes_per_token = prepared._heldout_bytes_per_token()
        bits = {name: loss / math.log(2) / bytes_per_token for name, loss in ngram_losses(prepared).items()}
        bench.table([(name, f"{value:.4f} bits a byte") for name, value in bits.items()])
        steps = QUICK_STEPS if bench.quick else STEPS
        plain = recipe(str(place), steps, held_out_tokens)
        outcome = ours(plain, Path(scratch) / "ours")
        compared = min(steps, REFERENCE_STEPS)
        theirs = reference(plain, Path(scratch) / "home", compared)
    rows = outcome["rows"]
    mine = rows[-1]["heldout_bits_per_byte"]
    difference = max(abs(row["loss"] - other) / other for row, other in zip(rows, theirs, strict=False))
    bench.table(
        [
            (
                "ours",
                f"{mine:.4f} bits a byte after {steps} steps, {rows[-1]['tokens_trained_total'] / 1e6:.1f} M tokens",
            ),
            ("first and last training loss", f"{rows[0]['loss']:.3f} and {rows[-1]['loss']:.3f} nats a token"),
            (f"largest difference of {compared} losses to the reference", f"{difference:.2e}"),
        ]
    )
    bench.finish(
        {
            "bits_per_byte": round(mine, 4),
            **{f"{name}_bits_per_byte": round(value, 4) for name, value in bits.items()},
            "bits_per_byte_vs_trigram": round(mine / bits["trigram"], 4),
            "reference_difference": float(f"{difference:.3g}"),
            "steps": steps,
            "cpu_minutes": round(outcome["cpu_seconds"] / 60, 1),
        }
    )


if __name__ == "__main__":
    main()
