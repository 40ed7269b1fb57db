"""A GGUF file is parsed once while it is unpacked.

transformers parses all keys of the file, its vocabulary among them, for the configuration, for the weights and for the tokenizer, and has
the package gguf make its table of names anew for each module of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

# What one thread puts in place of the package's own must be gone before the next one looks for that.
_ALONE = Lock()


@contextmanager
def read_once() -> Iterator[None]:
    """A block in which a file is parsed, and a table of names made, when it is asked for first."""
    import gguf

    package: Any = gguf
    with _ALONE:
        own = {name: getattr(package, name) for name in ("GGUFReader", "get_tensor_name_map")}
        try:
            for name, made in own.items():
                setattr(package, name, cache(made))
            yield
        finally:
            for name, made in own.items():
                setattr(package, name, made)
