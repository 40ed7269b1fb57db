"""The load of the serving benchmarks, and each way of answering it: ours and the peers.

All answer the same prompts greedily with the same numbers of new tokens, on the same model in fp32.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Load:
    """Prompts of mixed lengths, and how many tokens each answer has."""

    prompts: list[list[int]]
    answer_tokens: list[int]

    @property
    def total(self) -> int:
        """New tokens of all answers together."""
        return sum(self.answer_tokens)


Answers = list[list[int]]


def mixed_load(num_requests: int, vocab_size: int, seed: int = 0) -> Load:
    """Prompts of 16 to 96 tokens and answers of 8 to 64, uniformly mixed."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(4, vocab_size) for _ in range(chance.randint(16, 96))] for _ in range(num_requests)]
    return Load(prompts, [chance.randint(8, 64) for _ in range(num_requests)])


def timed(answer: Callable[[Load], Answers], load: Load, expected: Answers | None) -> tuple[float, Answers]:
    """New tokens per wall second, and the answers; stops if they are not the expected ones."""
    started = time.perf_counter()
    answers = answer(load)
    seconds = time.perf_counter() - started
    assert [len(a) for a in answers] == load.answer_tokens, "a contestant gave too few or too many tokens"
    if expected is not None:
        different = sum(a != b for a, b in zip(answers, expected, strict=True))
        assert different == 0, f"{different} of {len(answers)} answers differ from one-at-a-time generate"
    return load.total / seconds, answers


class Alone:
    """`generate`, one request after the other."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def __call__(self, load: Load) -> Answers:
        answers = []
        for prompt, count in zip(load.prompts, load.answer_tokens, strict=True):
            ids = torch.tensor([prompt])
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            answers.append(out[0, len(prompt) :].tolist())
        return answers


class StaticBatches:
    """`generate` on batches of `num_clients`, padded on the left; each batch takes as long as its longest answer."""

    def __init__(self, model: Any, num_clients: int) -> None:
        self.model, self.num_clients = model, num_clients

    @torch.inference_mode()
    def __call__(self, load: Load) -> Answers:
        answers: Answers = []
        for start in range(0, len(load.prompts), self.num_clients):
            prompts = load.prompts[start : start + self.num_clients]
            counts = load.answer_tokens[start : start + self.num_clients]
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(counts),
                min_new_tokens=max(counts),
                do_sample=False,
                pad_token_id=0,
            )
            answers += [row[width : width + count].tolist() for row, count in zip(out, counts, strict=True)]
        return answers


class TransformersContinuous:
    """transformers' own continuous batching, its manager started once, at most `num_clients` requests in flight."""

    def __init__(self, model: Any, num_clients: int) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        self.num_clients = num_clients
        self.manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=64, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=64,
                page_size=32,
                max_batch_tokens=2048,
                max_requests_per_batch=num_clients,
                allow_block_sharing=False,
            ),
            workload_hints=WorkloadHints(max_prompt_length=96, max_generated_length=64, num_requests=num_clients),
        )
        self.manager.start()

    def __call__(self, load: Load) -> Answers:
        answers: dict[int, list[int]] = {}
        places: dict[str, int] = {}
        waiting = list(range(len(load.prompts)))[::-1]
        while len(answers) < len(load.prompts):
            while waiting and len(places) < self.num_clients:
                place = waiting.pop()
                name = self.manager.add_request(
                    load.prompts[place],
                    request_id=f"{id(load)}-{time.monotonic_ns()}-{place}",
                    max_new_tokens=load.answer_tokens[place],
                )
                places[name] = place
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                answers[places.pop(result.request_id)] = list(result.generated_tokens)
        return [answers[place] for place in range(len(load.prompts))]

    def close(self) -> None:
        """Stop the manager's thread."""
        self.manager.stop(block=True)


class Ours:
    """Our engine, with one thread per client: each sends its next request when its last one is answered."""

    def __init__(self, model: Any, num_clients: int, **engine: Any) -> None:
        from nightschool.engine.engine import Engine

        self.num_clients = num_clients
        self.engine = Engine(loaded_model(model), "bench@20260101_000000", num_rows=num_clients, **engine)

    def __call__(self, load: Load, bindings: Sequence[Any] = ()) -> Answers:
        """The answers of the base, or of each of the bindings in turn."""
        from nightschool.engine.request import GenerationRequest, SamplingParams

        answers: dict[int, list[int]] = {}
        places = iter(range(len(load.prompts)))
        lock = threading.Lock()

        def client() -> None:
            while True:
                with lock:
                    place = next(places, None)
                if place is None:
                    return
                params = SamplingParams(max_new_tokens=load.answer_tokens[place], temperature=0, ignore_eos=True)
                binding = bindings[place % len(bindings)] if bindings else self.engine.binding
                request_id = f"{place}-{time.monotonic_ns()}"
                handle = self.engine.submit(GenerationRequest(request_id, binding, load.prompts[place], params))
                answers[place] = list(handle.result().token_ids)

        clients = [threading.Thread(target=client) for _ in range(self.num_clients)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        return [answers[place] for place in range(len(load.prompts))]

    def close(self) -> None:
        """Stop the engine's thread."""
        self.engine.close()


def loaded_model(model: Any) -> Any:
    """A random model as the registry would hand it to the engine, with a byte-level tokenizer."""
    from nightschool.data.tokenizer import train_bpe
    from nightschool.models.load import LoadedModel

    tokenizer = train_bpe(["a benchmark needs no words"], vocab_size=300)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        ref="bench",
        base_ref="bench",
        path=None,
        context_tokens=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size,
        tokenizer_size=len(tokenizer),
    )
