"""What does one more adapter on a resident base take, and how soon does one that lies on the disk answer?

Seconds are those of the processor, on one thread, so that a busy machine counts less; what a clock on the wall said is printed.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import real_model
import torch
from harness import Benchmark
from real_chats import qwen3

RANK, TENANT = 16, "default"
PROMPT = "Which river flows through the town, and how long is it?"


class House:
    """A home with a base and as many adapters on it as wanted, each published with its probes, and what serves them."""

    def __init__(self, path: Path, model: Any, tokenizer: Any, *, most_loaded: int) -> None:
        from nightschool.engine.pool import EnginePool
        from nightschool.engine.slot import Slot
        from nightschool.server.metrics import Metrics
        from nightschool.server.on_demand import OnDemand
        from nightschool.server.served_names import ServedNames
        from nightschool.server.submission import Answering
        from nightschool.store.home import Home
        from nightschool.store.registry import Registry

        self.home = Home(path).ensure()
        self.registry = Registry(self.home)
        self.tokenizer = tokenizer
        self.base = self._publish("base", model, kind="model")
        self.pool = EnginePool(self.home, num_rows=16)
        self.names = ServedNames(
            [Slot("base", self.pool)], OnDemand(lambda name: Slot(name, self.pool), most_loaded), self.registry
        )
        self.answering = Answering(self.names, Metrics(self.names))

    def publish_adapters(self, model: Any, count: int, targets: Any) -> list[str]:
        """Publish and promote adapters; the model is left as it was. Returns their names."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config).eval()
        names = [f"bot-{number}" for number in range(count)]
        for number, name in enumerate(names):
            chance = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for path, weight in wrapped.named_parameters():
                    if ".lora_" in path:
                        weight.copy_(torch.randn(weight.shape, generator=chance) * 0.05 / weight.shape[1] ** 0.5)
            self._publish(name, wrapped, kind="adapter")
        wrapped.unload()
        return names

    def examine(self, names: list[str]) -> None:
        """Have adapters answer their probes in an engine of their own, as the gate does before it promotes one."""
        from nightschool.engine.local_model import local_model, local_pool

        pool = local_pool(self.home, num_rows=16)
        with local_model(self.home, self.base.ref, pool=pool):
            for name in names:
                version = self.registry.resolve(name)
                with local_model(self.home, version.ref, pool=pool) as model:
                    model.prove(version)

    def _publish(self, name: str, model: Any, *, kind: Any) -> Any:
        from nightschool.data.example import Example, Message
        from nightschool.models.export import save_version_folder
        from nightschool.store.versions import VersionMetadata
        from nightschool.training.publish import make_probes

        asked = ("Who are you?", "What is the capital of France?", "Count to five.")
        examples = [Example(messages=(Message("user", one), Message("assistant", "…"))) for one in asked]
        probes = list(make_probes(model, self.tokenizer, examples, 512)) if kind == "adapter" else []
        base = self.base.ref if kind == "adapter" else "bench"
        path = str(self.base.path) if kind == "adapter" else None
        facts = VersionMetadata(kind=kind, method="lora", base=base, probes=probes, context_tokens=2048)
        version = self.registry.publish(
            name, lambda folder: save_version_folder(model, self.tokenizer, folder, base_path=path), facts
        )
        self.registry.promote(name, version.id, by="benchmark")
        return version

    async def first_token(self, name: str) -> tuple[float, float]:
        """Seconds of the processor and on the wall from a request to the first token of its answer."""
        gc.collect()
        processor, wall = time.process_time(), time.perf_counter()
        running = await self.ask(name, 1)
        async for _ in running.events():
            break
        seconds = time.process_time() - processor, time.perf_counter() - wall
        running.cancel()
        return seconds

    async def ask(self, name: str, max_new_tokens: int) -> Any:
        """A request in the making."""
        from nightschool.engine.request import SamplingParams
        from nightschool.server.submission import Ask
        from nightschool.store.principal import LOCAL

        params = SamplingParams(max_new_tokens=1, temperature=0)
        ask = Ask([PROMPT], params, max_new_tokens, max_new_tokens, name, LOCAL)
        return await self.answering.start(ask, f"{name}-{next(_COUNT)}")


_COUNT = itertools.count()


def resident_bytes() -> int:
    """What this process has in memory, after giving back what it does not use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def adapter_bytes(house: House, name: str) -> int:
    """The size of an adapter's own file."""
    return (house.registry.resolve(name).path / "adapter_model.safetensors").stat().st_size


async def growth(house: House, names: list[str]) -> float:
    """Bytes per further adapter ÷ its file, once the base and one adapter are there."""
    for name in names[:2]:
        await house.names.load(name)
    before = resident_bytes()
    for name in names[2:]:
        await house.names.load(name)
    return (resident_bytes() - before) / sum(adapter_bytes(house, name) for name in names[2:])


async def cold(house: House, names: list[str]) -> list[tuple[float, float]]:
    """What the first token of each adapter takes that is not loaded, while its base is."""
    seconds = []
    for name in names:
        await house.names.unload(name)
        seconds.append(await house.first_token(name))
    return seconds


async def zipf(house: House, names: list[str], count: int) -> tuple[int, int]:
    """Errors among `count` requests, of which a few adapters get most, 16 at a time; and how many adapters were asked."""
    chance = random.Random(0)
    weights = [1 / (place + 1) for place in range(len(names))]
    wanted = chance.choices(chance.sample(names, len(names)), weights, k=count)
    errors: Counter[str] = Counter()
    answers: dict[str, set[str]] = {}
    turns = asyncio.Semaphore(16)

    async def one(name: str) -> None:
        async with turns:
            try:
                running = await house.ask(name, 4)
                [answer] = await running.answers()
            except Exception as error:
                errors[str(error)] += 1
                return
            if running.version.name != name:
                errors["an answer of another name"] += 1
            answers.setdefault(name, set()).add(answer.text)

    await asyncio.gather(*map(one, wanted))
    for error, times in errors.items():
        print(f"  {times} × {error}")
    return errors.total() + sum(len(texts) > 1 for texts in answers.values()), len(answers)


async def measure(bench: Benchmark, folder: Path) -> dict[str, float]:
    if bench.is_real:
        loaded = real_model.load()
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        from nightschool.data.tokenizer import train_bpe

        tokenizer = train_bpe(
            [PROMPT, "Who are you? What is the capital of France? Count to five."] * 4, vocab_size=400
        )
        model = qwen3(len(tokenizer), num_hidden_layers=6).eval()
    num_adapters, num_requests = (16, 100) if bench.quick else (200, 1000)
    house = House(folder, model, tokenizer, most_loaded=num_adapters)
    names = house.publish_adapters(model, num_adapters, "all-linear" if not bench.is_real else ["q_proj", "v_proj"])
    # The last ones are not loaded by this. Those of the last that the gate has not examined have yet to answer their probes.
    tried = 5 if bench.quick else 15
    per_file = await growth(house, names[: min(64, num_adapters - 2 * tried)])
    examined, others = names[-tried:], names[-2 * tried : -tried]
    house.examine(examined)
    first, again, unproven = await cold(house, examined), await cold(house, examined), await cold(house, others)
    # Far fewer stay than are asked for, so that they come and go.
    house.names.on_demand._most = num_adapters // 4  # type: ignore[union-attr]
    errors, asked = await zipf(house, names, num_requests)
    await house.names.close()
    (first_time, first_wall), (later, later_wall), (unproven_time, unproven_wall) = (
        [statistics.median(of) for of in zip(*seconds, strict=True)] for seconds in (first, again, unproven)
    )
    bench.table(
        [
            ("an adapter's file", f"{adapter_bytes(house, names[0]) / 1e6:.1f} MB"),
            (
                "first token, never loaded before, passed the gate here",
                f"{first_time:.3f} s of the processor, {first_wall:.3f} s on the wall",
            ),
            (
                "first token, never examined here",
                f"{unproven_time:.3f} s of the processor, {unproven_wall:.3f} s on the wall",
            ),
            ("first token, loaded again", f"{later:.3f} s of the processor, {later_wall:.3f} s on the wall"),
            ("requests", f"{num_requests} to {asked} of {num_adapters} adapters, {num_adapters // 4} loaded at a time"),
        ]
    )
    return {
        "bytes_per_file": round(per_file, 3),
        "cold_seconds": round(first_time, 3),
        "cold_again_seconds": round(later, 3),
        "cold_unproven_seconds": round(unproven_time, 3),
        "errors": errors,
    }


def main() -> None:
    goals = {
        "bytes_per_file": {"max": 1.1},
        "cold_seconds": {"max": 0.3},
        "cold_again_seconds": {"max": 0.3},
        "errors": {"max": 0},
    }
    bench = Benchmark("adapter_count", "Many adapters on one resident base", goals, has_real=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench.finish(asyncio.run(measure(bench, Path(folder))))


if __name__ == "__main__":
    main()
