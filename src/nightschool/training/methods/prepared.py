"""What a method makes of a recipe: a run that is ready to start, whatever trains in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from transformers import PreTrainedTokenizerBase

from nightschool.config.recipe import ADAPTER_METHODS, Recipe
from nightschool.data.chat.loss_mask_preview import Span
from nightschool.data.example import Example
from nightschool.errors import ModelError, StateMismatch
from nightschool.evaluation.spot_check import Limits, SpotCheck
from nightschool.models.dtype import DtypeChoice, resolve_dtype
from nightschool.models.load import LoadedModel, load_base
from nightschool.models.quantize import quantization_of
from nightschool.models.stored import StoredWeights
from nightschool.models.streamed import ExpertPlace, expert_stream
from nightschool.models.version_folder import OnWritten, write_version
from nightschool.store import checkpoints
from nightschool.store.atomic import read_json
from nightschool.store.checkpoints import Checkpoint
from nightschool.store.home import Home
from nightschool.store.versions import VersionKind
from nightschool.training.checkpoint import rng
from nightschool.training.checkpoint.full_state import CheckpointContext, load_weights
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.environment import Rerun, set_up_machine
from nightschool.training.interpolation import Weights
from nightschool.training.loop import steps_in_epoch
from nightschool.training.optimizer import Schedule, optimizer_class
from nightschool.training.planning.asking import Asking
from nightschool.training.planning.plan_row import PlanRow
from nightschool.training.planning.speed import choose_by_measuring
from nightschool.training.state import Budget, TrainState
from nightschool.training.streamed_version import write_streamed_version
from nightschool.training.task import Task

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class MethodPlan:
    """What a method adds to the plan of its run.

    `tokens_computed` are those of the whole run, `largest_batch_tokens` those of one micro-batch in one process.
    `sequence_tokens` is given where all sequences are equally long. Findings and notes are printed below the rows; `masked`
    says of what the `loss_masks` are. `bytes_before` are held, beside the parameters, by what is computed before step 1 alone.
    """

    rows: list[PlanRow]
    tokens_computed: float
    steps_total: int
    largest_batch_tokens: int
    loss_masks: list[list[Span]]
    masked: str
    findings: list[str]
    notes: list[str] | None = None
    processes: int = 1
    sequence_tokens: int | None = None
    bytes_before: int = 0


@dataclass(frozen=True)
class Setup:
    """What a method is asked to prepare a run from.

    `root` is where relative paths begin. In `folder`, that of the run, lies what was selected for it; where nothing does,
    process 0 selects, once. `rerun` is what the checkpoint to go on from says about the machine's choices. With `sample`, a
    plan looks at about so many examples where there are more. `load_base` finds the base, where it is loaded already.
    """

    recipe: Recipe
    home: Home
    root: Path
    folder: Path | None = None
    rerun: Rerun | None = None
    world: World = ALONE
    sample: int | None = None
    load_base: Callable[..., LoadedModel] = load_base


Data = TypeVar("Data")


@dataclass(frozen=True, kw_only=True)
class PreparedRun(ABC, Generic[Data]):
    """A run that is ready to start; nothing in it has been trained. A method is a subclass, and an entry of `METHODS`.

    `data` is what the method read for it.
    """

    recipe: Recipe
    data: Data
    loaded: LoadedModel
    dtype: DtypeChoice
    num_threads: int
    task: Task
    budget: Budget
    scaler: torch.amp.GradScaler | None

    # What a loss is a mean over.
    loss_unit: ClassVar[str] = "tokens"
    # Settings of `train` that this method may resume with other values of, besides those that all may.
    free_to_change: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Read the data, load the base and set the task up; seeds all generators on the way. All processes call this.

        Raises:
            NightschoolError: As the method's `read`, `load` and `make_task` say.
        """
        recipe, world, train = setup.recipe, setup.world, setup.recipe.train
        device, num_threads = set_up_machine(recipe, setup.rerun, world)
        with world.first_goes_first():
            data, tokenizer = cls.read(setup)
        # A resumed run computes in what its checkpoint was computed in, where the recipe leaves it open.
        wanted: Any = setup.rerun.compute_dtype if setup.rerun and train.dtype == "auto" else train.dtype
        stored, base_dtype = cls.stored_in_16_bits(setup), torch.float32
        # The compute dtype alone decides, without measuring steps, which would need the base in both formats. A checkpoint
        # keeps that dtype, so a resumed run has the same base bit by bit.
        if stored and resolve_dtype(wanted, device, hidden_size=stored.hidden_size).compute != torch.float32:
            base_dtype = stored.dtype
        load = partial(
            setup.load_base, cls.base_of(recipe), setup.home, dtype=base_dtype, device=device, tokenizer=tokenizer, seed=train.seed,
            root=setup.root, shape=recipe.shape.given(), experts=_place_of_experts(setup),
            moment_bytes=optimizer_class(train).moment_bytes / (world.size if train.zero_stage else 1),
        )  # fmt: skip
        loaded = cls.load(recipe, load)
        hidden_size = int(cast(Any, loaded.model).config.get_text_config().hidden_size)
        dtype = resolve_dtype(wanted, device, hidden_size=hidden_size)
        data, task = cls.make_task(setup, data, loaded, dtype.compute)
        if recipe.serve.promote != "never" and task.why_not_served:
            raise ModelError(
                f"The base {recipe.base} can be trained, but neither examined nor served: {task.why_not_served}. Take a base "
                "whose layers are all ordinary attention, or write serve.promote: never to train candidates for use elsewhere."
            )
        if base_dtype != torch.float32:
            name = DTYPE_NAMES[base_dtype]
            dtype = replace(dtype, why=f"{dtype.why}; the frozen base stays in {name}, as it is stored")
        elif wanted == "auto" and device.type == "cpu" and stored is None:
            dtype = choose_by_measuring(task, dtype, hidden_size)
        rng.seed_everything(train.seed + world.rank)  # dropout of its own for each process, the same weights for all
        steps_total = train.max_steps or sum(
            steps_in_epoch(task.epoch_length(epoch), train.accumulation_steps, task.stride)
            for epoch in range(train.epochs)
        )
        prepared = cls(
            recipe=recipe,
            data=data,
            loaded=loaded,
            dtype=dtype,
            num_threads=num_threads,
            task=task,
            budget=Budget(
                steps_total=steps_total,
                accumulation_steps=train.accumulation_steps,
                max_grad_norm=train.max_grad_norm,
                log_every=train.log_every,
                evaluate_every=train.evaluate_every,
                save_every=recipe.checkpoints.every,
                save_each_epoch=recipe.checkpoints.each_epoch,
                patience=train.early_stopping.patience,
                min_delta=train.early_stopping.min_delta,
                check_every=train.early_stopping.every,
                enough=Limits.to_end(recipe),
                good=Limits.to_pass(recipe),
            ),
            scaler=torch.amp.GradScaler(device.type) if dtype.needs_loss_scaling else None,
        )
        if recipe.from_checkpoint is not None and setup.rerun is None:
            prepared._take_weights_of(checkpoints.find(setup.home, recipe.from_checkpoint, setup.root))
        return prepared

    def _take_weights_of(self, point: Checkpoint) -> None:
        """Begin with the weights of a checkpoint of another run.

        Raises:
            StateMismatch: If its tensors are not those that learn here, or its adapter stands on another base.
        """
        load_weights(point.path, self.task)
        theirs = read_json(point.path / "state.json").get("base_fingerprint")
        if theirs is not None and theirs != self.base_fingerprint():
            raise StateMismatch(
                f"The adapter of {point.name} stands on other weights than {self.loaded.base_ref}. Write the base of its run, "
                "which its recipe.yaml names."
            )

    @classmethod
    @abstractmethod
    def read(cls, setup: Setup) -> tuple[Data, PreTrainedTokenizerBase | None]:
        """Read the data, process 0 first; and the tokenizer, where the base's own is not meant."""

    @classmethod
    def base_of(cls, recipe: Recipe) -> str:
        """The reference of the weights that are loaded."""
        return recipe.base

    @classmethod
    def stored_in_16_bits(cls, setup: Setup) -> StoredWeights | None:  # noqa: ARG003
        """The base if it may keep the 16-bit numbers of its files. Weights that learn may not."""
        return None

    @classmethod
    def load(cls, recipe: Recipe, load: Callable[..., LoadedModel]) -> LoadedModel:
        """What learns: the base, all of whose weights are free."""
        loaded = load()
        if quantization_of(loaded.model) is not None:
            raise ModelError(
                f"method: {recipe.method} trains all weights, and those of {loaded.ref} are quantised. Take method: qlora, or "
                "the base without its […]."
            )
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(True)  # noqa: FBT003 - its only argument
        return loaded

    @classmethod
    @abstractmethod
    def make_task(cls, setup: Setup, data: Data, loaded: LoadedModel, compute_dtype: torch.dtype) -> tuple[Data, Task]:
        """The task, with an optimizer of its own, and the data with what was made of them by the model's tokenizer."""

    @property
    def schedule(self) -> Schedule:
        return Schedule.from_recipe(self.recipe.train, self.budget.steps_total)

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
        """Returns the held-out loss in nats and over how many `loss_unit`s it is the mean; None where nothing is held out."""

    @property
    def spot_check(self) -> Callable[[int], SpotCheck] | None:
        """Returns what the model has learned by a step, and its drift; None where nobody asks. All processes call it."""
        return None

    @property
    def beginning(self) -> Weights | None:
        """The weights that the run began with, where what it learned may be published on a point between; by parameters' names."""
        return None

    def begin(self, folder: Path) -> None:
        """Compute what is needed before step 1, or read it from the run's folder, where it was left. All processes call this."""

    def asking(self) -> Asking | None:
        """What the run spends beside its steps from here on, by a measured piece of it; None where nothing is asked."""
        return None

    def stand_in(self) -> None:
        """For a plan that trains nothing: put something of equal cost where `begin` would compute something."""

    @abstractmethod
    def plan_rows(self, num_processes: int) -> MethodPlan:
        """What the plan says of this run besides what it says of all; `num_processes` is how many it will have."""

    def figures(self, state: TrainState) -> Callable[[dict[str, Any]], dict[str, Any]] | None:  # noqa: ARG002
        """What a row of metrics says beside loss and speed: called with the row, from `state` on."""
        return None

    def sample(self) -> tuple[str, str] | None:
        """A prompt and how the model goes on, to be read beside the held-out loss; None where none is wanted."""
        return None

    @property
    def version_kind(self) -> VersionKind:
        """What the finished version is."""
        return "adapter" if self.loaded.adapter else "model"

    @property
    def stands_on(self) -> str:
        """The reference of the weights that the finished version stands on, or began with."""
        return self.loaded.base_ref if self.loaded.adapter else self.recipe.base

    def write_version(self, folder: Path, on_written: OnWritten | None = None) -> float:
        """Write what was trained as the folder of a version; returns how far its logits, read again, lie from the model's.

        `on_written` is called with the folder before it is read again.

        Raises:
            ModelError: If the folder, loaded again, is not what was trained.
        """
        stream = expert_stream(self.loaded.model)
        if stream is not None and stream.learns:
            return write_streamed_version(self.loaded, stream, folder, on_written)
        return write_version(self.loaded, folder, on_written)

    def base_fingerprint(self) -> str | None:
        """The digest of weights that a checkpoint leaves out because they do not learn; None where there are none."""
        return None

    def numerics(self) -> dict[str, Any]:
        """The settings that change the course of training; a run that resumes must have equal ones."""
        train = self.recipe.train.model_dump(mode="json").items()
        free = _FREE | self.free_to_change
        return {f"train.{key}": value for key, value in train if key not in free} | {"method": self.recipe.method}

    def checkpoint_context(self, recipe_yaml: str) -> CheckpointContext:
        """What the checkpoints of this run record besides its state. Hashes the frozen weights, if there are any."""
        return CheckpointContext(
            recipe_yaml=recipe_yaml,
            base=self.recipe.base,
            base_fingerprint=self.base_fingerprint(),
            dtype=DTYPE_NAMES[self.dtype.compute],
            num_threads=self.num_threads,
            epochs_total=self.recipe.train.epochs,
            files_processed=self.num_files,
            model_config=cast(Any, self.loaded.model).config.to_dict(),
            numerics=self.numerics(),
        )


def _place_of_experts(setup: Setup) -> ExpertPlace | None:
    """Where experts live if not with all other weights: in a file on the disk of the run, or of the home for a plan."""
    experts = setup.recipe.experts
    if experts.tier == "device":
        return None
    folder = setup.folder or setup.home.path
    while not folder.is_dir():
        folder = folder.parent
    return ExpertPlace(experts.tier, folder, experts.resident, learns=setup.recipe.method not in ADAPTER_METHODS)


# Settings of `train` that do not change the course of training, or that the schedule and the batches compare already.
_FREE = frozenset(
    {
        "epochs", "max_steps", "learning_rate", "lr_schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "beta1",
        "beta2", "epsilon", "max_cut_share", "dtype", "device", "num_threads", "num_processes", "zero_stage", "num_workers", "log_every",
        "evaluate_every", "gradient_checkpointing", "compile", "optimizer", "early_stopping",
    }
)  # fmt: skip
