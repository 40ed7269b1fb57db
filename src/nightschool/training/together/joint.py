"""One forward and backward pass for several adapters on one base.

Shapes: N tokens of a pass, those of each member's micro-batch side by side.

What a linear layer of the base computes, it computes for all tokens at once; what an adapter adds, it adds to the tokens of
its own member, with that member's dropout. Attention and loss keep to one member anyway, and everything else keeps to one
token. So the sum of all losses falls apart into what each member would have summed alone, and its gradients too, up to the
rounding of products over more rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nightschool.data.batches import Batch
from nightschool.evaluation.heldout import autocast, on_device
from nightschool.layers.forward import causal_lm, draws_at_random, has_plain_head, losses_of_batches
from nightschool.layers.gated_mlp import recompute_gates
from nightschool.layers.products import linear
from nightschool.models.resident import shell_of
from nightschool.training.causal_task import CausalTask
from nightschool.training.metrics import say
from nightschool.training.task import Task
from nightschool.training.together.member import Member, Window, serve, serve_one

# A pass takes micro-batches up to so many tokens. Memory grows with them, and so does speed, because weights are read and packed for
# each pass: SmolLM2 took 3.7 ms a token (with MKL) where a pass has 193, 3.2 where it has 388; sixteen adapters on 10 million weights, ms of
# CPU with 256 / 512 / 1,024 tokens a pass: 2,210 / 1,965 / 1,902 (one adapter, all in one pass: 1,767). With 388 tokens a pass
# sixteen runs on SmolLM2 peak at 1.29 × one of them, and at 1.24 × with oneDNN, which leaves too little room.
_FEWEST_TOKENS, _MOST_TOKENS = 256, 1024
_TOKENS_TIMES_WEIGHTS = 6_000_000_000
# Threads that wait without spinning are woken for each operation. Where the hidden states of a pass are so many numbers or fewer,
# that takes longer than they save, but in products with the base: sixteen adapters learn 1.6 times as fast.
_NUMBERS_OF_ONE_THREAD = 300_000
_NAME = "default"


class CannotJoin(Exception):
    """Why a member has passes of its own."""


def pass_tokens(model: nn.Module) -> int:
    """Up to how many tokens several micro-batches go into one pass of this model."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, _TOKENS_TIMES_WEIGHTS // weights))


@dataclass(frozen=True)
class Seat:
    """What a member brings to a joint pass: its layers by the names that they have in the base."""

    task: CausalTask[Any]
    layers: Mapping[str, LoraLinear]


@dataclass(frozen=True)
class Part:
    """A micro-batch in a pass. `generator` is the random state that its member's dropout draws from."""

    seat: Seat
    batch: Batch
    units: int
    generator: torch.Generator


class JointPasses:
    """Answers the members that ask: in passes for all of one base and dtype that can join, and each other one by itself."""

    def __init__(self) -> None:
        self._bases: dict[int, JointBase] = {}
        self._seats: dict[Member, Seat | None] = {}

    def serve(self, members: Sequence[Member]) -> Iterator[Sequence[Member]]:
        """Find the gradients of all windows that are asked for; yields members as soon as theirs are there.

        Whoever goes on at once updates its weights and drops its gradients before those of the next ones are found.
        """
        self._seats = {member: self._seat_of(member) for member in members}
        groups: dict[Any, list[Member]] = {}
        for member, seat in self._seats.items():
            kind = member if seat is None else (id(_embedding(seat.task)), seat.task.compute_dtype)
            groups.setdefault(kind, []).append(member)
        for group in groups.values():
            if len(group) == 1:
                yield from serve(group)
            else:
                yield from self._serve_group(group)

    def _seat_of(self, member: Member) -> Seat | None:
        if member in self._seats:
            return self._seats[member]
        try:
            seat = take_seat(_asked(member).task)
            self._base_of(seat).check(seat)
        except CannotJoin as why:
            _tell(member, why)
            return None
        return seat

    def _base_of(self, seat: Seat) -> JointBase:
        key = id(_embedding(seat.task))
        if key not in self._bases:
            self._bases[key] = JointBase(seat.task)
        return self._bases[key]

    def _serve_group(self, group: Sequence[Member]) -> Iterator[Sequence[Member]]:
        """As many at once as fit into a pass."""
        base = self._base_of(cast(Seat, self._seats[group[0]]))
        for some in _bounded(group, base.pass_tokens):
            self._serve_at_once(base, some)
            yield some

    def _serve_at_once(self, base: JointBase, group: Sequence[Member]) -> None:
        """All in joint passes; where one fails, each by itself, so that only whoever is to blame hears of it."""
        seats = {member: cast(Seat, self._seats[member]) for member in group}
        generators = {member: _generator(member) for member in group}
        losses: dict[Member, Tensor] = {}
        for seat in seats.values():
            seat.task.begin_window()
        try:
            for turn in range(max(len(_asked(member).batches) for member in group)):
                parts = {
                    member: Part(seats[member], window.batches[turn], window.units, generators[member])
                    for member in group
                    if turn < len((window := _asked(member)).batches)
                }
                for member, loss in zip(parts, base.losses(list(parts.values())), strict=True):
                    losses[member] = losses[member] + loss if member in losses else loss
        except Exception as error:
            for member in group:
                _asked(member).task.discard_gradients()
            self._serve_apart(group, error)
            return
        for member in group:
            member.randomness.torch = generators[member].get_state()
            seats[member].task.end_window(losses[member], _asked(member).units)
            member.answer(losses[member])

    def _serve_apart(self, group: Sequence[Member], error: Exception) -> None:
        went_well = [serve_one(member) for member in group]
        if all(went_well):  # nobody is to blame but the joint pass
            for member in group:
                self._seats[member] = None
                _tell(member, error)


class JointBase:
    """A shell of a base whose linear layers serve several adapters."""

    def __init__(self, task: CausalTask[Any]) -> None:
        """Make it from the model of a task, without that task's adapter. Raises CannotJoin if that is one of another kind."""
        self.embedding = _embedding(task)  # whose identity is that of the base, as long as it is held
        self._model = shell_of(causal_lm(task.model))
        for name, layer in _adapted_layers(self._model).items():
            self._model.set_submodule(name, layer.base_layer)
        self._model.train()
        recompute_gates(self._model)  # what they do not keep pays for passes of more tokens
        head = cast(Any, self._model).get_output_embeddings()
        for name, layer in list(self._model.named_modules()):
            if type(layer) is nn.Linear and layer is not head:
                self._model.set_submodule(name, _ServingLinear(layer, name, self))
        self.pass_tokens = pass_tokens(self._model)
        self.threads = torch.get_num_threads()
        self._parts: Sequence[Part] = ()
        self._draws = draws_at_random(self._model)

    def check(self, seat: Seat) -> None:
        """Raise CannotJoin if the base draws at random, or an adapter reaches what is no linear layer of its own."""
        if self._draws:
            raise CannotJoin("the base has dropout of its own")
        for name in seat.layers:
            if not isinstance(self._model.get_submodule(name), _ServingLinear):
                raise CannotJoin(f"{name} is no linear layer of its own")

    def losses(self, parts: Sequence[Part]) -> list[Tensor]:
        """One pass, forward and backward: the part of each in the loss of its window, and its gradients added up."""
        task = parts[0].seat.task
        self._parts, self.threads = parts, torch.get_num_threads()
        numbers = sum(part.batch.input_ids.shape[1] for part in parts) * self.embedding.shape[1]
        try:
            with _on_threads(1 if numbers <= _NUMBERS_OF_ONE_THREAD else self.threads):
                with autocast(task.device, task.compute_dtype):
                    batches = [on_device(part.batch, task.device) for part in parts]
                    likeliest = [part.seat.task.likeliest for part in parts]
                    sums = losses_of_batches(self._model, batches, likeliest, at_head=_on_threads(self.threads))
                losses = sums / torch.tensor([part.units for part in parts], dtype=sums.dtype, device=sums.device)
                # A gradient for each of them, and no sum, which the NaN of one would spoil.
                losses.backward(torch.ones_like(losses))  # type: ignore[no-untyped-call]
        finally:
            self._parts = ()
        return list(losses.detach().unbind())

    def pieces(self, name: str, x: Tensor) -> list[_Piece]:
        """Which tokens of x [1,N,·] the adapters of this pass add to in the layer of that name; none where it has none."""
        if not any(name in part.seat.layers for part in self._parts):
            return []
        ends = list(itertools.accumulate(part.batch.input_ids.shape[1] for part in self._parts))
        if x.ndim != 3 or x.shape[:2] != (1, ends[-1]):
            raise CannotJoin(f"{name} is not asked for all tokens at once")
        return [
            _Piece(slice(start, end), layer, part.generator)
            for part, start, end in zip(self._parts, [0, *ends], ends, strict=False)
            if (layer := part.seat.layers.get(name)) is not None
        ]


class _ServingLinear(nn.Module):
    """A frozen linear layer that several adapters may stand on."""

    def __init__(self, base_layer: nn.Linear, name: str, base: JointBase) -> None:
        super().__init__()
        self.base_layer, self._name = base_layer, name
        self._of = (base,)  # in a tuple, or the module would hold the model that holds it

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, None)

    def write_into(self, x: Tensor, place: Tensor) -> Tensor:
        """What it gives for x [1,N,D], in `place` [1,N,F]."""
        return self._product(x, place)

    def _product(self, x: Tensor, place: Tensor | None) -> Tensor:
        (base,) = self._of
        pieces = base.pieces(self._name, x)
        weights = [part.weight for piece in pieces for part in (piece.layer.lora_A[_NAME], piece.layer.lora_B[_NAME])]
        # In a list, as it is no input that gradients flow to.
        arguments = x, self.base_layer, self.dtype_of(x), base.threads, pieces, [place], *weights
        out: Tensor = _LinearWithAdapters.apply(*arguments)  # type: ignore[no-untyped-call]
        return out

    def dtype_of(self, x: Tensor) -> torch.dtype:
        """That of the products of x."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features


@dataclass(frozen=True)
class _Piece:
    """The tokens of a pass that a layer's adapter adds to."""

    tokens: slice
    layer: LoraLinear
    generator: torch.Generator

    def input_of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Its tokens of x [1,N,·]."""
        return x[0, self.tokens].to(dtype)

    def draw_like(self, x: Tensor) -> Tensor | None:
        """Which numbers dropout keeps: exactly those that torch's own would on a CPU, which takes no generator."""
        if self._kept_share == 1:
            return None
        return torch.empty_like(x).bernoulli_(self._kept_share, generator=self.generator).to(torch.bool)

    def dropped(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        """dropout(x), of what was drawn."""
        return x if drawn is None else x * self.mask(drawn, x.dtype)

    def mask(self, drawn: Tensor, dtype: torch.dtype) -> Tensor:
        """What dropout multiplies by."""
        return drawn.to(dtype).div_(self._kept_share)

    @property
    def _kept_share(self) -> float:
        dropout = self.layer.lora_dropout[_NAME]
        return 1 - dropout.p if isinstance(dropout, nn.Dropout) else 1

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[_NAME])


class _LinearWithAdapters(torch.autograd.Function):
    """xWᵀ + b, and to each piece of tokens B(A(dropout(x)))·scaling of its own adapter; W and b are frozen.

    One node in place of a dozen for each piece: sixteen small adapters would spend their time between operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: nn.Linear,
        product: torch.dtype,
        threads: int,
        pieces: list[_Piece],
        places: list[Tensor | None],
        *weights: Tensor,
    ) -> Tensor:
        (place,) = places
        # Not what dropout left, but the input, which the layers beside this one hold too, and a byte for each number of it.
        saved: list[Tensor | None] = [x] if pieces else []
        with torch.autocast(x.device.type, enabled=False):
            with _on_threads(threads):
                bias = None if base.bias is None else base.bias.to(product)
                rows = None if place is None else _same_numbers(place).flatten(0, -2)
                out = linear(x.to(product).flatten(0, -2), base.weight.to(product), bias, out=rows)
                out = out.view(*x.shape[:-1], base.out_features)
            for piece, a, b in zip(pieces, weights[::2], weights[1::2], strict=True):
                part = piece.input_of(x, a.dtype)
                drawn = piece.draw_like(part)
                low = piece.dropped(part, drawn).to(product) @ a.to(product).T
                out[0, piece.tokens].addmm_(low, b.to(product).T, alpha=piece.scaling)
                saved += [low, drawn]
        ctx.base, ctx.threads, ctx.pieces, ctx.x_dtype = base, threads, pieces, x.dtype
        ctx.save_for_backward(*weights, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pieces: list[_Piece] = ctx.pieces
        weights, saved = ctx.saved_tensors[: 2 * len(pieces)], ctx.saved_tensors[2 * len(pieces) :]
        with _on_threads(ctx.threads):
            grad_x = _times(grad, ctx.base.weight.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        of_weights: list[Tensor] = []
        for number, (piece, a, b) in enumerate(zip(pieces, weights[::2], weights[1::2], strict=True)):
            x, (low, drawn) = saved[0], saved[1 + 2 * number : 3 + 2 * number]
            kept = piece.dropped(piece.input_of(x, a.dtype), drawn).to(grad.dtype)
            of_piece = grad[0, piece.tokens]
            of_low = (of_piece @ b.to(grad.dtype)).mul_(piece.scaling)
            of_weights += [
                (of_low.T @ kept).to(a.dtype),
                (of_piece.T @ low).mul_(piece.scaling).to(b.dtype),
            ]
            if grad_x is not None:
                of_kept = of_low @ a.to(grad.dtype)
                grad_x[0, piece.tokens].add_(piece.dropped(of_kept, drawn))
        return (None if grad_x is None else grad_x.to(ctx.x_dtype), None, None, None, None, None, *of_weights)


def _same_numbers(place: Tensor) -> Tensor:
    """No view of the place, which autograd would forbid to be given out, but a tensor of its own on the same numbers."""
    return place.new_empty(0).set_(place.untyped_storage(), place.storage_offset(), place.shape, place.stride())


def _times(x: Tensor, weight_fd: Tensor) -> Tensor:
    """The product xW [...,D] of x [...,F]."""
    return linear(x.flatten(0, -2), weight_fd.T).view(*x.shape[:-1], -1)


@contextmanager
def _on_threads(number: int) -> Iterator[None]:
    """A block whose operations run on so many threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_seat(task: Task) -> Seat:
    """What a task brings to a joint pass.

    Raises:
        CannotJoin: If it has to have passes of its own.
    """
    if not isinstance(task, CausalTask):
        raise CannotJoin("its loss is not that of words alone")
    if not (task.path.packed and task.path.fused_head and has_plain_head(task.model)):
        raise CannotJoin("its documents are padded, or its head is not a plain one")
    if task.recomputes:
        raise CannotJoin("it recomputes activations, or is compiled")
    layers = _adapted_layers(causal_lm(task.model))
    learning = {id(part.weight) for layer in layers.values() for part in (layer.lora_A[_NAME], layer.lora_B[_NAME])}
    if {id(parameter) for parameter in task.trainable().values()} != learning:
        raise CannotJoin("more learns than adapters of linear layers")
    if task.device.type != "cpu" and any(
        isinstance(layer.lora_dropout[_NAME], nn.Dropout) for layer in layers.values()
    ):
        raise CannotJoin("the dropout of a GPU cannot be drawn in parts")
    return Seat(task, layers)


def _adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with a plain adapter by name. Raises CannotJoin if there is another one."""
    layers: dict[str, LoraLinear] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear or layer.lora_variant:
            raise CannotJoin(f"{name} has an adapter of another kind")
        if layer.lora_bias[_NAME] or list(layer.lora_A) != [_NAME]:
            raise CannotJoin(f"{name} has an adapter of another kind")
        layers[name] = layer
    return layers


def _bounded(group: Sequence[Member], most_tokens: int) -> Iterator[list[Member]]:
    """Members whose largest micro-batches fit into that many tokens together, or into the largest of them."""
    sizes = {member: max(batch.input_ids.shape[1] for batch in _asked(member).batches) for member in group}
    most_tokens = max(most_tokens, *sizes.values())
    some: list[Member] = []
    tokens = 0
    for member, size in sizes.items():
        if some and tokens + size > most_tokens:
            yield some
            some, tokens = [], 0
        some.append(member)
        tokens += size
    yield some


def _asked(member: Member) -> Window:
    assert member.asked is not None, "who is served asks"
    return member.asked


def _generator(member: Member) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(member.randomness.torch)
    return generator


def _embedding(task: CausalTask[Any]) -> Tensor:
    return cast(Tensor, causal_lm(task.model).get_input_embeddings().weight)


def _tell(member: Member, why: Exception) -> None:
    with member.writing():
        say(f"Shares the base, but not its passes: {why}")
