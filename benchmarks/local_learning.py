"""What does local learning cost in loss, and what does it save in bytes and time, against backpropagation?

A dense model of eight layers learns real chats from nothing, the same tokens in the same order, with one block (backpropagation),
two and four. Loss is held out, in nats a token, of the last block. Bytes are those that the process holds of its own (RssAnon)
beyond what it held before the first step; time is that of the processor, on one thread. Recorded, without goals.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from expert_lora import Anonymous, apart
from harness import Benchmark

BLOCKS = (1, 2, 4)
LAYERS, WIDTH, TOKENS = 8, 128, 256


def documents(ids: list[int], count: int) -> list[Any]:
    from nightschool.data.chat.render import Rendered

    rows = [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS, TOKENS)][:count]
    return [Rendered(row, [1.0] * len(row), ["text"] * len(row)) for row in rows]


def run(blocks: int, steps: int, batch_size: int, num_chats: int, seed: int) -> dict[str, float]:
    """Train in this process; its figures."""
    from real_chats import chats, tokenizer

    from nightschool.config.recipe import Train
    from nightschool.data.batches import Batches
    from nightschool.models.build import build_model
    from nightschool.training.distributed.world import ALONE
    from nightschool.training.methods.finetune import FinetuneTask

    torch.set_num_threads(1)
    everything = chats(num_chats)
    learned = tokenizer(everything, vocab_size=2048)
    text = "\n".join(message["content"] for chat in everything for message in chat)
    ids = learned(text)["input_ids"]
    held_ids, ids = ids[: 20 * TOKENS], ids[20 * TOKENS :]
    fields = {
        "model_type": "qwen3", "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }  # fmt: skip
    train = Train(learning_rate=2e-3, weight_decay=0.01, local_blocks=blocks)
    batches = Batches(documents(ids, 10_000), batch_size=batch_size, seed=seed)
    task = FinetuneTask(build_model(fields, len(learned), seed), batches, train)
    task.model.train()
    seconds, anonymous = [], Anonymous()
    before = anonymous.now()
    with anonymous.watching():
        for step in range(steps):
            epoch, place = divmod(step, task.epoch_length(0))
            batch = task.batch(epoch, place)
            started = time.process_time()
            task.accumulate([batch], batch.loss_units)
            rate = train.learning_rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
            task.update(rate, 1.0, None, ALONE)
            seconds.append(time.process_time() - started)
    held_out = Batches(documents(held_ids, 19), batch_size=4, seed=0)
    return {
        "loss": task.heldout_loss(held_out)[0],
        "peak": float(anonymous.peak - before),
        "seconds": statistics.median(seconds[1:]),
    }


def main() -> None:
    bench = Benchmark("local_learning", "backpropagation against local blocks: held-out loss, bytes, time", {})
    steps, batch_size, num_chats, seeds = (8, 2, 300, (0,)) if bench.quick else (200, 4, 3000, (0, 1))
    of = {
        blocks: [apart(run, blocks, steps, batch_size, num_chats, seed) for seed in seeds]
        for blocks in (BLOCKS[:2] if bench.quick else BLOCKS)
    }
    figures: dict[str, float] = {}
    rows = []
    for blocks, results in of.items():
        loss, peak, seconds = (statistics.mean(one[key] for one in results) for key in ("loss", "peak", "seconds"))
        rows.append(
            (f"{blocks} blocks", f"loss {loss:.4f}   peak {peak / 1e6:6.0f} MB   {1000 * seconds:6.0f} ms a step")
        )
        figures[f"loss_{blocks}"] = loss
        if blocks > 1:
            gaps = [ours["loss"] - whole["loss"] for ours, whole in zip(results, of[1], strict=True)]
            figures[f"loss_gap_{blocks}"] = statistics.mean(gaps)
            figures[f"loss_gap_spread_{blocks}"] = max(gaps) - min(gaps)
            figures[f"peak_to_backpropagation_{blocks}"] = peak / statistics.mean(one["peak"] for one in of[1])
            figures[f"step_time_to_backpropagation_{blocks}"] = seconds / statistics.mean(
                one["seconds"] for one in of[1]
            )
    bench.table(rows)
    bench.finish(figures)


if __name__ == "__main__":
    main()
