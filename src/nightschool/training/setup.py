"""Everything that a run needs before step 1, put together from a recipe: examples, model, batches, task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nightschool.config.recipe import Lora, Recipe
from nightschool.data.batches import Batches
from nightschool.data.chat.render import Rendered, ensure_template
from nightschool.data.chat.render_examples import render_examples
from nightschool.data.example import Example
from nightschool.data.tokenizer import train_bpe
from nightschool.errors import ModelError, NothingToTrain, UsageError
from nightschool.feedback.selection import Selection
from nightschool.layers.forward import ForwardPath
from nightschool.models.adapters import attach_lora
from nightschool.models.dtype import DtypeChoice, num_threads_here, resolve_device, resolve_dtype
from nightschool.models.load import LoadedModel, load_base
from nightschool.models.stored import StoredWeights, stored_weights
from nightschool.store.atomic import publish_directory
from nightschool.store.home import Home
from nightschool.training.checkpoint import rng
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.loop import Budget, steps_in_epoch
from nightschool.training.methods.causal import FinetuneTask, PretrainTask
from nightschool.training.optimizer import Schedule
from nightschool.training.planning.precision import choose_by_measuring

# What a `new:` model's tokenizer holds at most; few texts give fewer entries.
NEW_VOCAB_SIZE = 2048
HELD_OUT_TOKENS_PER_BATCH = 2048
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Rerun:
    """What a resumed run takes from its checkpoint instead of measuring it again."""

    compute_dtype: str
    num_threads: int
    world_size: int = 1


@dataclass(frozen=True)
class RenderedData:
    """The examples as tokens. `chats` are in the order of the chat examples, one document each."""

    chat_examples: list[Example]
    chats: list[Rendered]
    texts: list[Rendered]

    @property
    def all(self) -> list[Rendered]:
        return [*self.chats, *self.texts]


@dataclass(frozen=True, kw_only=True)
class PreparedRun(ABC):
    """A run that is ready to start, whatever its method; nothing in it has been trained."""

    recipe: Recipe
    loaded: LoadedModel
    dtype: DtypeChoice
    num_threads: int
    task: FinetuneTask | PretrainTask
    budget: Budget
    schedule: Schedule
    scaler: torch.amp.GradScaler | None

    @property
    @abstractmethod
    def num_files(self) -> int:
        """Files that the data came from."""

    @property
    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """What the finished version may be asked to see that it is loaded rightly."""

    @property
    @abstractmethod
    def evaluate(self) -> Callable[[], tuple[float, int]] | None:
        """Returns the held-out loss in nats per token and its tokens; None where nothing is held out."""


@dataclass(frozen=True, kw_only=True)
class PreparedFinetune(PreparedRun):
    """Fine-tuning that is ready to start."""

    task: FinetuneTask
    selection: Selection
    rendered_data: RenderedData
    held_out: Batches | None

    @property
    def num_files(self) -> int:
        return self.selection.num_files

    @property
    def examples(self) -> Sequence[Example]:
        return self.selection.new

    @property
    def evaluate(self) -> Callable[[], tuple[float, int]] | None:
        held_out = self.held_out
        return None if held_out is None else partial(self.task.heldout_loss, held_out)


def prepare_finetune(
    recipe: Recipe,
    selection: Selection,
    home: Home,
    *,
    root: Path | None = None,
    tokenizer_folder: Path | None = None,
    rerun: Rerun | None = None,
    world: World = ALONE,
) -> PreparedFinetune:
    """Load the base, render the examples, and set the task up; seeds all generators on the way.

    Args:
        recipe: What is wanted.
        selection: The examples.
        home: Whose registry is asked for bases.
        root: Where relative paths begin.
        tokenizer_folder: Where the tokenizer of a `new:` base is kept; read if it is there, else written.
        rerun: What a checkpoint says about the machine's choices.
        world: The processes that train together.

    Raises:
        NothingToTrain: If no token would carry loss, or more than `train.max_cut_share` of those that would is cut.
        ModelError: If the base cannot be loaded, or does not fit the recipe.
        DataError: If examples cannot be rendered.
    """
    train = recipe.train
    device, num_threads = set_up_machine(recipe, rerun, world)

    with world.first_goes_first():
        tokenizer = _new_tokenizer(selection, tokenizer_folder) if recipe.base.startswith("new:") else None
    wanted = cast(Any, rerun.compute_dtype if rerun and train.dtype == "auto" else train.dtype)
    stored = _stored_in_16_bits(recipe, home, root)
    base_dtype = torch.float32
    # The compute dtype alone decides, without measuring steps, which would need the base in both formats. A checkpoint
    # keeps that dtype, so a resumed run has the same base bit by bit.
    if stored and resolve_dtype(wanted, device, hidden_size=stored.hidden_size).compute != torch.float32:
        base_dtype = stored.dtype
    loaded = _load(recipe, home, tokenizer, device, base_dtype, root)
    ensure_template(loaded.tokenizer)
    rendered_data = render_data(loaded.tokenizer, selection.train, train.max_seq_len, train.num_workers)
    refuse_nothing_to_train(rendered_data.all, train.max_seq_len, train.max_cut_share)
    hidden_size = int(cast(Any, loaded.model).config.get_text_config().hidden_size)
    dtype = resolve_dtype(wanted, device, hidden_size=hidden_size)

    size: dict[str, int | None] = {"batch_size": train.batch_size, "tokens_per_batch": None}
    if train.tokens_per_batch is not None:
        size = {"batch_size": None, "tokens_per_batch": train.tokens_per_batch}
    batches = Batches(rendered_data.all, **size, seed=train.seed)
    task = FinetuneTask(loaded.model, batches, train, compute_dtype=dtype.compute, world=world)
    if recipe.serve.promote != "never":
        refuse_what_cannot_be_served(task.path, recipe.base)
    if base_dtype != torch.float32:
        dtype = replace(dtype, why=f"{dtype.why}; the frozen base stays in {DTYPE_NAMES[base_dtype]}, as it is stored")
    elif wanted == "auto" and device.type == "cpu" and stored is None:
        dtype = choose_by_measuring(task, dtype, hidden_size)
    if world.size > 1:
        rng.seed_everything(train.seed + world.rank)  # dropout of its own for each process, the same weights for all
    budget = make_budget(recipe, batches, world)
    return PreparedFinetune(
        recipe=recipe,
        selection=selection,
        rendered_data=rendered_data,
        loaded=loaded,
        dtype=dtype,
        num_threads=num_threads,
        task=task,
        held_out=_held_out(loaded.tokenizer, selection.held_out, train.max_seq_len),
        budget=budget,
        schedule=Schedule.from_recipe(train, budget.steps_total),
        scaler=torch.amp.GradScaler(device.type) if dtype.needs_loss_scaling else None,
    )


def render_data(tokenizer: Any, examples: Sequence[Example], max_seq_len: int, num_workers: int) -> RenderedData:
    """Render chats, one document each, and texts, as many documents as they need."""
    chats = [example for example in examples if example.messages]
    texts = [example for example in examples if not example.messages]
    return RenderedData(
        chats,
        render_examples(tokenizer, chats, max_seq_len, num_workers=num_workers),
        render_examples(tokenizer, texts, max_seq_len, num_workers=num_workers),
    )


def refuse_nothing_to_train(rendered: Sequence[Rendered], max_seq_len: int, max_cut_share: float) -> None:
    """Raise NothingToTrain if nothing, or too little, of what should be trained would be."""
    trained = sum(document.trained_tokens for document in rendered)
    cut = sum(document.cut_trained for document in rendered)
    if trained == 0:
        why = f"all {cut} of them are cut off by train.max_seq_len={max_seq_len}" if cut else "the data has none"
        raise NothingToTrain(
            f"No token of the {len(rendered)} examples would carry loss: {why}. "
            + ("Raise train.max_seq_len." if cut else "Examples need an answer, with a weight above 0.")
        )
    share = cut / (cut + trained)
    if share > max_cut_share:
        raise NothingToTrain(
            f"train.max_seq_len={max_seq_len} cuts off {share:.0%} of the {cut + trained} tokens that would carry loss, "
            f"and train.max_cut_share allows {max_cut_share:.0%}. Raise one of the two, or shorten the examples."
        )


def refuse_what_cannot_be_served(path: ForwardPath, base: str) -> None:
    """Raise ModelError, before a night is spent, if the server would refuse what this base becomes.

    Serving sends each token to its own row of a cache by replacing attention, just as packing keeps documents apart, and
    both are found out by numbers. They go together: 25 architectures were put to both questions, and none got two answers.
    """
    if not path.packed:
        raise ModelError(
            f"The base {base} can be trained, but neither examined nor served: {path.why_padded}. Take a base whose "
            "layers are all ordinary attention, or write serve.promote: never to train candidates for use elsewhere."
        )


def set_up_machine(recipe: Recipe, rerun: Rerun | None, world: World) -> tuple[torch.device, int]:
    """Choose device and threads, seed all generators, and ask a CPU for the same numbers every time."""
    device, num_threads = resolve_device(recipe.train.device), _threads_of(recipe, rerun, world)
    torch.set_num_threads(num_threads)
    rng.seed_everything(recipe.train.seed)
    if device.type == "cpu":
        rng.require_determinism()
    return device, num_threads


def _threads_of(recipe: Recipe, rerun: Rerun | None, world: World) -> int:
    """CPU threads of this process: what the recipe or the checkpoint says, else its part of the cores."""
    if recipe.train.num_threads is not None:
        return recipe.train.num_threads
    if rerun is not None and rerun.world_size == world.size:
        return rerun.num_threads
    return max(1, num_threads_here() // world.local_size)


def make_budget(recipe: Recipe, batches: Batches, world: World = ALONE) -> Budget:
    """How many steps the recipe means, and how often it looks up."""
    train = recipe.train
    steps_total = train.max_steps or sum(
        steps_in_epoch(batches.num_batches(epoch), train.accumulation_steps, world.size)
        for epoch in range(train.epochs)
    )
    return Budget(
        steps_total=steps_total,
        accumulation_steps=train.accumulation_steps,
        max_grad_norm=train.max_grad_norm,
        log_every=train.log_every,
        evaluate_every=train.evaluate_every,
        save_every=recipe.checkpoints.every,
    )


def _new_tokenizer(selection: Selection, folder: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a `new:` model, learned from its examples, or taken from `folder` where it was kept."""
    if folder is not None and folder.is_dir():
        kept: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return kept
    texts = [
        text
        for example in [*selection.train, *selection.held_out]
        for text in ([message.content for message in example.messages] or [example.text or ""])
    ]
    tokenizer = train_bpe(texts, NEW_VOCAB_SIZE)
    if folder is not None:
        with publish_directory(folder) as partial:
            tokenizer.save_pretrained(str(partial))
    return tokenizer


def _stored_in_16_bits(recipe: Recipe, home: Home, root: Path | None) -> StoredWeights | None:
    """The base below an adapter if its files hold 16-bit numbers, which need not be widened: nothing is added to them."""
    if recipe.method != "lora" or recipe.base.startswith("new:"):
        return None
    stored = stored_weights(recipe.base, home, root)
    return None if stored.dtype == torch.float32 else stored


def _load(
    recipe: Recipe,
    home: Home,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    base_dtype: torch.dtype,
    root: Path | None,
) -> LoadedModel:
    """The base as the method wants it: all weights free, or frozen below an adapter, a fresh one or the base's own."""
    lora = recipe.method == "lora"
    if lora and recipe.base.startswith("new:"):
        raise UsageError(
            f"method: lora needs a base that knows something, and base: {recipe.base} is made of random weights. "
            "Write method: full, or another base."
        )
    loaded = load_base(
        recipe.base,
        home,
        dtype=base_dtype,
        device=device,
        tokenizer=tokenizer,
        seed=recipe.train.seed,
        merge=not lora,
        root=root,
        shape=recipe.shape.given(),
    )
    if lora and loaded.adapter:
        _refuse_other_lora(cast(PeftModel, loaded.model), recipe.lora, loaded.ref)
        return loaded
    if lora:
        frozen = cast(PreTrainedModel, loaded.model)
        wrapped = attach_lora(frozen, recipe.lora, recipe.train.seed, base_path=loaded.base_location)
        return LoadedModel(**(vars(loaded) | {"model": wrapped, "adapter": True}))
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(True)  # noqa: FBT003 - its only argument
    return loaded


def _refuse_other_lora(model: PeftModel, lora: Lora, ref: str) -> None:
    """An adapter goes on with the rank and the places that it has; dropout may change from run to run."""
    config: Any = model.peft_config["default"]
    wanted = lora.target_modules
    has = config.target_modules or ()
    if not isinstance(wanted, str) and not isinstance(has, str) and set(wanted) != set(has):
        raise ModelError(
            f"The recipe has lora.target_modules={', '.join(wanted)}, but the adapter {ref} has "
            f"{', '.join(sorted(has))}. Write the adapter's, or start again from its base."
        )
    if (config.r, float(config.lora_alpha)) != (lora.r, float(lora.alpha)):
        raise ModelError(
            f"The recipe has lora.r={lora.r} and lora.alpha={lora.alpha:g}, but the adapter {ref} has r={config.r} and "
            f"alpha={config.lora_alpha:g}. Write the adapter's, or start again from its base."
        )
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, torch.nn.ModuleDict):
            for name in dropouts:
                dropouts[name] = torch.nn.Dropout(lora.dropout) if lora.dropout > 0 else torch.nn.Identity()


def _held_out(tokenizer: Any, examples: Sequence[Example], max_seq_len: int) -> Batches | None:
    """The held-out examples in batches, or None if there is none with an answer that fits."""
    rendered = [r for r in render_data(tokenizer, examples, max_seq_len, 1).all if r.trained_tokens]
    return Batches(rendered, tokens_per_batch=HELD_OUT_TOKENS_PER_BATCH, seed=0) if rendered else None
