"""What does LoRA on a mixture of 64 experts take, resident, streamed from a file, in 4 bits and both, against PEFT with everything resident?

A stock Qwen3-MoE folder of random weights, adapters on attention and experts. Each way trains in a process of its own, from the same
adapter, on the same tokens in the same order. Bytes are those that the process holds of its own (RssAnon, looked at every 2 ms),
beyond what it held with everything imported; so the page cache and mapped files do not count. Time is that of the processor, on
one thread.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import Benchmark

GOALS = {
    "streamed_peak_to_peft": {"max": 0.45},
    "streamed_step_time_to_peft": {"max": 1.15},
    "streamed_loss_difference": {"max": 1e-4},
    "nf4_peak_to_peft": {"max": 0.45},
    "nf4_step_time_to_peft": {"max": 1.15},
    "nf4_streamed_peak_to_peft": {"max": 0.45},
    "nf4_streamed_step_time_to_peft": {"max": 1.15},
    "nf4_streamed_to_nf4_loss_difference": {"max": 0.0},
}
WAYS = ("peft", "resident", "streamed", "nf4", "nf4_streamed")
RATE, CLIP = 1e-3, 1.0
VOCAB, TOKENS = 1024, 128


def shape(quick: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "num_hidden_layers": 2 if quick else 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "moe_intermediate_size": 256,
        "intermediate_size": 256,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }


def batches(quick: bool) -> list[torch.Tensor]:
    """Token ids [documents, tokens] of each step."""
    chance = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (8 if quick else 16, TOKENS), generator=chance) for _ in range(4 if quick else 8)]


class Anonymous:
    """The most bytes of its own that this process holds in a block."""

    def __init__(self) -> None:
        self.peak, self._done = 0, threading.Event()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    @contextmanager
    def watching(self) -> Iterator[None]:
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            yield
        finally:
            self._done.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self.now())


def of_peft(place: Path) -> Callable[[torch.Tensor], float]:
    """A step as users of PEFT take it; returns the loss."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(place / "adapter"), is_trainable=True).train()
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=RATE, weight_decay=0.01)

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learns, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def of_ours(way: str, place: Path, quick: bool) -> Callable[[torch.Tensor], float]:
    """A step of a task of `method: lora`, or `qlora`; returns the loss."""
    from nightschool.config.recipe import Train
    from nightschool.data.batches import Batches
    from nightschool.data.chat.render import Rendered
    from nightschool.models.adapters import load_adapter
    from nightschool.models.load import load_base
    from nightschool.models.streamed import ExpertPlace
    from nightschool.store.home import Home
    from nightschool.training.distributed.world import ALONE
    from nightschool.training.methods.finetune import FinetuneTask

    experts = ExpertPlace("disk", place, 4, learns=False) if way.endswith("streamed") else None
    ref = f"{place / 'base'}[nf4-double]" if way.startswith("nf4") else str(place / "base")
    base: Any = load_base(ref, Home(place / "home").ensure(), merge=False, experts=experts).model
    model = load_adapter(base, place / "adapter", trainable=True)
    documents = [Rendered(row, [1.0] * len(row), ["text"] * len(row)) for ids in batches(quick) for row in ids.tolist()]
    train = Train(learning_rate=RATE, weight_decay=0.01)
    task = FinetuneTask(model, Batches(documents, batch_size=len(batches(quick)[0]), seed=0), train)
    model.train()

    def step(ids: torch.Tensor) -> float:
        rows = [Rendered(row, [1.0] * len(row), ["text"] * len(row)) for row in ids.tolist()]
        batch = Batches(rows, batch_size=len(rows), seed=0).get(0, 0)
        loss = task.accumulate([batch], batch.loss_units)
        task.update(RATE, CLIP, None, ALONE)
        return float(loss.detach())

    return step


def run(way: str, folder: str, quick: bool) -> dict[str, Any]:
    """Train in this process; its figures."""
    import nightschool.training.methods.finetune  # noqa: F401 - so that imports are not counted

    torch.set_num_threads(1)
    place, anonymous = Path(folder), Anonymous()
    before = anonymous.now()
    losses, seconds = [], []
    with anonymous.watching():
        step = of_peft(place) if way == "peft" else of_ours(way, place, quick)
        for ids in batches(quick):
            started = time.process_time()
            losses.append(step(ids))
            seconds.append(time.process_time() - started)
    return {"peak": anonymous.peak - before, "seconds": statistics.median(seconds[1:]), "losses": losses}


# What takes most of the time of a short process, and is imported once for all of them.
IMPORTS = ["peft", "nightschool.training.methods.finetune", "nightschool.models.load", "nightschool.models.export"]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own, which has everything imported and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def prepare(folder: str, quick: bool) -> None:
    """A base folder and a fresh adapter for it whose second factors are not zero, so that all of it works from the first step."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from nightschool.config.recipe import Lora
    from nightschool.models.adapters import attach_lora
    from nightschool.models.build import build_model
    from nightschool.models.export import save_version_folder

    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    place = Path(folder)
    model = build_model(shape(quick), VOCAB, 0)
    save_version_folder(model, tokenizer, place / "base")
    wrapped = attach_lora(model, Lora(r=8, alpha=16, target_modules=["attention", "experts"]), seed=1)
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    wrapped.save_pretrained(str(place / "adapter"))


def main() -> None:
    bench = Benchmark(
        "expert_lora", "LoRA on experts: bytes, time and loss against PEFT with everything resident", GOALS
    )
    rounds = 1 if bench.quick else 3
    with tempfile.TemporaryDirectory() as folder:
        apart(prepare, folder, bench.quick)
        of: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                of[way].append(apart(run, way, folder, bench.quick))
    peaks = {way: statistics.median(one["peak"] for one in results) for way, results in of.items()}
    seconds = {way: statistics.median(one["seconds"] for one in results) for way, results in of.items()}
    losses = {way: results[0]["losses"] for way, results in of.items()}
    bench.table(
        [
            (
                way,
                f"peak {peaks[way] / 1e6:6.0f} MB   {1000 * seconds[way]:6.0f} ms a step   loss {losses[way][0]:.5f} … "
                f"{losses[way][-1]:.5f}",
            )
            for way in WAYS
        ]
    )
    figures = {}
    for way in WAYS[1:]:
        figures[f"{way}_peak_to_peft"] = peaks[way] / peaks["peft"]
        figures[f"{way}_step_time_to_peft"] = seconds[way] / seconds["peft"]
        figures[f"{way}_loss_difference"] = max(abs(a - b) for a, b in zip(losses[way], losses["peft"], strict=True))
    for way, alike in (("streamed", "resident"), ("nf4_streamed", "nf4")):
        figures[f"{way}_to_{alike}_loss_difference"] = max(
            abs(a - b) for a, b in zip(losses[way], losses[alike], strict=True)
        )
    bench.finish(figures)


if __name__ == "__main__":
    main()
