"""The methods: one file each, and this table. A new method is a file here, a section of the recipe, and a page of docs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nightschool.training.methods.dpo import DpoFinetune
from nightschool.training.methods.finetune import Finetune
from nightschool.training.methods.lora import LoraFinetune
from nightschool.training.methods.memory import MemoryTraining
from nightschool.training.methods.prepared import PreparedRun
from nightschool.training.methods.pretrain import Pretrain
from nightschool.training.methods.qlora import QloraFinetune

METHODS: Mapping[str, type[PreparedRun[Any]]] = {
    "full": Finetune,
    "lora": LoraFinetune,
    "qlora": QloraFinetune,
    "dpo": DpoFinetune,
    "memory": MemoryTraining,
    "pretrain": Pretrain,
}
