"""Keys and values of prompts that were read before, so that a shared beginning is computed once.

A tree of blocks: each holds the keys and values of `BLOCK` tokens, whose values depend on all tokens before them, so a
block belongs under exactly one parent. Every binding has a root of its own; requests of different tenants, or keys, share nothing.
The least recently used leaf goes first when bytes run out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nightschool.engine.binding import Binding

BLOCK = 32

Tokens = tuple[int, ...]


@dataclass(eq=False)
class _Node:
    """A block under its parent. Roots have no pieces, but a binding."""

    parent: _Node | None
    tokens: Tokens
    pieces: list[Tensor] = field(default_factory=list)
    children: dict[Tokens, _Node] = field(default_factory=dict)
    binding: Binding | None = None

    @property
    def num_bytes(self) -> int:
        return sum(piece.numel() * piece.element_size() for piece in self.pieces)


class PrefixCache:
    """Longest known prefixes, whole blocks only. Not thread-safe; every engine has its own.

    Args:
        limit_bytes: Kept at most.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._roots: dict[Binding, _Node] = {}
        # From the least to the most recently used. Whoever touches a block touches its parents after it, so the first
        # is always a leaf.
        self._recent: OrderedDict[_Node, None] = OrderedDict()
        self.num_bytes = 0

    @property
    def num_blocks(self) -> int:
        return len(self._recent)

    @property
    def num_roots(self) -> int:
        return len(self._roots)

    def match(self, binding: Binding, token_ids: Sequence[int]) -> list[list[Tensor]]:
        """The pieces of the longest known prefix, block by block; at least the last token is left to be computed."""
        path = self._walk(binding, token_ids[: len(token_ids) - 1])
        self._touch(path)
        return [node.pieces for node in path]

    def insert(self, binding: Binding, token_ids: Sequence[int], read: Callable[[int, int], list[Tensor]]) -> None:
        """Keep the whole blocks of `token_ids` that are not known yet. `read(start, end)` copies their pieces."""
        path = self._walk(binding, token_ids)
        parent = path[-1] if path else self._roots.get(binding) or _Node(None, (), binding=binding)
        for start in range(len(path) * BLOCK, len(token_ids) - BLOCK + 1, BLOCK):
            tokens = tuple(token_ids[start : start + BLOCK])
            node = _Node(parent, tokens, read(start, start + BLOCK))
            if self.num_bytes + node.num_bytes > self._limit_bytes and not self._make_room(node.num_bytes, path):
                break
            if parent.binding is not None:
                self._roots[parent.binding] = parent
            parent.children[tokens] = node
            self.num_bytes += node.num_bytes
            path.append(node)
            parent = node
        self._touch(path)

    def drop(self, adapter: str) -> None:
        """Forget whatever was read with an adapter, whoever asked."""
        for binding in [binding for binding in self._roots if binding.adapter == adapter]:
            below = [self._roots.pop(binding)]
            while below:
                node = below.pop()
                below += node.children.values()
                self._recent.pop(node, None)
                self.num_bytes -= node.num_bytes

    def clear(self) -> None:
        """Forget whatever was read."""
        self._roots.clear()
        self._recent.clear()
        self.num_bytes = 0

    def _walk(self, binding: Binding, token_ids: Sequence[int]) -> list[_Node]:
        node = self._roots.get(binding)
        path: list[_Node] = []
        for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
            node = node.children.get(tuple(token_ids[start : start + BLOCK])) if node else None
            if node is None:
                break
            path.append(node)
        return path

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._recent[node] = None
            self._recent.move_to_end(node)

    def _make_room(self, num_bytes: int, path: list[_Node]) -> bool:
        """Drop leaves until `num_bytes` fit, but nothing of `path`, which is being extended."""
        self._touch(path)
        kept = set(path)
        while self.num_bytes + num_bytes > self._limit_bytes:
            node = next(iter(self._recent), None)
            if node is None or node in kept:
                return False
            del self._recent[node]
            self.num_bytes -= node.num_bytes
            assert not node.children, "only leaves are the least recently used"
            assert node.parent is not None
            del node.parent.children[node.tokens]
            # Bindings come and go for as long as a server runs; an empty root would stay for ever.
            if node.parent.binding is not None and not node.parent.children:
                del self._roots[node.parent.binding]
        return True
