"""What the adapters of one layer add to a few rows each, compiled for this machine when it is first needed.

With torch every adapter takes four calls a layer, each of which costs more than the few numbers it computes. Here one
call goes through all adapters of a step, on the team of threads that torch has. A row's sums have one order, whatever
stands beside it, so its answer does not depend on the batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from nightschool.engine.kernels import compiled, team_of_torch

ROWS = 2
"""Rows of one adapter that are taken together, so that its factors are read once for them."""

MOST_RANK = 1024
# Numbers in a vector, and in the blocks that the upper factor is stored in.
_LANES = 8
_BLOCKS = (32, 8)
# Ranks that are summed side by side.
_CHAINS = 4
# What `work` gets, each a 64-bit number. `next` is the first item that nobody has taken yet.
_ARGUMENTS = ("x", "out", "table", "items", "count", "columns", "width", "block", "next")
# 64-bit numbers of an item: an adapter's number, how many rows, and which. And of a table's entry, by that number:
# where the factors are (0: nowhere) and their rank.
_ITEM, _ENTRY = 2 + ROWS, 3


def block_of(columns: int, width: int) -> int | None:
    """The block in which the upper factor of [in, out] is stored; None if the kernel cannot have such a layer."""
    return None if columns % _LANES else next((block for block in _BLOCKS if width % block == 0), None)


def items(rows_of: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """The work of a step, for every layer alike, from the number of each adapter and its rows."""
    found = [
        [number, len(few), *few, *[0] * (ROWS - len(few))]
        for number, rows in rows_of
        for few in (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))
    ]
    return torch.tensor(found, dtype=torch.int64)


class StepItems(Protocol):
    """What of a step the kernel looks at."""

    @property
    def items(self) -> Tensor: ...


class KernelFactors:
    """The factors of the adapters of a layer [in, out], fp32 on a CPU: [r, in], and [out / block, r, block]."""

    def __init__(self, columns: int, width: int, block: int) -> None:
        self._block = block
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        # By number: where they are, and their rank.
        self._table = torch.zeros(16, _ENTRY, dtype=torch.int64)
        _, self._work = _code()
        self._arguments = (ctypes.c_int64 * len(_ARGUMENTS))()
        self._arguments[5:8] = [columns, width, block]
        self._address = ctypes.addressof(self._arguments)

    def put(self, number: int, down: Tensor, up: Tensor) -> None:
        """Keep [in, r] and [r, out]."""
        rank, width = up.shape
        down_rc = down.t().contiguous()
        up_blocks = up.reshape(rank, width // self._block, self._block).transpose(0, 1).contiguous()
        self._factors[number] = down_rc, up_blocks
        if number >= len(self._table):
            self._table = torch.cat([self._table, torch.zeros(number, _ENTRY, dtype=torch.int64)])
        self._table[number] = torch.tensor([down_rc.data_ptr(), up_blocks.data_ptr(), rank])

    def drop(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Forget an adapter, and return what was put; None if it is not there."""
        found = self._factors.pop(number, None)
        if found is None:
            return None
        self._table[number] = 0
        down_rc, up_blocks = found
        return down_rc.t(), up_blocks.transpose(0, 1).flatten(1)

    def __len__(self) -> int:
        return len(self._factors)

    def add(self, x_rc: Tensor, out_rc: Tensor, rows: StepItems) -> None:
        """Add to `out_rc` [rows, out] what the adapters give for `x_rc` [rows, in]."""
        x_rc, step_items, arguments = x_rc.contiguous(), rows.items, self._arguments
        assert out_rc.is_contiguous(), "what is added must stay"
        if not len(step_items):
            return
        arguments[0], arguments[1], arguments[2] = x_rc.data_ptr(), out_rc.data_ptr(), self._table.data_ptr()
        arguments[3], arguments[4], arguments[8] = step_items.data_ptr(), len(step_items), 0
        _team()(self._work, self._address, min(torch.get_num_threads(), len(step_items)))


@cache
def _team() -> Callable[[int, int, int], None]:
    return team_of_torch()


@cache
def _code() -> tuple[object, int]:
    return compiled(_module())


_FLOATS = f"<{_LANES} x float>"


class _Code:
    """LLVM's assembly, line by line; values get names of their own."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.label = "entry"
        self._count = 0

    def new(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def do(self, instruction: str) -> str:
        name = f"%{self.new()}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def act(self, instruction: str) -> None:
        self.lines.append(f"  {instruction}")

    def at(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self.label = label

    def place(self, base: str, offset: str | int) -> str:
        return self.do(f"getelementptr float, ptr {base}, i64 {offset}")

    def vector(self, base: str, offset: str | int) -> str:
        return self.do(f"load {_FLOATS}, ptr {self.place(base, offset)}, align 4")

    def splat(self, base: str, offset: str | int) -> str:
        number = self.do(f"load float, ptr {self.place(base, offset)}, align 4")
        one = self.do(f"insertelement {_FLOATS} poison, float {number}, i32 0")
        return self.do(f"shufflevector {_FLOATS} {one}, {_FLOATS} poison, <{_LANES} x i32> zeroinitializer")

    def fma(self, a: str, b: str, c: str) -> str:
        return self.do(f"call {_FLOATS} @llvm.fma.v{_LANES}f32({_FLOATS} {a}, {_FLOATS} {b}, {_FLOATS} {c})")

    def loop(
        self, start: str, end: str, step: int, sums: Sequence[str], body: Callable[[str, list[str]], list[str]]
    ) -> list[str]:
        """Vectors that grow while an index goes from start to end; returns them at the end."""
        name, before, place = self.new(), self.label, len(self.lines) + 2
        self.act(f"br label %{name}_head")
        self.at(f"{name}_head")
        index, grown = f"%{name}_index", [f"%{name}_sum{n}" for n in range(len(sums))]
        more = self.do(f"icmp slt i64 {index}, {end}")
        self.act(f"br i1 {more}, label %{name}_body, label %{name}_end")
        self.at(f"{name}_body")
        after = body(index, grown)
        next_index = self.do(f"add i64 {index}, {step}")
        self.act(f"br label %{name}_head")
        phis = [f"  {index} = phi i64 [ {start}, %{before} ], [ {next_index}, %{self.label} ]"]
        phis += [
            f"  {now} = phi {_FLOATS} [ {first}, %{before} ], [ {then}, %{self.label} ]"
            for now, first, then in zip(grown, sums, after, strict=True)
        ]
        self.lines[place:place] = phis
        self.at(f"{name}_end")
        return grown


def _rows(rows: int, block: int) -> str:
    """A function that takes so many rows of one adapter through both factors, the upper one in blocks of `block`."""
    code = _Code()
    between = code.do(f"alloca [{rows * MOST_RANK} x float], align 64")
    whole = code.do(f"and i64 %rank, {-_CHAINS}")

    def down(first: str, chains: int) -> None:
        ranks = [code.do(f"add i64 {first}, {chain}") for chain in range(chains)]
        starts = [code.do(f"mul i64 {rank}, %columns") for rank in ranks]
        factors = [code.place("%down", start) for start in starts]

        def add(column: str, sums: list[str]) -> list[str]:
            weights = [code.vector(factor, column) for factor in factors]
            xs = [code.vector(f"%x{row}", column) for row in range(rows)]
            return [code.fma(x, w, sums[r * chains + n]) for r, x in enumerate(xs) for n, w in enumerate(weights)]

        sums = code.loop("0", "%columns", _LANES, ["zeroinitializer"] * (rows * chains), add)
        for number, vector in enumerate(sums):
            row, chain = divmod(number, chains)
            total = code.do(f"call reassoc float @llvm.vector.reduce.fadd.v{_LANES}f32(float 0.0, {_FLOATS} {vector})")
            rank = code.do(f"add i64 {first}, {row * MOST_RANK + chain}")
            code.act(f"store float {total}, ptr {code.place(between, rank)}, align 4")

    def down_loop(start: str, end: str, chains: int) -> None:
        def each(index: str, _: list[str]) -> list[str]:
            down(index, chains)
            return []

        code.loop(start, end, chains, [], each)

    down_loop("0", whole, _CHAINS)
    down_loop(whole, "%rank", 1)
    parts = range(block // _LANES)

    def up(column: str, _: list[str]) -> list[str]:
        outs = [code.place(f"%out{row}", column) for row in range(rows)]
        before = [code.vector(out, part * _LANES) for out in outs for part in parts]
        factor = code.place("%up", code.do(f"mul i64 {column}, %rank"))

        def add(rank: str, sums: list[str]) -> list[str]:
            start = code.do(f"mul i64 {rank}, {block}")
            at = code.place(factor, start)
            weights = [code.vector(at, part * _LANES) for part in parts]
            xs = [code.splat(between, code.do(f"add i64 {rank}, {row * MOST_RANK}")) for row in range(rows)]
            return [code.fma(x, w, sums[r * len(parts) + n]) for r, x in enumerate(xs) for n, w in enumerate(weights)]

        for number, vector in enumerate(code.loop("0", "%rank", 1, before, add)):
            row, part = divmod(number, len(parts))
            code.act(f"store {_FLOATS} {vector}, ptr {code.place(outs[row], part * _LANES)}, align 4")
        return []

    code.loop("0", "%width", block, [], up)
    pointers = ", ".join(f"ptr %x{row}, ptr %out{row}" for row in range(rows))
    head = f"define internal void @rows_{rows}_{block}({pointers}, ptr %down, ptr %up, i64 %rank, i64 %columns, i64 %width)"
    return "\n".join([f"{head} noinline {{", "entry:", *code.lines, "  ret void", "}"])


def _module() -> str:
    """`work` takes items until none is left; every thread of the team runs it."""
    functions = "\n".join(_rows(rows, block) for rows in range(1, ROWS + 1) for block in _BLOCKS)
    code = _Code()
    given = {}
    for place, name in enumerate(_ARGUMENTS):
        at = code.do(f"getelementptr i64, ptr %arguments, i64 {place}")
        given[name] = at if name == "next" else code.do(f"load i64, ptr {at}")
    pointers = {name: code.do(f"inttoptr i64 {given[name]} to ptr") for name in ("x", "out", "table", "items")}

    def number(base: str, offset: str) -> str:
        at = code.do(f"getelementptr i64, ptr {base}, i64 {offset}")
        return code.do(f"load i64, ptr {at}")

    def pointer(base: str, offset: str) -> str:
        return code.do(f"inttoptr i64 {number(base, offset)} to ptr")

    code.act("br label %take")
    code.at("take")
    index = code.do(f"atomicrmw add ptr {given['next']}, i64 1 monotonic")
    is_item = code.do(f"icmp slt i64 {index}, {given['count']}")
    code.act(f"br i1 {is_item}, label %item, label %end")
    code.at("item")
    item_at = code.do(f"mul i64 {index}, {_ITEM}")
    item = code.do(f"getelementptr i64, ptr {pointers['items']}, i64 {item_at}")
    entry_at = code.do(f"mul i64 {number(item, '0')}, {_ENTRY}")
    entry = code.do(f"getelementptr i64, ptr {pointers['table']}, i64 {entry_at}")
    rank = number(entry, "2")
    is_none = code.do(f"icmp eq i64 {rank}, 0")
    code.act(f"br i1 {is_none}, label %take, label %some")
    code.at("some")
    down, up = pointer(entry, "0"), pointer(entry, "1")
    rows = []
    for row in range(ROWS):
        which = number(item, str(2 + row))
        rows.append(
            (
                code.place(pointers["x"], code.do(f"mul i64 {which}, {given['columns']}")),
                code.place(pointers["out"], code.do(f"mul i64 {which}, {given['width']}")),
            )
        )
    kinds = [(count, block) for count in range(1, ROWS + 1) for block in _BLOCKS]
    count_part = code.do(f"mul i64 {number(item, '1')}, 1000")
    kind = code.do(f"add i64 {given['block']}, {count_part}")
    cases = " ".join(f"i64 {count * 1000 + block}, label %call_{count}_{block}" for count, block in kinds)
    code.act(f"switch i64 {kind}, label %take [ {cases} ]")
    for count, block in kinds:
        code.at(f"call_{count}_{block}")
        both = ", ".join(f"ptr {x}, ptr {out}" for x, out in rows[:count])
        sizes = f"i64 {rank}, i64 {given['columns']}, i64 {given['width']}"
        code.act(f"call void @rows_{count}_{block}({both}, ptr {down}, ptr {up}, {sizes})")
        code.act("br label %take")
    work = "\n".join(["define void @work(ptr %arguments) {", "entry:", *code.lines, "end:", "  ret void", "}"])
    return f"""
declare {_FLOATS} @llvm.fma.v{_LANES}f32({_FLOATS}, {_FLOATS}, {_FLOATS})
declare float @llvm.vector.reduce.fadd.v{_LANES}f32(float, {_FLOATS})
{functions}
{work}
"""
