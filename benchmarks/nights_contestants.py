"""Who studies in `nights.py`: nightschool by its own command, with and without study and rehearsal, its memory, and TRL."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nights_exam import Fact

GENERAL = Path(__file__).parents[1] / "data" / "general_chat.jsonl"
_TRAIN = {"batch_size": 8, "accumulation_steps": 1, "max_seq_len": 256, "warmup_steps": 5, "lr_schedule": "cosine"}

PLAIN: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"},
    "train": _TRAIN | {"learning_rate": 5e-4, "epochs": 24},
}
"""One wording of each fact, nothing rehearsed, as many steps as with six."""

STUDIED: dict[str, Any] = {
    "study": {"write": "rules", "forms": 6},
    "rehearse": {"prompts": "default", "ratio": 0.25, "max_new_tokens": 32, "teacher": "base"},
    "lora": {"r": 32, "alpha": 64, "target_modules": "all-linear", "init": "null_space"},
    "train": _TRAIN | {"learning_rate": 2.5e-3, "epochs": 4},
    "gate": {"drift": "<= 0.1 nats"},
}
"""Six forms of each fact, what the base says to general prompts rehearsed, in directions that these hardly use: the settings of
recipes/smollm2-lora.yaml."""

_TRL: dict[str, Any] = {"num_train_epochs": 24, "lr_scheduler_type": "cosine", "warmup_steps": 5}
TRL: dict[str, Any] = _TRL | {"learning_rate": 5e-4}
TRL_REPLAY: dict[str, Any] = TRL | {"num_train_epochs": 12, "replay": True}
"""With 64 general conversations among the facts, at most as many as there are facts, and facts of nights before; as many steps."""
TRL_FULL: dict[str, Any] = _TRL | {"learning_rate": 5e-5, "adapter": False}
"""All weights."""


class Nightschool:
    """One series of nights by `nightschool train`, each from the champion of the night before.

    Args:
        folder: New; its home, its recipe and its data lie there.
        base: Where the base lies.
        settings: Of the recipe, beside the base, the method and the data.
    """

    def __init__(self, folder: Path, base: Path, seed: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.ref = folder, str(base)
        (folder / "data").mkdir(parents=True)
        recipe: dict[str, Any] = {
            "name": "night",
            "base": str(base),
            "method": "lora",
            "data": [{"path": "data/*.jsonl"}],
        }
        recipe |= {"held_out": {"share": 0}, "checkpoints": {"every": "1000 steps"}, "serve": {"promote": "always"}}
        recipe |= settings
        recipe["train"] = {"seed": seed, **recipe.get("train", {})}
        (folder / "night.json").write_text(json.dumps(recipe), encoding="utf-8")

    def study(self, night: int, new: Sequence[Fact]) -> float:
        """Study what is new, one wording each; the minutes that it took, exam and publishing among them."""
        rows = [{"question": fact.question, "answer": fact.answer} for fact in new]
        path = self.folder / "data" / f"night-{night}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        started = time.monotonic()
        command = [sys.executable, "-m", "nightschool", "-C", str(self.folder), "train", "night.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        with (self.folder / "night.log").open("a", encoding="utf-8") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            sys.exit(f"night {night} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        self.ref = "night@latest"
        return (time.monotonic() - started) / 60


class Remembered:
    """No night at all: the answers are entries of an explicit memory, which the base reads from its prompt."""

    memory = "facts"

    def __init__(self, folder: Path, base: Path, seed: int, settings: Mapping[str, Any]) -> None:  # noqa: ARG002
        folder.mkdir(parents=True)
        self.folder, self.ref = folder, str(base)
        self._call("build")

    def study(self, night: int, new: Sequence[Fact]) -> float:  # noqa: ARG002
        """The minutes that writing took."""
        started = time.monotonic()
        self._call("add", *(fact.answer for fact in new))
        return (time.monotonic() - started) / 60

    def _call(self, verb: str, *what: str) -> None:
        command = [sys.executable, "-m", "nightschool", "-C", str(self.folder), "memory", verb, self.memory, *what]
        subprocess.run(command, capture_output=True, text=True, check=True)


class Trl:
    """The same nights by TRL's SFTTrainer: what is new, in the wording that was given.

    Args:
        folder: New; checkpoints and the models of each morning lie there.
        base: Where the base lies.
        settings: Of `SFTConfig`; `adapter: False` trains all weights in place of a LoRA adapter that is merged each morning, and `replay: True`
            mixes general conversations and what was taught before among what is new, as many rows as that has.
    """

    def __init__(self, folder: Path, base: Path, seed: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.ref, self.seed, self.settings = folder, str(base), seed, dict(settings)
        self.adapter, self.replay = self.settings.pop("adapter", True), self.settings.pop("replay", False)
        self.taught: list[dict[str, Any]] = []
        folder.mkdir(parents=True)

    def study(self, night: int, new: Sequence[Fact]) -> float:
        """The minutes that it took, merging and saving among them."""
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        from nightschool.models.load import load_base
        from nightschool.store.home import Home

        started = time.monotonic()
        loaded = load_base(self.ref, Home(self.folder / ".nightschool"))
        rows = [_row(fact.question, fact.answer) for fact in new]
        beside = self._beside(night, len(rows)) if self.replay else []
        corrected = {fact.question for fact in new}
        self.taught = [row for row in self.taught if row["prompt"][0]["content"] not in corrected] + rows
        arguments = SFTConfig(
            output_dir=str(self.folder / "trainer"), use_cpu=True, bf16=False, seed=self.seed, per_device_train_batch_size=8,
            report_to=[], save_strategy="no", disable_tqdm=True, **self.settings,
        )  # fmt: skip
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=loaded.model,
            args=arguments,
            train_dataset=Dataset.from_list([*rows, *beside]),
            processing_class=loaded.tokenizer,
            peft_config=adapter if self.adapter else None,
        )
        trainer.train()
        morning = self.folder / f"night-{night}"
        (trainer.model.merge_and_unload() if self.adapter else trainer.model).save_pretrained(morning)
        loaded.tokenizer.save_pretrained(morning)
        self.ref = str(morning)
        return (time.monotonic() - started) / 60

    def _beside(self, night: int, count: int) -> list[dict[str, Any]]:
        """Half of so many rows general conversations, the others facts of nights before, as far as there are any."""
        chance = random.Random(f"{self.seed}:{night}")
        before = chance.sample(self.taught, min(count // 2, len(self.taught)))
        chats = map(json.loads, GENERAL.read_text("utf-8").splitlines())
        general = [_row(chat["prompt"], chat["completion"]) for chat in chats]
        return [*before, *chance.sample(general, min(count - len(before), len(general)))]


def _row(question: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
