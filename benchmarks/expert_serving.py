"""What do answers cost of a mixture of which few experts are in memory, and how often is one there when its turn comes?

128 experts of 1.5 MB in 4 layers, random ones, two of 32 for each token, and a prompt and 64 tokens of one request at a time. Seconds of the
processor on one thread; the file is warm. Random expert routers like all experts nearly alike, which is the worst case for keeping those that
are used most.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from expert_setups import VOCAB_SIZE
from harness import Benchmark, interleave, median_ratio


def main() -> None:
    from nightschool.data.tokenizer import train_bpe
    from nightschool.engine.pool import EnginePool
    from nightschool.engine.request import GenerationRequest, SamplingParams
    from nightschool.engine.slot import Slot
    from nightschool.models.build import build_model
    from nightschool.models.export import save_version_folder
    from nightschool.store.home import Home
    from nightschool.store.registry import Registry
    from nightschool.store.versions import VersionMetadata

    benchmark = Benchmark("expert_serving", "what do answers cost with few experts in memory?", {})
    torch.set_num_threads(1)
    tokens, rounds = (16, 3) if benchmark.quick else (64, 7)
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_experts": 32, "expert_size": 512}
    words = [" ".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=40)) for seed in range(40)]
    tokenizer = train_bpe(words, VOCAB_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder)).ensure()
        model = build_model("new:moe-tiny", len(tokenizer), 0, shape=shape)
        version = Registry(home).publish(
            "moe", lambda target: save_version_folder(model, tokenizer, target), VersionMetadata()
        )
        chance = random.Random(0)
        settings = {"device": None, "8 of 128": 8, "32 of 128": 32, "64 of 128": 64, "all": 129}
        slots, times, figures = {}, {}, {}

        def asked(name: str) -> float:
            generation = slots[name].current
            prompt = [chance.randrange(3, len(tokenizer)) for _ in range(16)]
            params = SamplingParams(tokens, temperature=1.0, ignore_eos=True)
            request = GenerationRequest("r", generation.binding, prompt, params, keeps_prefix=False)
            started = time.process_time()
            generation.engine.submit(request).result(600)
            return (time.process_time() - started) / tokens

        for name, number in settings.items():
            slots[name] = Slot("moe", EnginePool(home, experts_resident=number))
            slots[name].swap(version.ref)
            asked(name)
        times = interleave({name: (lambda name=name: asked(name)) for name in settings}, rounds)
        rows = []
        for name, seconds in times.items():
            experts = slots[name].current.engine.experts
            hits, misses = (1, 0) if experts is None else experts.store.turns
            resident = 0 if experts is None else experts.store.host_bytes
            rate = hits / (hits + misses)
            rows.append(
                (
                    name,
                    f"{1000 * statistics.median(seconds):.2f} ms a token, {rate:.0%} in memory, {resident / 1e6:.0f} MB",
                )
            )
            key = name.replace(" ", "_")
            if experts is not None:
                figures[f"{key}_to_device"] = median_ratio(seconds, times["device"])
                figures[f"{key}_hit_rate"] = rate
        benchmark.table(rows)
        for slot in slots.values():
            slot.close()
    benchmark.finish(figures)


if __name__ == "__main__":
    main()
