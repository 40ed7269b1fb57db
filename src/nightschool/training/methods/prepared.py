"""What a method makes of a recipe: a run that is ready to start, whatever trains in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch

from nightschool.config.recipe import Recipe
from nightschool.data.example import Example
from nightschool.errors import ModelError
from nightschool.layers.forward import ForwardPath
from nightschool.models.dtype import DtypeChoice
from nightschool.models.load import LoadedModel
from nightschool.store.home import Home
from nightschool.training.checkpoint.full_state import CheckpointContext
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.environment import Rerun
from nightschool.training.loop import Budget
from nightschool.training.optimizer import Schedule
from nightschool.training.planning.loss_mask_preview import Span
from nightschool.training.state import TrainState
from nightschool.training.task import CausalTask

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class PlanRow:
    """A line of the plan: for people, and the same as `facts` for programs. Without a label it is not printed."""

    label: str
    text: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class MethodPlan:
    """What a method adds to the plan of its run.

    `tokens_computed` are those of the whole run, `largest_batch_tokens` those of one micro-batch in one process.
    `sequence_tokens` is given where all sequences are equally long. Findings and notes are printed below the rows; `masked`
    says of what the `loss_masks` are.
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


@dataclass(frozen=True, kw_only=True)
class PreparedRun(ABC):
    """A run that is ready to start; nothing in it has been trained. A method is a subclass, and an entry of `METHODS`."""

    recipe: Recipe
    loaded: LoadedModel
    dtype: DtypeChoice
    num_threads: int
    task: CausalTask[Any]
    budget: Budget
    scaler: torch.amp.GradScaler | None

    # Settings of `train` that this method may resume with other values of, besides those that all may.
    free_to_change: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    @abstractmethod
    def prepare(
        cls,
        recipe: Recipe,
        home: Home,
        *,
        root: Path,
        folder: Path | None = None,
        rerun: Rerun | None = None,
        world: World = ALONE,
        sample: int | None = None,
    ) -> Self:
        """Read the data, load the base and set the task up; seeds all generators on the way.

        Args:
            recipe: What is wanted.
            home: Whose registry is asked for bases, and whose cache is used.
            root: Where relative paths begin.
            folder: That of the run. What was selected for it lies there; where nothing does, process 0 selects, once.
            rerun: What the checkpoint to go on from says about the machine's choices.
            world: The processes that train together; all of them call this.
            sample: For a plan: look at about so many examples where there are more.
        """

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
        """Returns the held-out loss in nats per token and its tokens; None where nothing is held out."""

    @abstractmethod
    def plan_rows(self, num_processes: int) -> MethodPlan:
        """What the plan says of this run besides what it says of all; `num_processes` is how many it will have."""

    def figures(self, state: TrainState) -> Callable[[dict[str, Any]], dict[str, Any]] | None:  # noqa: ARG002
        """What a row of metrics says beside loss and speed: called with the row, from `state` on."""
        return None

    def sample(self) -> tuple[str, str] | None:
        """A prompt and how the model goes on, to be read beside the held-out loss; None where none is wanted."""
        return None

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


# Settings of `train` that do not change the course of training, or that the schedule and the batches compare already.
_FREE = frozenset(
    {
        "epochs", "max_steps", "learning_rate", "lr_schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "beta1",
        "beta2", "epsilon", "max_cut_share", "dtype", "device", "num_threads", "num_processes", "zero_stage", "num_workers", "log_every",
        "evaluate_every", "gradient_checkpointing", "compile",
    }
)  # fmt: skip


def budget_of(recipe: Recipe, steps_total: int) -> Budget:
    """How long the run is, and how often it looks up."""
    train = recipe.train
    return Budget(
        steps_total=steps_total,
        accumulation_steps=train.accumulation_steps,
        max_grad_norm=train.max_grad_norm,
        log_every=train.log_every,
        evaluate_every=train.evaluate_every,
        save_every=recipe.checkpoints.every,
    )


def scaler_for(dtype: DtypeChoice, device: torch.device) -> torch.amp.GradScaler | None:
    """The gradient scaler, where the compute dtype needs one."""
    return torch.amp.GradScaler(device.type) if dtype.needs_loss_scaling else None


def wanted_dtype(recipe: Recipe, rerun: Rerun | None) -> Any:
    """What the recipe asks for; for a resumed run what its checkpoint was computed in, where the recipe leaves it open."""
    return rerun.compute_dtype if rerun and recipe.train.dtype == "auto" else recipe.train.dtype


def hidden_size_of(loaded: LoadedModel) -> int:
    return int(cast(Any, loaded.model).config.get_text_config().hidden_size)


def refuse_what_cannot_be_served(recipe: Recipe, path: ForwardPath) -> None:
    """Raise ModelError, before a night is spent, if the server would refuse what this base becomes.

    Serving sends each token to its own row of a cache by replacing attention, just as packing keeps documents apart, and
    both are found out by numbers. They go together: 25 architectures were put to both questions, and none got two answers.
    """
    if recipe.serve.promote != "never" and not path.packed:
        raise ModelError(
            f"The base {recipe.base} can be trained, but neither examined nor served: {path.why_padded}. Take a base whose "
            "layers are all ordinary attention, or write serve.promote: never to train candidates for use elsewhere."
        )
