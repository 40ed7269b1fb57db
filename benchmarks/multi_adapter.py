"""What do eight adapters in one batch cost, against the base alone and against two ways that PEFT offers?

Everything runs on one thread, and speeds are new tokens a second of processor time, so that a busy machine counts less.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import real_model
import torch
from harness import Benchmark, interleave, median_ratio
from real_chats import qwen3
from serving_peers import Answers, Load, Ours, mixed_load

NUM_CLIENTS, NUM_ADAPTERS, RANK = 16, 8, 16
# No plain numbers: in PEFT's file names they would be taken for those of layers.
NAMES = [f"adapter-{number}" for number in range(NUM_ADAPTERS)]
TARGETS = {"q,v": ["q_proj", "v_proj"], "all linear layers": "all-linear"}


def small(quick: bool) -> Any:
    """A random Qwen3-shaped model of 40 million parameters, 12 million if quick."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    return qwen3(
        4096 if quick else 16384, num_hidden_layers=2 if quick else 8, tie_word_embeddings=True, **shape
    ).eval()


def adapted(model: Any, targets: Any) -> Any:
    """The model with eight PEFT adapters, each of which changes what it answers. The model is changed in place."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        wrapped.add_adapter(name, config)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if ".lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=chance) * 0.2 / weight.shape[1] ** 0.5)
    return wrapped.eval()


class PeftSwitching:
    """`set_adapter` and `generate`, one request after the other."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    @torch.inference_mode()
    def __call__(self, load: Load) -> Answers:
        answers = []
        for place, (prompt, count) in enumerate(zip(load.prompts, load.answer_tokens, strict=True)):
            self.wrapped.set_adapter(NAMES[place % NUM_ADAPTERS])
            ids = torch.tensor([prompt])
            out = self.wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **_greedy(count))
            answers.append(out[0, len(prompt) :].tolist())
        return answers


class PeftMixed:
    """`generate` with `adapter_names` on batches of 16, padded on the left; each takes as long as its longest answer."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    @torch.inference_mode()
    def __call__(self, load: Load) -> Answers:
        answers: Answers = []
        for start in range(0, len(load.prompts), NUM_CLIENTS):
            prompts = load.prompts[start : start + NUM_CLIENTS]
            counts = load.answer_tokens[start : start + NUM_CLIENTS]
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            names = [NAMES[(start + place) % NUM_ADAPTERS] for place in range(len(prompts))]
            out = self.wrapped.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **_greedy(max(counts)))
            answers += [row[width : width + count].tolist() for row, count in zip(out, counts, strict=True)]
        return answers


def _greedy(count: int) -> dict[str, Any]:
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}


def opened(ours: Ours, wrapped: Any, label: str) -> list[Any]:
    """The bindings of an engine's base with the same adapters, read from PEFT's own files."""
    from nightschool.models.unmerged import UnmergedAdapter, read_lora

    with tempfile.TemporaryDirectory() as name:
        wrapped.save_pretrained(name, save_embedding_layers=False)
        folders = [Path(name) / adapter for adapter in NAMES]
        return [
            ours.engine.open(UnmergedAdapter(f"{label} {n}", ours.engine.loaded.tokenizer, read_lora(folder)))
            for n, folder in enumerate(folders)
        ]


def main() -> None:
    bench = Benchmark(
        "multi_adapter",
        "16 concurrent requests over 8 adapters of rank 16, against the base alone and against PEFT",
        {
            "qv_vs_base": {"min": 0.95},
            "all_linear_vs_base": {"min": 0.8},
            "vs_peft_switching": {"min": 4},
            "vs_peft_mixed": {"min": 1.25},
            "answers_unlike_alone": {"max": 0},
            "answers_unlike_peft": {"max": 0},
        },
        has_real=True,
    )
    torch.set_num_threads(1)
    model = real_model.load().model if bench.is_real else small(bench.quick)
    ours = Ours(model, NUM_CLIENTS, prefix_cache=False)
    load = mixed_load(NUM_CLIENTS * (1 if bench.quick or bench.is_real else 3), model.config.vocab_size)
    answers: dict[str, Answers] = {}

    def speed(name: str, answer: Callable[[], Answers]) -> Callable[[], float]:
        def run() -> float:
            started = time.process_time()
            answers[name] = answer()
            return load.total / (time.process_time() - started)

        return run

    base = speed("base", lambda: ours(load))
    rates: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    unlike = 0
    for label, targets in TARGETS.items():
        wrapped = adapted(model, targets)
        bindings = opened(ours, wrapped, label)
        rounds = interleave(
            {"base": base, label: speed(label, lambda bindings=bindings: ours(load, bindings))},
            (1 if bench.is_real else 3) if bench.quick else 7,
        )
        figures["qv_vs_base" if label == "q,v" else "all_linear_vs_base"] = median_ratio(rounds[label], rounds["base"])
        ours.num_clients = 1
        alone = ours(load, bindings)
        ours.num_clients = NUM_CLIENTS
        unlike += sum(a != b for a, b in zip(alone, answers[label], strict=True))
        assert answers[label] != answers["base"], "the adapters change nothing"
        if label != "q,v":
            peers = {
                "ours": speed("ours", lambda bindings=bindings: ours(load, bindings)),
                "PEFT, switching": speed("switching", lambda wrapped=wrapped: PeftSwitching(wrapped)(load)),
                "PEFT, mixed": speed("mixed", lambda wrapped=wrapped: PeftMixed(wrapped)(load)),
            }
            rates = interleave(peers, 1 if bench.quick else 3)
            figures["vs_peft_switching"] = median_ratio(rates["ours"], rates["PEFT, switching"])
            figures["vs_peft_mixed"] = median_ratio(rates["ours"], rates["PEFT, mixed"])
            figures["answers_unlike_peft"] = sum(
                a != b for a, b in zip(answers["ours"], answers["switching"], strict=True)
            )
        rates |= {f"ours, {name}": values for name, values in rounds.items()}
        for binding in bindings:
            ours.engine.retire(binding)
        model = wrapped.unload()
    ours.close()
    figures["answers_unlike_alone"] = unlike
    bench.table([(name, f"{statistics.median(values):8.0f} tokens/s") for name, values in rates.items()])
    bench.finish({name: round(value, 3) for name, value in figures.items()})


if __name__ == "__main__":
    main()
