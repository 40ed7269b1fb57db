"""Chat templates are code that comes with a base: run with what transformers gives them, and within bounds.

Jinja's sandbox keeps a template from Python, not from time and memory: two nested loops over `range(99999)` run for
hours, and `'a' * 10**10` takes 10 GB. Here every loop, call, filter and comparison is paid for from a budget of
operations, so that the same template always ends at the same place, whatever the machine; and nothing that a template
builds may grow beyond a size that depends on the conversation alone.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

LONGEST_TEMPLATE = 1_000_000
# What any template may do and build, before what the conversation adds to it: a real one takes some hundreds of
# operations a message, and no text longer than its rendering. A million take about a second.
OPERATIONS = 1_000_000
OPERATIONS_PER_CALL = 5
SIZE = 1_000_000  # of a text in characters; an element of a collection counts as ten
SIZE_PER_CHARACTER = 16
SIZE_PER_OPERATION = 20
ELEMENT_SIZE = 10
LARGEST_NUMBER_BITS = 4096
LONGEST_PADDING = 1000

# Of values only these methods are there: none of them writes to what the template was given, and what makes a text longer
# is checked.
_TEXT_METHODS = (
    "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "format_map", "index",
    "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable",
    "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith",
    "strip", "swapcase", "title", "upper", "zfill",
)  # fmt: skip
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(_TEXT_METHODS),
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["copy", "count", "index"]),
    tuple: frozenset(["count", "index"]),
    int: frozenset({"bit_length", "is_integer"}),
    float: frozenset({"is_integer"}),
    bytes: frozenset(),
}
_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs"}
_REMOVED_FILTERS = ("pprint", "random", "urlize", "wordwrap", "xmlattr")
_GROWING_FILTERS = {"batch", "center", "indent", "slice", "tojson", "truncate"}
_LONG_NUMBER = re.compile(r"\*|\d{4,}")


class TooMuch(jinja2.TemplateRuntimeError):
    """A template asked for more time or room than any conversation needs."""


class _Budget:
    """What one rendering may still do, and how large the largest thing may be that it builds."""

    def __init__(self, characters: int) -> None:
        self.operations = OPERATIONS + characters
        self.size = SIZE + SIZE_PER_CHARACTER * characters

    def spend(self, operations: int) -> None:
        self.operations -= operations
        if self.operations < 0:
            raise TooMuch("it takes too many steps: no conversation needs so many")

    def check_size(self, size: float) -> None:
        if size > self.size:
            raise TooMuch(f"it makes a text or a list of more than {self.size:,} characters or elements")


_COLLECTIONS = (list, tuple, dict, set)
_budget: ContextVar[_Budget] = ContextVar("budget")


def render(template: str, values: Mapping[str, Any], *, characters: int, strftime_now: Callable[[str], str]) -> str:
    """Render a chat template as `tokenizer.apply_chat_template` does, within bounds.

    Args:
        template: Its source.
        values: What it sees: `messages`, `tools`, `add_generation_prompt`, special tokens, …
        characters: Length of the conversation, by which the bounds grow.
        strftime_now: What the template gets as the clock.

    Raises:
        TooMuch: If it takes too many operations, or builds something too large.
        jinja2.TemplateError: If it is malformed or refuses the conversation; other errors as Python raises them.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise TooMuch(f"it has {len(template):,} characters, and the limit is {LONGEST_TEMPLATE:,}")
    token = _budget.set(_Budget(characters))
    try:
        pieces, length = [], 0
        for piece in _compiled(template, strftime_now).generate(values):
            length += len(piece)
            _budget.get().check_size(length)
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=16)
def _compiled(template: str, strftime_now: Callable[[str], str]) -> jinja2.Template:
    environment = _Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False
    )
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)


def _size_of(value: Any) -> int:
    """The size of a value, paid for; what is in a collection counts each time it is there, until it is too much."""
    budget = _budget.get()
    if isinstance(value, str | bytes):
        size = len(value)
    elif isinstance(value, _COLLECTIONS):
        size, pending = 0, [value]
        while pending and size <= budget.size:
            found = pending.pop()
            if isinstance(found, dict):
                pending += [*found.keys(), *found.values()]
            elif isinstance(found, _COLLECTIONS):
                pending += found
            size += ELEMENT_SIZE + (len(found) if isinstance(found, str | bytes) else 0)
        budget.check_size(size)
    else:
        size = 1
    budget.spend(1 + size // SIZE_PER_OPERATION)
    return size


def _checked(value: Any) -> Any:
    """The value, paid for, if it is not too large."""
    if isinstance(value, (str, bytes, *_COLLECTIONS)):
        _budget.get().check_size(_size_of(value))
    return value


def _counted(values: Iterable[Any]) -> Iterable[Any]:
    """What a loop goes over; each element is paid for."""
    if isinstance(values, Sequence | Mapping | set):
        return _Counted(values)
    return _one_by_one(values)


def _one_by_one(values: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for value in values:
        budget.spend(1)
        yield value


class _Counted:
    """A collection with a length, for `loop.length` and `loop.last`."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return _one_by_one(self._values)


def _joined(values: Iterable[Any]) -> str:
    """`~`, and what a macro, a call or a block has put out."""
    texts = [value if isinstance(value, str) else str(_checked(value)) for value in values]
    _budget.get().check_size(sum(map(len, texts)))
    return str(_checked("".join(texts)))


@jinja2.pass_context  # so that it is never called while a template is compiled
def _finalized(_context: Any, value: Any) -> Any:
    return _checked(value)


class _Paid(NodeTransformer):
    """Puts what checks and counts around loops, literals, concatenations, comparisons and slices."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja's name
        self.generic_visit(node)
        node.iter = _through("counted", cast(nodes.Expr, node.iter))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through("joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _through("checked", node.expr)
        for operand in node.ops:
            operand.expr = _through("checked", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _through("checked", node) if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _through("checked", node)

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815


def _through(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, f"nightschool_{name}", [], [], None, None, lineno=node.lineno)


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with the filters and functions of transformers, and bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_joined)

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_finalized, **options)
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _tojson
        self.filters = {name: _paid_filter(name, filter_) for name, filter_ in self.filters.items()}
        self.filters |= {f"nightschool_{work.__name__[1:]}": work for work in (_counted, _joined, _checked)}
        self.tests = {name: _paid(cast(Any, test)) for name, test in self.tests.items()}
        self.globals |= {"raise_exception": _raise_exception, "dict": _Dict(), "namespace": _Namespace}
        del self.globals["lipsum"]

    def _generate(self, source: nodes.Template, *arguments: Any, **more: Any) -> str:
        return super()._generate(_Paid().visit(source), *arguments, **more)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        return (known is None or attr in known) and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - keywords may be `self`
        _budget.get().spend(OPERATIONS_PER_CALL)
        owner = getattr(__obj, "__self__", None)
        for value in (owner, *args, *kwargs.values()):
            _size_of(value)
        if isinstance(owner, str):
            args = _method_arguments(owner, __obj.__name__, args)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_binop(operator, left, right)
        return _checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, is_map = value.__self__, value.__name__ == "format_map"

        @functools.wraps(value)
        def formatted(*args: Any, **kwargs: Any) -> str:
            given = args[0] if is_map and len(args) == 1 else kwargs
            largest = max([_size_of(one) for one in (*args, *kwargs.values())], default=0)
            _budget.get().check_size(len(text) + text.count("{") * largest)
            return str(_Formatter(self).vformat(text, () if is_map else args, given))

        return formatted


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if _LONG_NUMBER.search(format_spec):
            raise TooMuch(f"it formats with {format_spec[:40]!r}, which is wider than {LONGEST_PADDING}")
        return super().format_field(value, format_spec)


def _check_binop(operator: str, left: Any, right: Any) -> None:
    budget = _budget.get()
    budget.spend(1)
    sized = (str, bytes, list, tuple)
    if operator == "%" and isinstance(left, str | bytes):
        if isinstance(left, bytes) or _LONG_NUMBER.search(left):
            raise TooMuch("it formats with a width that is not written out, or too long")
        budget.check_size(len(left) + left.count("%") * _size_of(right))
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        budget.check_size(len(left) + len(right))
    elif operator == "*" and isinstance(left, sized) and isinstance(right, int):
        budget.check_size(_size_of(left) * max(0, right))
    elif operator == "*" and isinstance(right, sized) and isinstance(left, int):
        budget.check_size(_size_of(right) * max(0, left))
    elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > LARGEST_NUMBER_BITS:
            raise TooMuch(f"it computes with numbers of more than {LARGEST_NUMBER_BITS} bits")


def _method_arguments(text: str, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check what would make `text.method(*args)` long; what can be read only once is returned as a list."""
    budget = _budget.get()
    if method in _PADDING and args and isinstance(args[0], int):
        budget.check_size((1 + (len(text) if method == "expandtabs" else 0)) * args[0])
    elif method == "replace" and len(args) > 1 and all(isinstance(one, str) for one in args[:2]):
        budget.check_size(len(text) + text.count(args[0]) * max(0, len(args[1]) - len(args[0])))
    elif method == "join" and len(args) == 1:
        parts = [str(one) if isinstance(one, str) else one for one in _counted(args[0])]
        _check_joined(parts, len(text))
        return (parts,)
    return args


def _check_joined(parts: list[Any], separator: int) -> None:
    _budget.get().check_size(_size_of(parts) + separator * len(parts))


def _paid(work: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(work)  # with what says that jinja hands it a context
    def paid(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            _size_of(value)
        return work(*args, **kwargs)

    return paid


def _paid_filter(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    takes = 1 if hasattr(work, "jinja_pass_arg") else 0

    @functools.wraps(work)
    def paid(*args: Any, **kwargs: Any) -> Any:
        before, (value, *more) = args[:takes], args[takes:]
        subject = _size_of(value)
        sizes = [_size_of(one) for one in (*more, *kwargs.values())]
        budget = _budget.get()
        if name in _GROWING_FILTERS:
            numbers = [abs(one) for one in (*more, *kwargs.values()) if isinstance(one, int)]
            if name == "indent":  # by lines
                subject = 1 + str(value).count("\n")
            budget.check_size((1 + subject) * max([*sizes, *numbers], default=1))
        elif name == "replace" and len(more) > 1:
            budget.check_size(subject + str(value).count(str(more[0])) * len(str(more[1])))
        elif name == "join":
            value = list(_counted(value))
            _check_joined(value, len(str(more[0] if more else kwargs.get("d", ""))))
        elif name == "format":
            _check_binop("%", str(value), tuple(more) or kwargs)
        return _checked(work(*before, value, *more, **kwargs))

    return paid


def _tojson(
    value: Any, ensure_ascii: Any = None, indent: Any = None, separators: Any = None, sort_keys: Any = None
) -> str:
    return json.dumps(
        value, ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Dict:
    """`dict(…)` without the class, whose attributes lead to Python."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(…)` that keeps no name with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        for name in (values := dict(*args, **kwargs)):
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: says which tokens are the model's, and changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's name

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
