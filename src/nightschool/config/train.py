"""The sections of a recipe that say how a model learns."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from nightschool.config.fields import ByteCount, Rhythm, Section, Share, Tokens
from nightschool.config.rules import RuleName, parse_rule

ENOUGH_LEARNED = ">= 95%"

_RULES_OF_SPOT_CHECKS: dict[str, RuleName] = {"learned": "new_facts", "drift": "drift"}


class EarlyStopping(Section):
    """The end of a run whose held-out loss falls no more, or whose model knows enough. What is published is the best point so far:
    the one that knows most of those that pass a spot check, else the one with the lowest held-out loss.
    """

    patience: int | None = Field(
        None,
        ge=1,
        description="So many held-out losses in a row without a better one end the run, or, with `every`, so many spot checks that are no "
        "closer to the limit of drift, or know no more within it; without it, none do.",
    )
    min_delta: float = Field(0.0, ge=0, description="A loss is better if it is lower than the best by more than this.")
    every: Rhythm | None = Field(
        None,
        description="How often the model in training is spot-checked: asked what is new, in wordings that are not trained where there are "
        "any, and measured for drift. Without it, never (methods full, lora and qlora).",
    )
    learned: str | None = Field(
        None,
        description="Share of those questions that are answered when the run ends, such as `>= 90%`; without it, `>= 95%`.",
    )
    drift: str | None = Field(
        None,
        description="The most drift that the run may end with, in nats a token: `<= 0.1`; without it, what `gate.drift` says.",
    )
    interpolate: bool = Field(
        default=False,
        description="Publish, of the points at 90 and 80 % of the way from what the run began with to what it learned, the nearest one that "
        "answers as much at a spot check and drifts less (methods lora and qlora, one process).",
    )

    @field_validator("learned", "drift")
    @classmethod
    def _a_rule(cls, text: str | None, info: ValidationInfo) -> str | None:
        return None if text is None else parse_rule(_RULES_OF_SPOT_CHECKS[info.field_name or ""], text).text

    @model_validator(mode="after")
    def _limits_of_spot_checks(self) -> EarlyStopping:
        if self.every is None and (self.learned is not None or self.drift is not None):
            raise ValueError(
                "`learned` and `drift` are limits of spot checks; write `every` with them, such as 20 steps"
            )
        if self.every is None and self.interpolate:
            raise ValueError("`interpolate` rests on spot checks; write `every` with it, such as 20 steps")
        if self.learned is not None and "champion" in self.learned:
            raise ValueError(
                f"{self.learned!r} names the champion, whom no spot check asks; write for example '>= 95%'"
            )
        return self


class Train(Section):
    """The optimization itself."""

    learning_rate: float = Field(
        2e-6,
        gt=0,
        description="Peak learning rate; without it, ten times as much where an adapter learns (lora, qlora, dpo).",
    )
    expert_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of the experts of a mixture; without it, that of all weights."
    )
    local_blocks: int = Field(
        1,
        ge=1,
        description="Experimental: blocks of layers that learn by themselves, with no gradient between them (methods full and "
        "pretrain); 1 is ordinary backpropagation.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="AdamW with moments of 32 bits, or of 8 (bitsandbytes); paged ones leave a GPU that is full, and elsewhere "
        "stay in memory.",
    )
    epochs: int = Field(5, ge=1, description="Passes over the data.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps, whatever `epochs` says."
    )
    batch_size: int = Field(
        4, ge=1, description="Examples in a micro-batch; they are laid end to end, without padding."
    )
    tokens_per_batch: Tokens | None = Field(
        None,
        ge=1,
        description="Fill each micro-batch with whole examples up to this many tokens, in place of `batch_size`.",
    )
    accumulation_steps: int = Field(4, ge=1, description="Micro-batches per optimizer step.")
    max_seq_len: Tokens = Field(
        1024,
        ge=8,
        description="Longest example in tokens, question and answer together; the rest is cut, and the plan says how much.",
    )
    max_cut_share: Share = Field(
        0.5, description="The run does not start if more than this share of the tokens that would carry loss is cut."
    )
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled decay of matrices; norms, biases and embeddings have none."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Global gradient norm above which gradients are scaled down; 0 turns clipping off."
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="The schedule ends at this share of the peak.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Compute dtype; `auto` probes the device and takes fp32 where bf16 is slow."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: about a third more time, far fewer bytes.",
    )
    compile: bool = Field(default=False, description="torch.compile; loses on small models on a CPU.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; without it, one per physical core.")
    num_processes: int = Field(
        1,
        ge=1,
        description="Processes on this machine that train together, one a GPU; torchrun sets it for several machines.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="What several processes share among them: 0 nothing; 1 and 2 parameters, gradients and moments between "
        "the steps; 3 during them, too, which is slower and takes least.",
    )
    num_workers: int = Field(1, ge=1, description="Processes that turn text into tokens before step 1.")
    seed: int = Field(42, ge=0, description="Seeds weights, order and dropout.")
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.")
    evaluate_every: Rhythm | None = Field(
        None, description="How often the held-out loss is taken; without it, at the end of each epoch."
    )
    early_stopping: EarlyStopping = Field(
        default_factory=EarlyStopping, description="When a run ends before its last step."
    )


class Lora(Section):
    """Low-rank adapters (methods lora, qlora, dpo)."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter.")
    init: Literal["default", "null_space"] = Field(
        "default",
        description="How a fresh adapter begins. null_space: on linear layers it learns only in directions that the model's own general "
        "answers hardly use, and needs a higher learning rate (methods lora and qlora, with `rehearse.prompts`).",
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="`all-linear` (with the experts of a mixture), `attention`, `experts`, or names of modules: a list, or "
        "`q_proj,v_proj`; a pattern is matched with whole names.",
    )

    @field_validator("target_modules")
    @classmethod
    def _names(cls, targets: str | list[str]) -> str | list[str]:
        if targets in ("all-linear", ["all-linear"]):  # the second where only lists can be written
            return "all-linear"
        if isinstance(targets, list):
            return targets
        names = [name.strip() for name in targets.split(",") if name.strip()]
        return names if names and all(re.fullmatch(r"[\w.]+", name) for name in names) else targets


class Quantization(Section):
    """How the base is kept below the adapter (method: qlora); bitsandbytes does it, on a CPU as on a GPU."""

    bits: Literal[4, 8] = Field(
        4, description="Of each weight of a linear layer or expert; embeddings and the head stay as they are."
    )
    type: Literal["nf4", "fp4"] = Field("nf4", description="Of 4 bits: nf4 fits weights that are spread normally.")
    double: bool = Field(
        default=True, description="Of 4 bits: quantise the scales, too, which saves 0.4 bits a weight."
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of 4 bits: what products run in; `auto` takes that of train.dtype."
    )

    @property
    def label(self) -> str:
        """The name of the quantisation in a reference, `base[nf4-double]`."""
        return "int8" if self.bits == 8 else self.type + ("-double" if self.double else "")


class Dpo(Section):
    """Preference optimization of an adapter (method: dpo)."""

    beta: float = Field(
        0.1, gt=0, description="How much of the log-likelihood ratio counts as reward: lower lets answers move further."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="How often a pair is taken to be the wrong way round; for noisy preferences."
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        description="Adds so many times the better answer's loss, in nats a token, so that it is learned, too.",
    )


class Shape(Section):
    """The shape of a new model where it differs from its preset's; a field that the architecture lacks is refused."""

    num_hidden_layers: int | None = Field(None, ge=1, description="Layers.")
    hidden_size: int | None = Field(None, ge=1, description="Width.")
    intermediate_size: int | None = Field(None, ge=1, description="Width of the feed-forward part.")
    num_attention_heads: int | None = Field(None, ge=1, description="Heads.")
    num_key_value_heads: int | None = Field(None, ge=1, description="Heads of keys and values, where they are shared.")
    head_dim: int | None = Field(None, ge=1, description="Channels of a head, where they are not width / heads.")
    max_position_embeddings: int | None = Field(None, ge=1, description="Longest context in tokens.")
    tie_word_embeddings: bool | None = Field(None, description="Whether the head is the embedding.")
    num_experts: int | None = Field(None, ge=1, description="Experts in each layer of a mixture.")
    num_active_experts: int | None = Field(None, ge=1, description="Experts that each token is sent to.")
    expert_size: int | None = Field(
        None, ge=1, description="Width of an expert; without it, what brings a preset to the parameters of its name."
    )
    shared_expert_size: int | None = Field(
        None,
        ge=1,
        description="Width of one more expert in each layer of a mixture, through which all tokens pass; without it there is none.",
    )

    def given(self) -> dict[str, int | bool]:
        """The fields that the recipe writes."""
        return self.model_dump(exclude_none=True)


class Experts(Section):
    """The experts of a mixture, and how their routers learn, where all weights do (methods full and pretrain; `tier` also below an
    adapter of method lora or qlora).
    """

    tier: Literal["device", "host", "disk"] = Field(
        "device",
        description="Where experts live, with their gradients and moments where they learn: with all other weights, in the host's "
        "memory, or in a file. On a CPU the first two are the same memory.",
    )
    resident: int = Field(
        4, ge=2, description="Experts that are in memory at a time, of all layers, where they live in a file."
    )

    load_balancing_loss_coef: float = Field(
        0.01,
        ge=0,
        description="Weight of the loss that spreads tokens over experts, in each layer; 0 for none. The load of an expert is its "
        "share of the whole step before.",
    )
    z_loss_coef: float = Field(
        0.001, ge=0, description="Weight of the loss that keeps the logits of an expert router small; 0 for none."
    )
    bias_update_rate: float = Field(
        0.001,
        ge=0,
        description="How much the bias that corrects the choice of an expert router changes in a step, where it has one (DeepSeek-V3, "
        "GLM-4-MoE), in place of both losses; 0 for not at all.",
    )


class Pretrain(Section):
    """Learning from token shards (method: pretrain)."""

    max_files: int | None = Field(
        None, ge=1, description="Use this many shards, in the order of their names; all without it."
    )
    group_shards: int = Field(
        16, ge=1, description="Shards that are shuffled among each other; so many are at hand at a time."
    )
    loss_across_documents: bool = Field(
        default=False,
        description="Let a document see the one before it, and its first token carry loss. Faster where documents are short.",
    )
    held_out_tokens: Tokens = Field(
        100_000, ge=0, description="At most about this many tokens are held out, whatever `held_out.share` says."
    )
    sample_tokens: int = Field(
        48, ge=0, description="Tokens of the continuation that is written down with each held-out loss; 0 for none."
    )
    cache_limit: ByteCount = Field(
        50_000_000_000, ge=1, description="Room on disk for shards that are fetched from a bucket: `50 GB`."
    )
