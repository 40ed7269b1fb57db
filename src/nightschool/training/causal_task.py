"""The task of a causal language model: its loss over documents, its optimizer, and its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from nightschool.config.recipe import Experts, Train
from nightschool.data.batches import Batch, Batches
from nightschool.data.shards.token_batches import TokenBatches
from nightschool.errors import DataError, ModelError
from nightschool.evaluation.heldout import autocast, heldout_sum, on_device
from nightschool.layers.expert_balance import ExpertBalance
from nightschool.layers.forward import ForwardPath, checkpoint_activations, draws_at_random, prepare
from nightschool.layers.layer_by_layer import LayerByLayer
from nightschool.layers.local_blocks import LocalBlocks
from nightschool.models.cost import expert_names, expert_step_bytes
from nightschool.models.streamed import expert_stream
from nightschool.models.update_cost import UpdateCost, cost_of_update
from nightschool.training.checkpoint.checkpoint_reader import StoredTensors, check_tensors
from nightschool.training.checkpoint.contents import TensorSource, sources_of
from nightschool.training.distributed.sharding import LossModule, own_parts, put, scaled_gradient, shard_model
from nightschool.training.distributed.world import ALONE, World
from nightschool.training.optimizer import NOWHERE, embedding_names, new_optimizer
from nightschool.training.streamed_experts import StreamedExperts
from nightschool.training.task import Task

Source = TypeVar("Source", bound=Batches | TokenBatches)


@dataclass(frozen=True)
class LossResult:
    """`sum` of losses in nats (a scalar with a graph) over `units`: trained tokens, or pairs."""

    sum: Tensor
    units: int


class CausalTask(Task, Generic[Source]):
    """A causal language model of `transformers`, bare or with PEFT adapters, its optimizer, and its loss over documents.

    What learns is what requires gradients when the task is made. Products run in `compute_dtype` under autocast;
    parameters and their sums stay in their own dtype. Gradients and moments lie where the parameters do.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Source,
        train: Train,
        *,
        compute_dtype: torch.dtype = torch.float32,
        world: World = ALONE,
        experts: Experts = Experts(),  # noqa: B008 - frozen
    ) -> None:
        self.model = model
        self.batches: Source = batches
        self.batch_size = train.batch_size
        self.world = world
        self.compute_dtype = compute_dtype
        self.device = next(model.parameters()).device
        self.path: ForwardPath = prepare(model)
        if train.gradient_checkpointing:
            checkpoint_activations(model)
        if train.compile:
            _compile_feed_forward(model)
        self._blocks = LocalBlocks(model, self.path, train.local_blocks)
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trainable:
            raise ModelError("No parameter of the model learns. Use method: full, or check lora.target_modules.")
        self._trainable |= self._blocks.parameters()
        self._balance = ExpertBalance(model, experts)
        self._train = train
        self._rate_factors = self._factors_of_rates(train)
        stream = expert_stream(model)
        self._elsewhere = (
            NOWHERE if stream is None or not stream.learns else StreamedExperts(stream, train, self._expert_rate_factor)
        )
        self._stacked = {
            name for name in expert_names(model) & self._trainable.keys() if self._trainable[name].ndim == 3
        }
        self.optimizer = new_optimizer(
            self._trainable, train, embedding_names(model), self._rate_factors, self._stacked
        )
        self._sharded: LossModule | None = None
        self._layer_by_layer = self._schedule()
        # Tokens that carry loss and whose label was the likeliest; on the device, so that no step waits for them.
        self.likeliest = torch.zeros((), dtype=torch.int64, device=self.device)
        self._figures: dict[str, Tensor] = {}
        self.heldout_figures: dict[str, float] = {}

    def _factors_of_rates(self, train: Train) -> dict[str, float]:
        """By name, how many times the learning rate experts learn at, if they have one of their own."""
        self._expert_rate_factor = 1.0
        if train.expert_learning_rate is None:
            return {}
        self._expert_rate_factor = train.expert_learning_rate / train.learning_rate
        names = expert_names(self.model) & self._trainable.keys()
        stream = expert_stream(self.model)
        if not names and (stream is None or not stream.learns):
            raise ModelError(
                f"train.expert_learning_rate is {train.expert_learning_rate:g}, and no expert of a mixture learns here. Take it "
                "out, or method: full or pretrain with a mixture, such as base: new:moe-tiny."
            )
        return dict.fromkeys(names, self._expert_rate_factor)

    def _schedule(self) -> LayerByLayer | None:
        """How the micro-batches of a step pass the layers: one after the other, which is None, or layer by layer.

        That is for experts that have to be moved to where they are computed with. Random numbers would be drawn in another order.
        """
        stream, train = expert_stream(self.model), self._train
        if stream is None or not stream.learns or expert_step_bytes(self.model, 1) == 0:
            return None
        if train.accumulation_steps == 1 or train.local_blocks > 1 or train.compile:
            return None
        if not (self.path.packed and self.path.fused_head) or draws_at_random(self.model):
            return None
        return LayerByLayer(self.model, stream)

    def expert_loads(self, micro_batches: int) -> int:
        return micro_batches if self._layer_by_layer is None else LayerByLayer.loads(micro_batches)

    def kept_bytes(self, tokens: int) -> int:
        return 0 if self._layer_by_layer is None else self._layer_by_layer.kept_bytes(tokens)

    @property
    def why_not_served(self) -> str:
        # Serving sends each token to its own row of a cache by replacing attention, just as packing keeps documents apart,
        # and both are found out by numbers. 25 architectures were put to both questions, and none got two answers.
        return self.path.why_padded

    @property
    def note_on_experts(self) -> str:
        """What is not kept in balance of a mixture that learns; empty where nothing is to be said."""
        return self._balance.note

    @property
    def fingerprint(self) -> str:
        return self.batches.fingerprint

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return self._trainable

    @property
    def recomputes(self) -> bool:
        """Whether layers run otherwise than the model says: twice, or compiled."""
        return self._train.gradient_checkpointing or self._train.compile

    # --- the step ---------------------------------------------------------------------------------------------------

    def accumulate(self, window: Sequence[Batch], units: int, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        self.begin_window(scaler)

        def scaled(part: Tensor) -> Tensor:
            return part if scaler is None else scaler.scale(part)

        with (
            self._balance.watching(partial(self._token_scale, window, units, scaler)),
            self._blocks.learning(lambda total: scaled(total / units)),
        ):
            # Each part is divided by the units of the window before `backward`, so the parts just add up.
            if self._layer_by_layer is not None:
                loss = self._layer_by_layer.gradients(
                    [on_device(batch, self.device) for batch in window],
                    lambda total: ((part := total / units), scaled(part)),
                    lambda: autocast(self.device, self.compute_dtype),
                    self.likeliest,
                )
            else:
                loss = self._one_by_one(window, units, scaled)
        # After all of the window, wherever its layers lie; no expert router is balanced by it, and no token counted.
        beside = [self._learn_beside(batch, units, scaled) for batch in window]
        self.end_window(loss, units)
        for name in {name for figures in beside for name in figures}:
            self._figures |= {name: torch.stack([figures[name] for figures in beside if name in figures]).sum()}
        return loss

    def _one_by_one(self, window: Sequence[Batch], units: int, scaled: Callable[[Tensor], Tensor]) -> Tensor:
        loss: Tensor | None = None
        for batch in window:
            part = self.loss(batch).sum / units
            scaled(part).backward()  # type: ignore[no-untyped-call]
            loss = part.detach() if loss is None else loss + part.detach()
        assert loss is not None, "a window has a micro-batch"
        return loss

    def _learn_beside(
        self,
        batch: Batch,  # noqa: ARG002
        units: int,  # noqa: ARG002
        scaled: Callable[[Tensor], Tensor],  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Add the gradients of what is learned beside a micro-batch of a window, which counts in no loss; here nothing is.

        Returns its part of figures that are sums over the window.
        """
        return {}

    def _token_scale(self, window: Sequence[Batch], units: int, scaler: torch.amp.GradScaler | None) -> float:
        """What gradients of a token's loss are multiplied by where it is one of a mean over all tokens of a window.

        This process's tokens together weigh as much as its part of the units, so no other one has to be asked.
        """
        tokens = sum(batch.input_ids.numel() for batch in window)
        mine = sum(batch.loss_units for batch in window) / units
        # Sharded gradients are averaged over processes, others are summed.
        return (
            (1.0 if scaler is None else scaler.get_scale())
            * (self.world.size if self.is_sharded else 1)
            * mine
            / tokens
        )

    def begin_window(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Count anew. Whoever finds the gradients in place of `accumulate` calls this before, and `end_window` after it."""
        self.likeliest.zero_()
        self._elsewhere.begin_window(scaler)

    def end_window(self, loss: Tensor, units: int) -> None:
        """Make the figures of a window whose loss is found: `token_accuracy`, with dropout as it is."""
        self._figures = {"token_accuracy": self.likeliest.to(loss.dtype) / units} | self._blocks.figures(units)

    def figures(self) -> Mapping[str, Tensor]:
        return self._figures

    def update(self, rate: float, clip: float, scaler: torch.amp.GradScaler | None, world: World) -> Tensor:
        gradients = self.optimizer.gradients_ready()
        world.add_up(self._balance.counters())
        if not self.is_sharded:  # sharded gradients are summed on their way already
            world.add_up(gradients)
        # From here on nothing is done together, and the state changes. All processes have the same figures of experts, and those of
        # all processes will be added up.
        self._figures |= {name: figure / world.size for name, figure in self._balance.take().items()}
        norm = self.optimizer.step(gradients, rate, clip, scaler, self._elsewhere)
        self._balance.correct()
        return norm

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad()
        self._elsewhere.begin_window()

    def update_cost(self) -> UpdateCost:
        def updates(parameter: nn.Parameter) -> Callable[[], object]:
            tried = new_optimizer({"tried": parameter}, self._train, set())
            return lambda: tried.step(tried.gradients_ready(), 0.0, 1.0, None).item()

        numbers = sum(parameter.numel() for parameter in self._trainable.values())
        cost = cost_of_update(updates, numbers, self.optimizer.moment_bytes, self.device)
        return cost + self._elsewhere.update_cost()

    @property
    def moving_seconds(self) -> float:
        stream = expert_stream(self.model)
        return 0.0 if stream is None else stream.store.moving_seconds

    def release(self) -> None:
        self.optimizer.release()

    def loss(self, batch: Batch) -> LossResult:
        """The loss of one micro-batch, not divided by anything."""
        with autocast(self.device, self.compute_dtype):
            loss_sum, units = self._forward(on_device(batch, self.device))
        if self.is_sharded:
            loss_sum = scaled_gradient(loss_sum, self.world.size)
        return LossResult(loss_sum, units)

    def _taught(self, batch: Batch) -> tuple[Tensor, int] | None:  # noqa: ARG002
        """The loss of a micro-batch whose words are not all that is learned, and its units; None where they are."""
        return None

    def _forward(self, batch: Batch) -> tuple[Tensor, int]:
        taught = self._taught(batch)
        if taught is not None:
            return taught
        if self._sharded is not None:
            result: tuple[Tensor, int] = self._sharded(batch, self.likeliest)
            return result
        return self._blocks.loss(self.model, self.path, batch, self.likeliest)

    def _heldout_loss(self, batches: Sequence[Callable[[], Batch]]) -> tuple[float, int]:
        """The mean over all batches, of which each process computes every `world.size`-th.

        `heldout_figures` says then how many of the tokens were the likeliest.
        """
        self.likeliest.zero_()
        size = self.world.size
        mine = list(batches[self.world.rank :: size])
        if self.is_sharded and len(mine) < -(-len(batches) // size):
            # Weights are gathered from all processes, so all of them compute as often.
            mine.append(lambda: batches[0]().without_loss())
        total, units = heldout_sum(
            self.model,
            (make() for make in mine),
            forward=self._forward,
            device=self.device,
            compute_dtype=self.compute_dtype,
        )
        total, count, likeliest = self.world.float_sums(total, units, float(self.likeliest))
        if not count:
            raise DataError("No token of the held-out data carries loss. Hold out something that has an answer.")
        self.heldout_figures = {"heldout_token_accuracy": likeliest / count}
        return total / count, int(count)

    # --- sharding ---------------------------------------------------------------------------------------------------

    @property
    def is_sharded(self) -> bool:
        return self._sharded is not None

    def shard(self, stage: int) -> None:
        """Keep only the part of parameters, gradients and moments that is this process's. All call it before step 1."""
        kept = embedding_names(self.model)
        self._sharded = shard_model(self.model, self.path, self.world, stage)
        self._trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = new_optimizer(self._trainable, self._train, kept, self._rate_factors, self._stacked)

    # --- the state ---------------------------------------------------------------------------------------------------

    def saved_tensors(self) -> dict[str, Tensor]:
        """What training changes: the parameters that learn and all persistent buffers, by name."""
        tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self._trainable.items()}
        for prefix, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    tensors[f"{prefix}.{name}" if prefix else name] = buffer
        return tensors

    def weights(self) -> list[TensorSource]:
        self._elsewhere.flush()
        return [*sources_of(self._mine(self.saved_tensors())), *self._elsewhere.weights()]

    def optimizer_state(self) -> list[TensorSource]:
        self._elsewhere.flush()
        return [*sources_of(self._mine(self.optimizer.state())), *self._elsewhere.optimizer_state()]

    def optimizer_facts(self) -> dict[str, Any]:
        settings = self.optimizer.hyper_parameters()
        settings["decayed"] = sorted([*settings["decayed"], *self._elsewhere.decayed()])
        return {
            "hyper_parameters": settings | self._balance.hyper_parameters(),
            "without_state": sorted(self.optimizer.without_state() | self._elsewhere.without_state()),
            **self._balance.state(),
        }

    def expected_bytes(self) -> int:
        held = self._mine(self.saved_tensors())
        # Two moments, and a master where the parameter is shorter than fp32.
        of_optimizer = sum(
            tensor.numel() * (self.optimizer.moment_bytes + (0 if tensor.dtype == torch.float32 else 4))
            for name, tensor in held.items()
            if name in self._trainable
        )
        return of_optimizer + sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def load_state(self, weights: StoredTensors, optimizer: StoredTensors, facts: dict[str, Any], where: str) -> None:
        without_state = set(facts["without_state"])
        elsewhere = self._elsewhere.expected_optimizer(without_state)
        check_tensors(weights, self.saved_tensors() | self._elsewhere.expected(), what=f"weights of {where}")
        check_tensors(optimizer, elsewhere, what=f"optimizer state of {where}", more=True)
        self.optimizer.load_state(optimizer.without(elsewhere.keys()), without_state)
        self._elsewhere.load_optimizer(optimizer, without_state)
        self._balance.load_state(facts)
        self._copy(weights)

    def load_weights(self, weights: StoredTensors, where: str) -> None:
        check_tensors(weights, self.saved_tensors() | self._elsewhere.expected(), what=f"weights of {where}")
        self._copy(weights)
        self.optimizer.take_masters(weights)

    def _copy(self, weights: StoredTensors) -> None:
        for name, tensor in self.saved_tensors().items():
            put(tensor, weights[name])
        self._elsewhere.load_weights(weights)

    def _mine(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return own_parts(tensors, self.world.rank) if self.is_sharded else tensors


def _compile_feed_forward(model: nn.Module) -> None:
    """Compile the feed-forward block of every layer.

    The layers themselves are left alone: the layout of the documents differs in every batch, and each new layout
    would compile them anew.

    Raises:
        ModelError: If the model has no such blocks.
    """
    blocks = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "mlp"]
    if not blocks:
        raise ModelError("The model has no feed-forward blocks named `mlp` to compile. Write train.compile=false.")
    for block in blocks:
        block.compile(dynamic=True)
