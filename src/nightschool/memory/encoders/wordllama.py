"""Addresses by the static word vectors of the package wordllama (extra `wordllama`): 19 MB, weights inside.

The package is not imported: that sets up logging for the whole program, and its own loader asks the network where a file is not
where it looks. Its two files are enough; a text's vector is the mean of its tokens', as there.
"""

from __future__ import annotations

from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from nightschool.errors import NotFound, UsageError
from nightschool.memory.encoders.encoder import TextEncoder
from nightschool.memory.encoders.heads import normalised

Floats = npt.NDArray[np.float32]

_WEIGHTS, _TENSOR = "weights/l2_supercat_256.safetensors", "embedding.weight"
_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
_TEXTS = 1024


class WordLlamaEncoder(TextEncoder):
    """Means of word vectors of 256 numbers.

    Raises:
        UsageError: If the package is not installed.
        NotFound: If `folder` is not that of the package.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or _folder_of_the_package()
        for name in (_WEIGHTS, _TOKENIZER):
            if not (folder / name).is_file():
                raise NotFound(f"{folder} has no {name}. Name the folder of the package wordllama.")
        from safetensors.numpy import load_file

        self._table = load_file(folder / _WEIGHTS)[_TENSOR]
        self._tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        digest = sha256(self._table[:: max(1, len(self._table) // 256)].tobytes()).hexdigest()[:16]
        super().__init__(f"wordllama:{digest}", self._table.shape[1])

    def embed(self, texts: list[str]) -> Floats:
        """See `TextEncoder`."""
        means = np.zeros((len(texts), self._table.shape[1]), np.float32)
        for begin in range(0, len(texts), _TEXTS):
            encoded = self._tokenizer.encode_batch(texts[begin : begin + _TEXTS], add_special_tokens=False)
            for place, one in enumerate(encoded, start=begin):
                if one.ids:
                    means[place] = (
                        self._table[np.minimum(one.ids, len(self._table) - 1)].astype(np.float32).mean(axis=0)
                    )
        return normalised(means)


def _folder_of_the_package() -> Path:
    spec = find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "The encoder 'wordllama' takes a package that is not installed. Run: pip install 'nightschool[wordllama]'"
        )
    return Path(spec.submodule_search_locations[0])
