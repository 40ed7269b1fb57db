"""How many tokens a second does the engine generate for 16 clients, against three ways that transformers offers?"""

from __future__ import annotations

import statistics
from typing import Any

import real_model
import torch
from harness import Benchmark, median_ratio
from real_chats import qwen3
from serving_peers import Alone, Ours, StaticBatches, TransformersContinuous, mixed_load, timed

NUM_CLIENTS = 16


def small(quick: bool) -> Any:
    """A random Qwen3-shaped model."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    return qwen3(8192 if quick else 32768, num_hidden_layers=4 if quick else 8, **shape).eval()


def main() -> None:
    bench = Benchmark(
        "serving_throughput",
        "Generated tokens per second, 16 clients, mixed prompt and answer lengths, same tokens out",
        {
            "vs_one_at_a_time": {"min": 4.5},
            "vs_static_batches": {"min": 1.25},
            "vs_transformers_continuous": {"min": 1.1},
        },
        has_real=True,
    )
    torch.set_num_threads(2)
    model = real_model.load().model if bench.is_real else small(bench.quick)
    vocab_size = model.config.vocab_size
    num_requests = (16 if bench.quick else 32) if bench.is_real else (32 if bench.quick else 64)
    load = mixed_load(num_requests, vocab_size)
    # What a real model computes first is no slower than the rest, so a few requests warm it up.
    warm = mixed_load(4 if bench.is_real and bench.quick else NUM_CLIENTS, vocab_size, seed=1)
    contestants = {
        "alone": Alone(model),
        "static": StaticBatches(model, NUM_CLIENTS),
        "ours": Ours(model, NUM_CLIENTS),
    }
    for contestant in contestants.values():
        timed(contestant, warm, None)
    # Its answers are those that all others have to give.
    first_rate, expected = timed(contestants["alone"], load, None)
    rates: dict[str, list[float]] = {"alone": [first_rate], "static": [], "ours": [], "continuous": []}
    for number in range((1 if bench.is_real else 2) if bench.quick else 5):
        for name, contestant in contestants.items():
            if (name, number) != ("alone", 0):
                rates[name].append(timed(contestant, load, expected)[0])
        # The peer switches the model's attention while it lives, so it lives only for its own turn.
        implementation = model.config._attn_implementation
        continuous = TransformersContinuous(model, NUM_CLIENTS)
        timed(continuous, warm, None)
        rates["continuous"].append(timed(continuous, load, expected)[0])
        continuous.close()
        model.set_attn_implementation(implementation)
    contestants["ours"].close()
    bench.table([(name, f"{statistics.median(values):8.0f} tokens/s") for name, values in rates.items()])
    bench.finish(
        {
            "vs_one_at_a_time": round(median_ratio(rates["ours"], rates["alone"]), 3),
            "vs_static_batches": round(median_ratio(rates["ours"], rates["static"]), 3),
            "vs_transformers_continuous": round(median_ratio(rates["ours"], rates["continuous"]), 3),
        }
    )


if __name__ == "__main__":
    main()
