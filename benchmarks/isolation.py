"""Does any tenant ever get another's answer, another version's, or a prefix that another tenant's prompt left in the cache?

Eight tenants ask the same prompts of names that are called the same, each of its own adapters on one base, while versions
are promoted and names unloaded. What each version answers was written down before, by PEFT.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from harness import Benchmark
from real_chats import qwen3

NUM_TENANTS, NUM_VERSIONS, MAX_TOKENS = 8, 3, 8
# Longer than a block of the prefix cache (32), and alike at the beginning.
STEM = "Please read this carefully, dear assistant, and then answer in few words: "
PROMPTS = [f"{STEM}question number {number}?" for number in range(12)]


class House:
    """A home with a base, three adapters for each tenant, and what serves them."""

    def __init__(self, path: Path) -> None:
        from nightschool.data.tokenizer import train_bpe
        from nightschool.engine.pool import EnginePool
        from nightschool.engine.slot import Slot
        from nightschool.server.metrics import Metrics
        from nightschool.server.on_demand import OnDemand
        from nightschool.server.served_names import ServedNames
        from nightschool.server.submission import Answering
        from nightschool.store.home import Home
        from nightschool.store.registry import Registry

        self.registry = Registry(Home(path).ensure())
        self.tokenizer = train_bpe(["abcdefghijklmnopqrstuvwxyz 0123456789?,:"], vocab_size=300)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
        self.model = qwen3(300, **shape).eval()
        with torch.no_grad():
            # Random weights mostly repeat one token; larger ones have something to say.
            for name, weight in self.model.named_parameters():
                if weight.dim() == 2 and "embed" not in name:
                    weight.mul_(4)
        self.base = self._publish("base", self.model, "model")
        self.expected: dict[str, dict[str, str]] = {}
        self.versions = {
            f"tenant-{number}": self._adapters(f"tenant-{number}/bot", number) for number in range(NUM_TENANTS)
        }
        pool = EnginePool(self.registry.home, num_rows=16)
        # Fewer stay than there are tenants.
        on_demand = OnDemand(lambda name: Slot(name, pool), NUM_TENANTS - 2)
        self.names = ServedNames([Slot("default", pool)], on_demand, self.registry)
        self.answering = Answering(self.names, Metrics(self.names))

    def _adapters(self, name: str, seed: int) -> list[Any]:
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(
            self.model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        ).eval()
        versions = []
        for number in range(NUM_VERSIONS):
            chance = torch.Generator().manual_seed(100 * seed + number)
            with torch.no_grad():
                for path, weight in wrapped.named_parameters():
                    if ".lora_" in path:
                        weight.copy_(torch.randn(weight.shape, generator=chance) / weight.shape[1] ** 0.5)
            version = self._publish(name, wrapped, "adapter")
            self.expected[version.ref] = {prompt: self._greedy(wrapped, prompt) for prompt in PROMPTS}
            versions.append(version)
        wrapped.unload()
        self.registry.promote(name, versions[0].id, by="benchmark")
        return versions

    @torch.inference_mode()
    def _greedy(self, model: Any, prompt: str) -> str:
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        for _ in range(MAX_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        return str(self.tokenizer.decode(ids[0, -MAX_TOKENS:], skip_special_tokens=True))

    def _publish(self, name: str, model: Any, kind: Any) -> Any:
        from nightschool.models.export import save_version_folder
        from nightschool.store.versions import VersionMetadata

        on_base = kind == "adapter"
        facts = VersionMetadata(kind=kind, method="lora", base=self.base.ref if on_base else "bench")
        path = str(self.base.path) if on_base else None
        return self.registry.publish(
            name, lambda folder: save_version_folder(model, self.tokenizer, folder, base_path=path), facts
        )


class Watch:
    """Asks, and counts what must not be."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.wrong: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self._promoted = {tenant: [versions[0].ref] for tenant, versions in house.versions.items()}
        self._asked: set[tuple[str, str, str]] = set()
        self._numbers = itertools.count()
        self._turns = asyncio.Semaphore(24)

    async def ask(self, tenant: str, key: str, prompt: str) -> None:
        """One request, and a look at its answer, its label and what of its prompt was known."""
        from nightschool.engine.request import SamplingParams
        from nightschool.server.submission import Ask
        from nightschool.store.principal import Principal

        params = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True)
        principal = Principal(tenant, frozenset(), key)
        ask = Ask([prompt], params, MAX_TOKENS, MAX_TOKENS, "bot", principal)
        async with self._turns:
            served = self._may_answer(tenant)
            promoted_before = len(self._promoted[tenant])
            running = await self.house.answering.start(ask, f"r{next(self._numbers)}")
            label = running.binding.label
            binding = (label, tenant, key)
            # Who asks the same at the same time may leave its prompt for this one.
            was_asked = binding in self._asked
            self._asked.add(binding)
            served |= set(self._promoted[tenant][promoted_before:])
            [answer] = await running.answers()
        if not label.startswith(f"{tenant}/"):
            self.wrong["of another tenant"] += 1
        elif label not in served:
            self.wrong["of a version that was not served"] += 1
        elif answer.text != self.house.expected[label][prompt]:
            self.wrong["unlike what its version answers"] += 1
        if running.cached_tokens:
            self.hits["within" if was_asked else "across"] += 1

    def _may_answer(self, tenant: str) -> set[str]:
        """What is served now, or is being loaded: the champion, or the one before if it moved during the load."""
        slot = self.house.names.get(f"{tenant}/bot")
        current = slot.current if slot is not None else None
        if current is not None:
            return {current.version.ref}
        return set(self._promoted[tenant][-2:])

    async def move(self, chance: random.Random) -> None:
        """Promote another version of somebody's name, or unload it."""
        tenant = chance.choice(list(self.house.versions))
        name = f"{tenant}/bot"
        if chance.random() < 0.5:
            await self.house.names.unload(name)
            return
        version = chance.choice(self.house.versions[tenant])
        self._promoted[tenant].append(version.ref)
        await asyncio.to_thread(self.house.registry.promote, name, version.id, by="benchmark")
        for slot in await asyncio.to_thread(self.house.names.moved):
            await asyncio.to_thread(slot.refresh)


async def measure(bench: Benchmark, folder: Path) -> dict[str, float]:
    house = House(folder)
    watch, chance = Watch(house), random.Random(0)
    count, moves = (1000, 40) if bench.quick else (10_000, 400)
    waiting: list[asyncio.Task[None]] = []
    for number in range(count):
        tenant, key = chance.choice(list(house.versions)), chance.choice("ab")
        waiting.append(asyncio.create_task(watch.ask(tenant, key, chance.choice(PROMPTS))))
        if number % (count // moves) == 0:
            await watch.move(chance)
        while len(waiting) >= 48:
            _, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in set(waiting) - pending:
                task.result()
            waiting = list(pending)
    await asyncio.gather(*waiting)
    await house.names.close()
    distinct = len({tuple(answers.values()) for answers in house.expected.values()})
    assert distinct == NUM_TENANTS * NUM_VERSIONS, "two versions answer alike, so that nothing would be noticed"
    bench.table([("requests", f"{count}, with {moves} swaps and unloads in between")])
    bench.table([(f"answers {what}", str(times)) for what, times in watch.wrong.items()] or [("wrong answers", "none")])
    return {
        "wrong_answers": watch.wrong.total(),
        "prefix_hits_across": watch.hits["across"],
        "prefix_hits_within": watch.hits["within"],
    }


def main() -> None:
    goals = {"wrong_answers": {"max": 0}, "prefix_hits_across": {"max": 0}, "prefix_hits_within": {"min": 1}}
    bench = Benchmark("isolation", "Eight tenants on one base, with swaps and unloads in between", goals)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench.finish(asyncio.run(measure(bench, Path(folder))))


if __name__ == "__main__":
    main()
