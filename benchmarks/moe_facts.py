"""How many bits of a generated world does a mixture of experts keep, for each of its parameters, beside a dense model of as many active ones?

People have names and attributes, each drawn uniformly from as many values as make whole bits, so how much there is to know is known: what is kept of it
follows from the loss on values, people · attributes · (bits of a value − loss), as in Allen-Zhu & Li 2024 (arXiv 2404.05405), where a
name is given and counts nothing. Both models see the same people as often, in an order that is drawn anew each time, and are asked in another one. A few
CPU minutes; recorded, without goals.
"""

from __future__ import annotations

import math
import random
import time
from typing import Any

import torch
from harness import Benchmark

SYLLABLES, NAME_TOKENS = 32, 3
VALUES, ATTRIBUTES = 64, 6
RECORD_TOKENS = NAME_TOKENS + ATTRIBUTES
VOCAB_SIZE = SYLLABLES + VALUES
RECORDS_OF_A_DOCUMENT, DOCUMENTS_OF_A_BATCH = 14, 8
EXPERT_SIZE, ACTIVE, EXPERTS = 64, 2, 8
COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("new:tiny", {**COMMON, "intermediate_size": ACTIVE * EXPERT_SIZE}),
    "moe": (
        "new:moe-custom",
        {**COMMON, "num_experts": EXPERTS, "num_active_experts": ACTIVE, "expert_size": EXPERT_SIZE},
    ),
}
RATE = 4e-3


def world(people: int, chance: random.Random) -> list[list[int]]:
    """A record of token ids for each of the people: a name that nobody shares, and values."""
    names = chance.sample(range(SYLLABLES**NAME_TOKENS), people)
    return [
        [name // SYLLABLES**place % SYLLABLES for place in range(NAME_TOKENS)]
        + [SYLLABLES + chance.randrange(VALUES) for _ in range(ATTRIBUTES)]
        for name in names
    ]


def batches(records: list[list[int]], chance: random.Random) -> Any:
    """All records once, in an order of their own; values carry loss."""
    from nightschool.data.batches import Batches
    from nightschool.data.chat.render import Rendered

    order = chance.sample(records, len(records))
    weights = [0.0] * NAME_TOKENS + [1.0] * ATTRIBUTES
    documents = []
    for start in range(0, len(order), RECORDS_OF_A_DOCUMENT):
        part = order[start : start + RECORDS_OF_A_DOCUMENT]
        ids = [token for record in part for token in record]
        documents.append(Rendered(ids, weights * len(part), ["text"] * len(ids)))
    return Batches(documents, batch_size=DOCUMENTS_OF_A_BATCH, seed=0)


def learn(model: str, people: int, exposures: int) -> dict[str, float]:
    """Train one of the models on a world, and ask it for all of it."""
    from nightschool.config.recipe import Train
    from nightschool.models.build import build_model
    from nightschool.models.cost import count_parameters
    from nightschool.training.distributed.world import ALONE
    from nightschool.training.methods.finetune import FinetuneTask

    records, chance = world(people, random.Random(0)), random.Random(1)
    base, shape = MODELS[model]
    made = build_model(base, VOCAB_SIZE, 0, shape=shape)
    first = batches(records, chance)
    task = FinetuneTask(made, first, Train(learning_rate=RATE, weight_decay=0.01))
    made.train()
    started, step, steps, losses = time.process_time(), 0, exposures * first.num_batches(0), []
    for exposure in range(exposures):
        turn = batches(records, chance)
        for place in range(turn.num_batches(0)):
            batch = turn.get(0, place)
            loss = task.accumulate([batch], batch.loss_units)
            rate = RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            task.update(rate, 1.0, None, ALONE)
            losses.append(loss)
            step += 1
        if (exposure + 1) % max(1, exposures // 8) == 0:
            bits = sum(losses[-turn.num_batches(0) :]).item() / turn.num_batches(0) / math.log(2)
            print(f"  {model}: seen {exposure + 1} times, {bits:.3f} bits a value", flush=True)
    seconds = time.process_time() - started
    figures = {name: float(figure) for name, figure in task.figures().items()}
    bits = task.heldout_loss(batches(records, random.Random(2)))[0] / math.log(2)
    count = count_parameters(made)
    return {
        "bits_a_value": bits,
        "bits_kept": people * ATTRIBUTES * (math.log2(VALUES) - bits),
        "parameters": count.total,
        "active": count.active or count.total,
        "cpu_minutes": seconds / 60,
        "dead_experts": figures.get("dead_experts", 0.0),
    }


def main() -> None:
    bench = Benchmark(
        "moe_facts", "Bits of a generated world kept for each parameter: a mixture, and a dense model", {}
    )
    torch.set_num_threads(1)
    people, exposures = (250, 60) if bench.quick else (2000, 100)
    there = people * ATTRIBUTES * math.log2(VALUES)
    print(f"  {people:,} people, {there:,.0f} bits, each seen {exposures} times", flush=True)
    figures: dict[str, float] = {"people": people, "exposures": exposures, "bits_there": there}
    for model in MODELS:
        found = learn(model, people, exposures)
        kept, total, active = found["bits_kept"], found["parameters"], found["active"]
        bench.table(
            [
                (
                    model,
                    f"{found['bits_a_value']:.3f} bits a value left, {kept:,.0f} kept ({kept / there:.1%}), {kept / total:.3f} a parameter of "
                    f"{total:,.0f}, {kept / active:.3f} an active one of {active:,.0f}; {found['cpu_minutes']:.1f} CPU minutes",
                )
            ]
        )
        figures |= {
            f"{model}_bits_kept": round(kept),
            f"{model}_bits_a_parameter": round(kept / total, 4),
            f"{model}_bits_an_active_parameter": round(kept / active, 4),
            f"{model}_share_kept": round(kept / there, 4),
        }
        figures |= {"dead_experts": found["dead_experts"]} if model == "moe" else {}
    figures["moe_bits_to_dense"] = round(figures["moe_bits_kept"] / figures["dense_bits_kept"], 3)
    bench.finish(figures)


if __name__ == "__main__":
    main()
