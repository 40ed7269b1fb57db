"""What does the engine add to a token, for one client, over a bare forward with a cache and an argmax?"""

from __future__ import annotations

import statistics
import time
from typing import Any

import real_model
import torch
from harness import Benchmark, interleave
from real_chats import qwen3
from serving_peers import Load, Ours, mixed_load


class Bare:
    """The least a token can cost: one forward with transformers' own cache, one argmax, nothing else."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def __call__(self, load: Load) -> list[list[int]]:
        from transformers import DynamicCache

        answers = []
        for prompt, count in zip(load.prompts, load.answer_tokens, strict=True):
            cache = DynamicCache(config=self.model.config)
            ids, answer = torch.tensor([prompt]), []
            for _ in range(count):
                logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                answer.append(int(logits[0, -1].argmax()))
                ids = torch.tensor([[answer[-1]]])
            answers.append(answer)
        return answers


def main() -> None:
    bench = Benchmark(
        "serving_latency",
        "Added time per token over a bare cached forward, one client",
        {"added_share": {"max": 0.10}},
        has_real=True,
    )
    torch.set_num_threads(1)
    if bench.is_real:
        model = real_model.load().model
    else:
        shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
        model = qwen3(8192, num_hidden_layers=8, **shape).eval()
    vocab_size = model.config.vocab_size
    bare, ours = Bare(model), Ours(model, 1)
    rounds = (3 if bench.is_real else 6) if bench.quick else 20
    # Another prompt each round, so that the prefix cache has nothing to give.
    loads = [mixed_load(2, vocab_size, seed=seed) for seed in range(rounds + 1)]
    seconds_per_token: dict[str, list[float]] = {}
    turn = {"bare": 0, "ours": 0}

    def contestant(name: str, answer: Any) -> Any:
        def measure() -> float:
            load = loads[turn[name]]
            turn[name] += 1
            started = time.perf_counter()
            answers[name] = answer(load)
            return (time.perf_counter() - started) / load.total

        return measure

    answers: dict[str, list[list[int]]] = {}
    contestants = {"bare": contestant("bare", bare), "ours": contestant("ours", ours)}
    interleave(contestants, 1)
    seconds_per_token = interleave(contestants, rounds)
    assert answers["bare"] == answers["ours"], "the engine's tokens differ from the bare forward's"
    ours.close()
    added = (
        statistics.median(a / b for a, b in zip(seconds_per_token["ours"], seconds_per_token["bare"], strict=True)) - 1
    )
    bench.table(
        [(name, f"{1000 * statistics.median(values):.2f} ms/token") for name, values in seconds_per_token.items()]
    )
    bench.finish({"added_share": round(added, 4)})


if __name__ == "__main__":
    main()
