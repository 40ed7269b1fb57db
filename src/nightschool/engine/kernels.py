"""Products of a few rows of fp32 with weights of few bits, compiled for this machine when they are first needed.

No library that comes with torch multiplies fp32 by such weights without rounding something else to 16 or 8 bits, and a
compiler is nothing that users have. llvmlite (extra `cpu`) brings one. A kernel reads each word of the weights once,
turns its codes into the very fp32 numbers that were packed, and adds their products to sums in fp32; so it differs from
torch's product in the order of the sums alone.

It runs on the team of threads that torch's own operations have on the calling thread. A second team would spin beside
it (see `engine.compute`).
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nightschool.engine.packing import GROUP, LANES, Format, Packed

# Rows that are multiplied by one reading of the words; more are taken in several passes, while the words are cached.
_MOST_ROWS = 8
# Sums that grow in turn, so that an addition need not wait for the one before.
_CHAINS = 4
# Pieces for each thread, so that one that was interrupted holds up nobody.
_PIECES = 4
# Machines, and the instructions that a kernel takes from them: fused products, and reading fp16.
_NEEDED: dict[str, tuple[str, ...]] = dict.fromkeys(("x86_64", "amd64"), ("fma", "f16c"))
_NEEDED |= dict.fromkeys(("aarch64", "arm64"), ())
# What `work` gets, each a 64-bit number. `next` is the first tile that nobody has taken yet.
_ARGUMENTS = ("x", "words", "out", "rows", "columns", "tiles", "grain", "next")


@cache
def is_available() -> bool:
    """Whether the compiler is installed, and the machine has what it would otherwise call a library for."""
    if find_spec("llvmlite") is None:
        return False
    import llvmlite.binding as llvm

    needed = _NEEDED.get(platform.machine().lower())
    features = llvm.get_host_cpu_features() if needed else {}
    return needed is not None and all(features.get(feature, False) for feature in needed)


class Kernel:
    """Multiplies by weights of one format."""

    def __init__(self, format_: Format) -> None:
        self._engine, self._work = compiled(_module(format_))
        self._team = team_of_torch()

    def __call__(self, x_rc: Tensor, packed: Packed) -> Tensor:
        """[rows, in] (fp32) → [rows, out]."""
        x_rc = x_rc.contiguous()
        rows, columns = x_rc.shape
        tiles, out = len(packed.words), packed.shape[0]
        out_rc = torch.empty(rows, tiles * LANES)
        threads = torch.get_num_threads()
        grain = max(1, tiles // (threads * _PIECES))
        pointers = (x_rc.data_ptr(), packed.words.data_ptr(), out_rc.data_ptr())
        arguments = (ctypes.c_int64 * len(_ARGUMENTS))(*pointers, rows, columns, tiles, grain, 0)
        self._team(self._work, ctypes.addressof(arguments), threads)
        return out_rc if out == tiles * LANES else out_rc[:, :out].contiguous()


@cache
def kernel(format_: Format) -> Kernel:
    """Of a format; compiled once a process, which takes about half a second."""
    return Kernel(format_)


def team_of_torch() -> Callable[[int, int, int], None]:
    """Runs the function at an address on every thread of torch's team, or on this one if torch has no OpenMP."""
    try:
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return lambda work, arguments, _: ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)(arguments)
    parallel.restype = None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return lambda work, arguments, threads: parallel(work, arguments, threads, 0)


def compiled(assembly: str) -> tuple[Any, int]:
    """What owns the code of a module, which must be kept, and the address of its function `work`."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(assembly)
    module.verify()
    # The vectors are as wide as they are wanted here; LLVM splits them where the machine has narrower ones.
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine, engine.get_function_address("work")


def _module(format_: Format) -> str:
    """LLVM's assembly: `tile_R` multiplies R rows by 16 rows of the weights, `work` shares out the tiles."""
    tiles = "\n".join(_tile(format_, rows) for rows in range(1, _MOST_ROWS + 1))
    return f"{_HEAD}\n{tiles}\n{_work(format_)}"


_WIDE = '"prefer-vector-width"="512" "min-legal-vector-width"="512"'
_HEAD = f"""
declare <{LANES} x float> @llvm.fma.v{LANES}f32(<{LANES} x float>, <{LANES} x float>, <{LANES} x float>)
"""


class _Lines:
    """Instructions in order, each with a new name for what it gives."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def do(self, instruction: str) -> str:
        name = f"%v{len(self.lines)}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def fma(self, a: str, b: str, c: str) -> str:
        vector = f"<{LANES} x float>"
        return self.do(f"call {vector} @llvm.fma.v{LANES}f32({vector} {a}, {vector} {b}, {vector} {c})")

    def splat(self, number: str) -> str:
        one = self.do(f"insertelement <{LANES} x float> poison, float {number}, i32 0")
        vector = f"<{LANES} x float>"
        return self.do(f"shufflevector {vector} {one}, {vector} poison, <{LANES} x i32> zeroinitializer")

    def integers(self, operation: str, vector: str, number: int) -> str:
        return self.do(f"{operation} <{LANES} x i32> {vector}, splat (i32 {number})")

    def floats(self, vector: str) -> str:
        return self.do(f"bitcast <{LANES} x i32> {vector} to <{LANES} x float>")

    def half(self, vector: str, place: int) -> str:
        """The lower (0) or upper (1) 16 bits of each word, which are an fp16 number."""
        vector = self.integers("lshr", vector, 16) if place else vector
        bits = self.do(f"trunc <{LANES} x i32> {vector} to <{LANES} x i16>")
        halves = self.do(f"bitcast <{LANES} x i16> {bits} to <{LANES} x half>")
        return self.do(f"fpext <{LANES} x half> {halves} to <{LANES} x float>")


def _tile(format_: Format, rows: int) -> str:
    """Adds up group after group of 32 columns, of so many rows of x, for the 16 rows of a tile."""
    body = _Lines()
    chains = max(1, _CHAINS // rows)
    names = [[f"%sum_{row}_{chain}" for chain in range(chains)] for row in range(rows)]
    starts = [
        body.do(f"getelementptr float, ptr %x_group, i64 {'0' if row == 0 else f'%row_{row}'}") for row in range(rows)
    ]
    groups = [
        body.do(f"getelementptr <{LANES} x i32>, ptr %words_group, i64 {place}") for place in range(format_.words)
    ]
    words = [body.do(f"load <{LANES} x i32>, ptr {place}, align 4") for place in groups]
    num_codes = format_.words - format_.num_parameters
    parameters = _parameters(body, format_, words[num_codes:])
    sums = [list(of_row) for of_row in names]
    per_word = GROUP // num_codes
    for column in range(GROUP):
        weight = _weight(body, format_, words[column // per_word], column % per_word, parameters)
        for row in range(rows):
            place = body.do(f"getelementptr float, ptr {starts[row]}, i64 {column}")
            x = body.splat(body.do(f"load float, ptr {place}, align 4"))
            sums[row][column % chains] = body.fma(x, weight, sums[row][column % chains])
    phis = [
        f"  {name} = phi <{LANES} x float> [ zeroinitializer, %entry ], [ {after}, %group ]"
        for of_row, of_row_after in zip(names, sums, strict=True)
        for name, after in zip(of_row, of_row_after, strict=True)
    ]
    last = _Lines()
    last.lines = [""] * len(body.lines)  # names go on
    stores = _stores(last, sums)
    offsets = [f"  %row_{row} = mul i64 %columns, {row}" for row in range(1, rows)]
    return "\n".join(
        [
            f"define internal void @tile_{rows}(ptr %x, ptr %words, ptr %out, i64 %columns, i64 %width) noinline {_WIDE} {{",
            "entry:",
            *offsets,
            f"  %groups = udiv i64 %columns, {GROUP}",
            "  br label %group",
            "group:",
            "  %index = phi i64 [ 0, %entry ], [ %index_after, %group ]",
            *phis,
            f"  %first_column = mul i64 %index, {GROUP}",
            "  %x_group = getelementptr float, ptr %x, i64 %first_column",
            f"  %first_word = mul i64 %index, {format_.words}",
            f"  %words_group = getelementptr <{LANES} x i32>, ptr %words, i64 %first_word",
            *body.lines,
            "  %index_after = add i64 %index, 1",
            "  %is_over = icmp eq i64 %index_after, %groups",
            "  br i1 %is_over, label %end, label %group",
            "end:",
            *[line for line in last.lines if line],
            *stores,
            "  ret void",
            "}",
        ]
    )


def _stores(last: _Lines, sums: Sequence[Sequence[str]]) -> list[str]:
    vector = f"<{LANES} x float>"
    lines = []
    for row, chains in enumerate(sums):
        total = chains[0]
        for chain in chains[1:]:
            total = last.do(f"fadd {vector} {total}, {chain}")
        offset = last.do(f"mul i64 %width, {row}")
        place = last.do(f"getelementptr float, ptr %out, i64 {offset}")
        lines.append(f"  store {vector} {total}, ptr {place}, align 4")
    return lines


def _parameters(body: _Lines, format_: Format, words: Sequence[str]) -> list[str]:
    if format_.halves:
        return [body.half(words[0], 0), body.half(words[0], 1)]
    return [body.floats(word) for word in words]


def _weight(body: _Lines, format_: Format, word: str, place: int, parameters: Sequence[str]) -> str:
    """The fp32 numbers of the code at one place of a word."""
    shift, unused = format_.bits * place, 32 - format_.bits * (place + 1)
    if format_.meaning == "bf16":
        return body.floats(body.integers("and", word, -65536) if place else body.integers("shl", word, 16))
    if format_.meaning == "fp16":
        return body.half(word, place)
    if format_.meaning == "scaled":
        upper = body.integers("shl", word, unused) if unused else word
        code = body.integers("ashr", upper, 32 - format_.bits)
        number = body.do(f"sitofp <{LANES} x i32> {code} to <{LANES} x float>")
        return body.do(f"fmul <{LANES} x float> {number}, {parameters[0]}")
    lower = body.integers("lshr", word, shift) if shift else word
    code = body.integers("and", lower, (1 << format_.bits) - 1) if unused else lower
    number = body.do(f"sitofp <{LANES} x i32> {code} to <{LANES} x float>")
    return body.fma(number, parameters[0], parameters[1])


def _work(format_: Format) -> str:
    """Takes tiles until none is left. Every thread of the team runs it."""
    loads = "\n".join(
        f"  %{name}_at = getelementptr i64, ptr %arguments, i64 {place}\n  %{name} = load i64, ptr %{name}_at"
        for place, name in enumerate(_ARGUMENTS)
        if name != "next"
    )
    cases = "\n".join(f"    i64 {rows}, label %rows_{rows}" for rows in range(1, _MOST_ROWS + 1))
    calls = "\n".join(
        f"rows_{rows}:\n  call void @tile_{rows}(ptr %x_row, ptr %words_tile, ptr %out_row, i64 %columns, i64 %width)\n"
        "  br label %rows_done"
        for rows in range(1, _MOST_ROWS + 1)
    )
    return f"""
define void @work(ptr %arguments) {_WIDE} {{
entry:
{loads}
  %next_at = getelementptr i64, ptr %arguments, i64 {_ARGUMENTS.index("next")}
  %x_ptr = inttoptr i64 %x to ptr
  %words_ptr = inttoptr i64 %words to ptr
  %out_ptr = inttoptr i64 %out to ptr
  %width = mul i64 %tiles, {LANES}
  %groups = udiv i64 %columns, {GROUP}
  %tile_words = mul i64 %groups, {format_.words}
  br label %take
take:
  %first = atomicrmw add ptr %next_at, i64 %grain monotonic
  %past = add i64 %first, %grain
  %last = call i64 @llvm.smin.i64(i64 %past, i64 %tiles)
  %is_any = icmp slt i64 %first, %tiles
  br i1 %is_any, label %tile, label %end
tile:
  %index = phi i64 [ %first, %take ], [ %index_after, %tile_done ]
  %word = mul i64 %index, %tile_words
  %words_tile = getelementptr <{LANES} x i32>, ptr %words_ptr, i64 %word
  %lane = mul i64 %index, {LANES}
  %out_tile = getelementptr float, ptr %out_ptr, i64 %lane
  br label %pass
pass:
  %row = phi i64 [ 0, %tile ], [ %row_after, %rows_done ]
  %left = sub i64 %rows, %row
  %taken = call i64 @llvm.smin.i64(i64 %left, i64 {_MOST_ROWS})
  %x_offset = mul i64 %row, %columns
  %x_row = getelementptr float, ptr %x_ptr, i64 %x_offset
  %out_offset = mul i64 %row, %width
  %out_row = getelementptr float, ptr %out_tile, i64 %out_offset
  switch i64 %taken, label %rows_done [
{cases}
  ]
{calls}
rows_done:
  %row_after = add i64 %row, %taken
  %is_row = icmp slt i64 %row_after, %rows
  br i1 %is_row, label %pass, label %tile_done
tile_done:
  %index_after = add i64 %index, 1
  %is_tile = icmp slt i64 %index_after, %last
  br i1 %is_tile, label %tile, label %take
end:
  ret void
}}
declare i64 @llvm.smin.i64(i64, i64)
"""
