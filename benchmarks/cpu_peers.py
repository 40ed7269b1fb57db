"""How fast is a real model served on this CPU, against what people would take instead?

SmolLM2-135M-Instruct from one GGUF file: our engine and transformers' continuous batching on its weights unpacked to
fp32, llama.cpp and OpenVINO GenAI on the file itself, as they would be used. Every contestant answers the same questions
greedily with the same numbers of new tokens, for one client and for sixteen. Peers of other arithmetic may give other
tokens; how many are ours is told. Peers that are not installed (extra `peers`) are told as missing.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import real_model
import torch
from harness import Benchmark
from serving_peers import Answers, Load, Ours, TransformersContinuous

NUM_CLIENTS = 16
NUM_THREADS = 2
CONTEXT_TOKENS = 256
QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "How do I make a cup of tea?",
    "Name three animals that live in the forest.",
    "What is the difference between a lake and a river?",
    "Tell me a story about a dog and a bird.",
    "Why do leaves fall in autumn?",
    "Give me a recipe for pancakes.",
    "What does a doctor do all day?",
    "How many legs does a spider have?",
    "Write a letter to a friend about the holidays.",
    "What is music good for?",
    "Describe a small town in winter.",
    "How does a bicycle work?",
    "Which planet is the largest?",
)


def questions(tokenizer: Any, num_requests: int) -> Load:
    """The questions as the model sees them, and answers of 8 to 64 tokens."""
    from nightschool.data.chat.render import render_prompt
    from nightschool.data.example import Message

    chance = random.Random(0)
    asked = [QUESTIONS[place % len(QUESTIONS)] for place in range(num_requests)]
    prompts = [render_prompt(tokenizer, [Message("user", question)]) for question in asked]
    return Load(prompts, [chance.randint(8, 64) for _ in prompts])


class LlamaCpp:
    """llama.cpp by its C interface: sequences join and leave one batch, as in its own server."""

    def __init__(self, path: Path, num_clients: int) -> None:
        import llama_cpp

        self.lib, self.num_clients = llama_cpp, num_clients
        llama_cpp.llama_backend_init()
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        self._keep = quiet
        llama_cpp.llama_log_set(quiet, None)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT_TOKENS * num_clients
        params.n_batch = params.n_ubatch = 2048
        params.n_seq_max = num_clients
        params.n_threads = params.n_threads_batch = NUM_THREADS
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def __call__(self, load: Load) -> Answers:
        answers: Answers = [[] for _ in load.prompts]
        waiting = list(range(len(load.prompts)))[::-1]
        rows: dict[int, int] = {}
        while waiting or rows:
            self.batch.n_tokens = 0
            places: dict[int, int] = {}
            for row in range(self.num_clients):
                if row in rows:
                    self._add(answers[rows[row]][-1:], self._position(load, answers, rows[row]), row)
                elif waiting:
                    rows[row] = waiting.pop()
                    self._add(load.prompts[rows[row]], 0, row)
                else:
                    continue
                places[row] = self.batch.n_tokens - 1
            assert self.lib.llama_decode(self.context, self.batch) == 0, "llama.cpp could not decode"
            for row, place in places.items():
                request = rows[row]
                answers[request].append(self._likeliest(place))
                if len(answers[request]) == load.answer_tokens[request]:
                    self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), row, -1, -1)
                    del rows[row]
        return answers

    @staticmethod
    def _position(load: Load, answers: Answers, request: int) -> int:
        return len(load.prompts[request]) + len(answers[request]) - 1

    def _add(self, tokens: list[int], position: int, row: int) -> None:
        for offset, token in enumerate(tokens):
            place = self.batch.n_tokens
            self.batch.token[place] = token
            self.batch.pos[place] = position + offset
            self.batch.n_seq_id[place] = 1
            self.batch.seq_id[place][0] = row
            self.batch.logits[place] = offset == len(tokens) - 1
            self.batch.n_tokens += 1

    def _likeliest(self, place: int) -> int:
        import numpy as np

        logits = self.lib.llama_get_logits_ith(self.context, place)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def close(self) -> None:
        """Free what C holds."""
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


class OpenVino:
    """OpenVINO GenAI's continuous batching, which reads the GGUF file itself."""

    def __init__(self, path: Path, num_clients: int) -> None:
        import openvino_genai

        self.genai, self.num_clients = openvino_genai, num_clients
        settings = openvino_genai.SchedulerConfig()
        settings.cache_size = 1
        settings.max_num_seqs = num_clients
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(path), settings, "CPU", {"INFERENCE_NUM_THREADS": NUM_THREADS}
        )

    def __call__(self, load: Load) -> Answers:
        import numpy as np
        import openvino

        prompts = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in load.prompts]
        wanted = []
        for count in load.answer_tokens:
            config = self.genai.GenerationConfig()
            config.max_new_tokens, config.do_sample, config.ignore_eos = count, False, True
            wanted.append(config)
        if self.num_clients > 1:
            return [list(done.m_generation_ids[0]) for done in self.pipeline.generate(prompts, wanted)]
        pairs = zip(prompts, wanted, strict=True)
        return [list(self.pipeline.generate([prompt], [one])[0].m_generation_ids[0]) for prompt, one in pairs]

    def close(self) -> None:
        """Nothing to free by hand."""


def contestants(path: Path, model: Any) -> dict[str, Callable[[int], Any]]:
    """Everyone who can take part here, by the number of clients."""
    found: dict[str, Callable[[int], Any]] = {
        "ours": lambda clients: Ours(model, clients),
        "transformers": lambda clients: TransformersContinuous(model, clients),
    }
    if find_spec("llama_cpp"):
        found["llama_cpp"] = lambda clients: LlamaCpp(path, clients)
    if find_spec("openvino_genai"):
        found["openvino"] = lambda clients: OpenVino(path, clients)
    return found


def rate(contestant: Any, load: Load) -> tuple[float, Answers]:
    """New tokens per wall second, and the answers."""
    started = time.perf_counter()
    answers = contestant(load)
    seconds = time.perf_counter() - started
    assert [len(answer) for answer in answers] == load.answer_tokens, "a contestant gave too few or too many tokens"
    return load.total / seconds, answers


def main() -> None:
    bench = Benchmark(
        "cpu_peers",
        "Generated tokens per second of a real model on this CPU, one client and sixteen: ours as a multiple of each peer",
        {},
    )
    bench.is_real = True  # whoever asks
    torch.set_num_threads(NUM_THREADS)
    loaded = real_model.load()
    path = real_model.find()
    assert path is not None, "it was loaded"
    everyone = contestants(path, loaded.model)
    missing = sorted({"llama_cpp", "openvino"} - everyone.keys())
    print(f"  missing: {', '.join(missing) or 'nobody'}", flush=True)
    figures: dict[str, float] = {}
    for clients, name in ((1, "one"), (NUM_CLIENTS, "sixteen")):
        load = questions(loaded.tokenizer, (2 if clients == 1 else 16) if bench.quick else (8 if clients == 1 else 48))
        warm = questions(loaded.tokenizer, clients)
        rates: dict[str, list[float]] = {who: [] for who in everyone}
        tokens: dict[str, Answers] = {}
        for _ in range(1 if bench.quick else 5):
            for who, make in everyone.items():
                # A contestant lives for its own turn only: each has threads of its own, and transformers' switches the
                # model's attention while it lives.
                implementation = loaded.model.config._attn_implementation
                contestant = make(clients)
                rate(contestant, warm)
                speed, tokens[who] = rate(contestant, load)
                rates[who].append(speed)
                contestant.close()
                loaded.model.set_attn_implementation(implementation)
        rows = []
        for who, values in rates.items():
            pairs = [
                (ours, theirs)
                for mine, other in zip(tokens["ours"], tokens[who], strict=True)
                for ours, theirs in zip(mine, other, strict=True)
            ]
            same = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
            rows.append(
                (f"{who}, {name}", f"{statistics.median(values):8.1f} tokens/s  {same:.0%} of the tokens are ours")
            )
            if who != "ours":
                ratios = [mine / theirs for mine, theirs in zip(rates["ours"], values, strict=True)]
                figures[f"vs_{who}_{name}"] = round(statistics.median(ratios), 3)
        bench.table(rows)
    bench.finish(figures | {f"{who}_missing": 1 for who in missing})


if __name__ == "__main__":
    main()
