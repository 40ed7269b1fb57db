"""Names that other programs use for our settings, and names that cannot be translated.

An alias is accepted at the top level and in the section of the setting that it stands for. What was translated is
shown. A name that could mean two settings is refused with both; a name of something that is not a setting of a recipe
is refused with what to use in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from nightschool.config.mixtures import base_of_preset
from nightschool.config.schema import Path, dotted


class SaysNothing(Exception):
    """The value of an alias leaves the setting as it is."""


@dataclass(frozen=True)
class Alias:
    """`path` is the setting; `convert` makes its value, and raises ValueError if it cannot."""

    path: Path
    convert: Callable[[Any], Any] | None = None

    @property
    def key(self) -> str:
        return dotted(self.path)


def _hours(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is not a number of hours above 0; write for example 12 or 0.25")
    return value * 3600


def _steps(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a number of steps; write for example 500")
    return f"{value} steps"


def _files(value: Any) -> Any:
    if value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a number of files; write for example 5, or -1 for all")
    return value


def _flag(meant: str) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        if not value:
            raise SaysNothing
        return meant

    return convert


def _device(value: Any) -> Any:
    """`cuda:0` is the GPU that `cuda` is; another one is chosen outside of a recipe, for all that a run starts."""
    name, _, number = str(value).partition(":")
    if name != "cuda" or not number.isdecimal():
        return value
    if int(number) > 0:
        raise ValueError(
            f"a run takes the first GPU that it sees; write device: cuda, and CUDA_VISIBLE_DEVICES={int(number)} before the command"
        )
    return name


_PRECISIONS = {"no": "fp32", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}


def _precision(value: Any) -> Any:
    # YAML makes false of a bare `no`.
    dtype = "fp32" if value is False else _PRECISIONS.get(str(value))
    if dtype is None:
        raise ValueError(f"{value!r} is none of {', '.join(_PRECISIONS)}")
    return dtype


def _next_square(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or isqrt(value) ** 2 == value:
        return ""
    return f"; nor is {value} a perfect square: the next one is {(isqrt(value) + 1) ** 2}"


def _shape(name: str) -> Alias:
    return Alias(("shape", name))


def _train(name: str) -> Alias:
    return Alias(("train", name))


# Sections for which a text alone may stand, and the setting that the text then is.
SHORTHANDS: Mapping[Path, Path] = {("checkpoints", "upload"): ("checkpoints", "upload", "url")}

ALIASES: Mapping[str, Alias] = {
    "lr": _train("learning_rate"),
    "learning_rate": _train("learning_rate"),
    "epochs": _train("epochs"),
    "num_epochs": _train("epochs"),
    "num_train_epochs": _train("epochs"),
    "max_steps": _train("max_steps"),
    "batch_size": _train("batch_size"),
    "micro_batch_size": _train("batch_size"),
    "per_device_train_batch_size": _train("batch_size"),
    "accumulation_steps": _train("accumulation_steps"),
    "gradient_accumulation_steps": _train("accumulation_steps"),
    "grad_accum": _train("accumulation_steps"),
    "seq_len": _train("max_seq_len"),
    "seq_length": _train("max_seq_len"),
    "sequence_length": _train("max_seq_len"),
    "sequence_len": _train("max_seq_len"),
    "max_seq_len": _train("max_seq_len"),
    "max_seq_length": _train("max_seq_len"),
    "max_length": _train("max_seq_len"),
    "cutoff_len": _train("max_seq_len"),
    "weight_decay": _train("weight_decay"),
    "adam_beta1": _train("beta1"),
    "adam_beta2": _train("beta2"),
    "adam_epsilon": _train("epsilon"),
    "max_grad_norm": _train("max_grad_norm"),
    "gradient_clip": _train("max_grad_norm"),
    "grad_clip": _train("max_grad_norm"),
    "clip_grad_norm": _train("max_grad_norm"),
    "lr_scheduler_type": _train("lr_schedule"),
    "warmup_steps": _train("warmup_steps"),
    "min_lr_rate": _train("min_lr_ratio"),
    "optim": _train("optimizer"),
    "early_stopping_patience": Alias(("train", "early_stopping", "patience")),
    "early_stopping_threshold": Alias(("train", "early_stopping", "min_delta")),
    "bnb_4bit_quant_type": Alias(("quantization", "type")),
    "bnb_4bit_use_double_quant": Alias(("quantization", "double")),
    "bnb_4bit_compute_dtype": Alias(("quantization", "compute_dtype")),
    "from_version": Alias(("base",)),
    "mixed_precision": Alias(("train", "dtype"), _precision),
    "fp16": Alias(("train", "dtype"), _flag("fp16")),
    "bf16": Alias(("train", "dtype"), _flag("bf16")),
    "gradient_checkpointing": _train("gradient_checkpointing"),
    "torch_compile": _train("compile"),
    "zero_stage": _train("zero_stage"),
    "device": Alias(("train", "device"), _device),
    "num_workers": _train("num_workers"),
    "dataloader_num_workers": _train("num_workers"),
    "seed": _train("seed"),
    "logging_steps": _train("log_every"),
    "log_interval": _train("log_every"),
    "eval_steps": Alias(("train", "evaluate_every"), _steps),
    "eval_interval": Alias(("train", "evaluate_every"), _steps),
    "save_steps": Alias(("checkpoints", "every"), _steps),
    "save_interval": Alias(("checkpoints", "every"), _steps),
    "save_total_limit": Alias(("checkpoints", "keep", "last")),
    "max_files": Alias(("pretrain", "max_files"), _files),
    "max_train_files": Alias(("pretrain", "max_files"), _files),
    "preset": Alias(("base",), base_of_preset),
    "model_size": Alias(("base",), base_of_preset),
    "num_experts": _shape("num_experts"),
    "num_active_experts": _shape("num_active_experts"),
    "num_experts_per_tok": _shape("num_active_experts"),
    "expert_size": _shape("expert_size"),
    "moe_intermediate_size": _shape("expert_size"),
    "hidden_size": _shape("hidden_size"),
    "num_layers": _shape("num_hidden_layers"),
    "local_learning_rate": _train("expert_learning_rate"),
    "offload_to_cpu": Alias(("experts", "tier"), _flag("host")),
    "router_aux_loss_coef": Alias(("experts", "load_balancing_loss_coef")),
    "router_z_loss_coef": Alias(("experts", "z_loss_coef")),
    "moe_router_bias_update_rate": Alias(("experts", "bias_update_rate")),
    "lora_r": Alias(("lora", "r")),
    "lora_rank": Alias(("lora", "r")),
    "lora_alpha": Alias(("lora", "alpha")),
    "lora_dropout": Alias(("lora", "dropout")),
    "lora_target_modules": Alias(("lora", "target_modules")),
    "target_modules": Alias(("lora", "target_modules")),
    "gate_rank": Alias(("memory", "gate_rank")),
    "fusion_rank": Alias(("memory", "fusion_rank")),
    "knowledge_dim": Alias(("memory", "knowledge_dim")),
    "knowledge_length": Alias(("memory", "knowledge_length")),
    "num_candidates": Alias(("memory", "num_candidates")),
    "similarity_loss_coef": Alias(("memory", "similarity_loss_coef")),
    "diversity_loss_coef": Alias(("memory", "diversity_loss_coef")),
    "sft_dataset_path": Alias(("data", 0, "path")),
    "sft_val_dataset_path": Alias(("held_out", "path")),
    "qwen3_model_path": Alias(("base",)),
    "data_path": Alias(("data", 0, "path")),
    "dataset_path": Alias(("data", 0, "path")),
    "train_file": Alias(("data", 0, "path")),
    "dataset": Alias(("data", 0, "dataset")),
    "data_dir": Alias(("data", 0, "folder")),
    "max_samples": Alias(("data", 0, "max_samples")),
    "base_model": Alias(("base",)),
    "model_name_or_path": Alias(("base",)),
    "interval_hours": Alias(("schedule", "every"), _hours),
    "cron": Alias(("schedule", "cron")),
    "model_check_interval": Alias(("serve", "model_check_interval")),
}

_HOME = (
    "is not a setting: runs, checkpoints and versions all lie in the home; choose it with -C DIR or with the environment "
    "variable NIGHTSCHOOL_HOME=DIR"
)
_RESUME = "is not a setting of a recipe; write nightschool train RECIPE --resume RUN"
_SERVE_OPTION = "is not a setting of a recipe; write nightschool serve --port 8001 --host 127.0.0.1"

_STAGE_BEFORE = (
    "is not a setting: files of weights of ExplicitLM fit no layer here, whatever their sizes; write base: NAME@VERSION, the version that "
    "the stage before has published"
)
_MEMORY_FILE = (
    "is not a setting: entries and index lie in a memory; write nightschool memory build NAME --from FILE, or nightschool memory keys NAME "
    "--from keys.pt, and memory.name: NAME"
)
_ONE_ENTRY = "is not a setting: nothing is drawn at random, and all candidates are read; take the line out"
_SENT_NOWHERE = "is not a setting: nothing is sent anywhere, and metrics lie in the run's folder; take the line out"
_EVAL_OPTION = "is not a setting of a recipe; answers are judged by nightschool eval MODEL, see its --help"

REFUSED: Mapping[str, str] = {
    "vocab_size": "is not a setting: a model has the words of its tokenizer; write tokenizer: FOLDER for shards, or take the line out",
    "out_dir": _HOME,
    "output_dir": _HOME,
    "save_dir": _HOME,
    "checkpoint_dir": _HOME,
    "ckpt_dir": _HOME,
    "model_root": _HOME,
    "resume": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "port": _SERVE_OPTION,
    "host": _SERVE_OPTION,
    "pretrained_router_path": _STAGE_BEFORE,
    "pretrained_memory_gate_path": _STAGE_BEFORE,
    "pretrained_fusion_path": _STAGE_BEFORE,
    "knowledge_num": "is not a setting of a recipe: a memory grows as entries are written; take the line out, and write --knowledge-num to "
    "nightschool memory build, keys and export",
    "cache_path": _MEMORY_FILE,
    "keys_path": _MEMORY_FILE,
    "kb_path": _MEMORY_FILE,
    "database_init_path": _MEMORY_FILE,
    "recompute_cache": "is not a setting: an index follows its memory by itself; take the line out",
    "gumbel_temperature": _ONE_ENTRY,
    "num_selected": _ONE_ENTRY,
    "use_moe": "is not a setting: the base says what its layers are; take the line out",
    "ce_loss_coef": "is not a setting: the loss of answers has the weight 1; take the line out",
    "system_message": "is not a setting: write a turn of the system into the data",
    "use_swanlab": _SENT_NOWHERE,
    "swanlab_project": _SENT_NOWHERE,
    "swanlab_online": _SENT_NOWHERE,
    "swanlab_api_key": _SENT_NOWHERE,
    "eval_num_samples": _EVAL_OPTION,
    "start_eval": _EVAL_OPTION,
    "judger_mode": _EVAL_OPTION,
    "show_eval_res": _EVAL_OPTION,
    "trust_remote_code": "is not a setting: code that comes with a model is never run; remove the line",
    "warmup_ratio": "is not a setting; write train.warmup_steps, a count of steps",
}

OF_REFUSED: Mapping[str, Callable[[Any], str]] = {"knowledge_num": _next_square}
"""What else is wrong with the value that was written for a refused name."""

GROUPS = frozenset({"model", "dataset", "training", "logging"})
"""Sections of other programs' settings, which are flat here: what lies in them is read as if it lay at the top."""

# Names that could mean several settings, beside those that the schema itself has in several sections.
AMBIGUOUS: Mapping[str, tuple[str, ...]] = {
    "max_tokens": ("train.max_seq_len", "gate.max_new_tokens"),
    "model": ("base", "name"),
    "model_name": ("base", "name"),
    "interval": ("schedule.every", "checkpoints.every", "train.evaluate_every"),
    "steps": ("train.max_steps", "checkpoints.every"),
    "scheduler": ("train.lr_schedule", "schedule.every"),
    "clip": ("train.max_grad_norm", "train.max_seq_len"),
}
