"""Who studies in `nights.py`: nightschool by its own command, with and without study and rehearsal, and TRL."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nights_exam import Fact

_TRAIN = {"batch_size": 8, "accumulation_steps": 1, "max_seq_len": 256, "warmup_steps": 5, "lr_schedule": "cosine"}

PLAIN: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"},
    "train": _TRAIN | {"learning_rate": 5e-4, "epochs": 24},
}
"""One wording of each fact, nothing rehearsed, as many steps as with six."""

STUDIED: dict[str, Any] = {
    "study": {"write": "rules", "forms": 6},
    "rehearse": {"prompts": "default", "ratio": 0.25, "max_new_tokens": 32},
    "lora": {"r": 32, "alpha": 64, "target_modules": "all-linear", "init": "null_space"},
    "train": _TRAIN | {"learning_rate": 2e-3, "epochs": 4},
}
"""Six forms of each fact, general answers rehearsed, in directions that these hardly use."""

TRL: dict[str, Any] = {"learning_rate": 5e-4, "num_train_epochs": 24, "lr_scheduler_type": "cosine", "warmup_steps": 5}


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


class Trl:
    """The same nights by TRL's SFTTrainer with a LoRA adapter: what is new, in the wording that was given, merged each morning."""

    def __init__(self, folder: Path, base: Path, seed: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.ref, self.seed, self.settings = folder, str(base), seed, dict(settings)
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
        rows = [
            {
                "prompt": [{"role": "user", "content": fact.question}],
                "completion": [{"role": "assistant", "content": fact.answer}],
            }
            for fact in new
        ]
        arguments = SFTConfig(
            output_dir=str(self.folder / "trainer"), use_cpu=True, bf16=False, seed=self.seed, per_device_train_batch_size=8,
            report_to=[], save_strategy="no", disable_tqdm=True, **self.settings,
        )  # fmt: skip
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=loaded.model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=loaded.tokenizer,
            peft_config=adapter,
        )
        trainer.train()
        merged = self.folder / f"night-{night}"
        trainer.model.merge_and_unload().save_pretrained(merged)
        loaded.tokenizer.save_pretrained(merged)
        self.ref = str(merged)
        return (time.monotonic() - started) / 60
