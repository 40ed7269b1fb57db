"""A base that is a GGUF file: unpacked once into a plain Hugging Face folder, from which everything else goes on.

transformers reads such files back into full weights, but refuses to save what it read, logs what it did not find, and
splits text as GPT-2 does where it does not know how. Here the weights move into a model that was built from the file's
configuration alone; every number of the file must have arrived, and the folder must give the logits of the file before
it is taken. It lies in the home's cache under the digest of the file, in the narrowest format that holds every number.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer
from tokenizers.pre_tokenizers import Sequence as InTurn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nightschool.data.chat.template import stop_token_ids
from nightschool.errors import Damaged, ModelError, NightschoolError, NotFound
from nightschool.models.export import prove_export, save_version_folder
from nightschool.models.folder import FolderInfo
from nightschool.models.gguf_header import SUFFIX, GgufHeader, read_header
from nightschool.models.gguf_read_once import read_once
from nightschool.models.quiet import quiet_libraries
from nightschool.models.strict import check_elements, check_values, not_loaded
from nightschool.store.atomic import publish_directory, sweep_partials
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.manifest import file_sha256, verify, write_manifest

# Raised when folders come out otherwise, so that none of an older nightschool is taken.
_FORMAT = 1
_WAIT_SECONDS = 3600.0
# Rotations for long contexts, which llama.cpp multiplies into the frequencies and transformers passes over.
_ROTATIONS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def unpacked(path: Path, home: Home) -> Path:
    """The plain folder of a GGUF file, made now if it was not made before. Reads the whole file, for its digest.

    Raises:
        NotFound: If there is no such file.
        ModelError: If it is not a causal language model that transformers reads back, or the package gguf is missing.
        Damaged: If it is cut, or holds other tensors than its configuration takes.
        DiskFull: If there is no room. Nothing half-made is ever left under the name.
    """
    header = read_header(path, _block_sizes(path))
    cache = home.cache / "gguf"
    folder = cache / f"{file_sha256(path)}-{_FORMAT}"
    if not _is_whole(folder):
        with lock(home.locks / f"gguf-{folder.name}.lock", f"the unpacking of {path}", wait_seconds=_WAIT_SECONDS):
            sweep_partials(cache)
            if not _is_whole(folder):
                _unpack(header, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder, digests=False)
    except (NotFound, Damaged):
        return False
    return True


def _block_sizes(path: Path) -> dict[int, tuple[str, int, int]]:
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise ModelError(
            f"Reading {path.name} takes the package gguf, which is not installed. Run: pip install 'nightschool[gguf]'"
        ) from None
    return {int(kind): (str(kind.name), elements, size) for kind, (elements, size) in GGML_QUANT_SIZES.items()}


def _unpack(header: GgufHeader, folder: Path) -> None:
    path = header.path
    try:
        with quiet_libraries(), read_once(), publish_directory(folder, replace=True) as partial:
            config = _config_of(header)
            direct = _load(header, config)
            tokenizer = _tokenizer_of(header)
            plain = _rebuilt(direct, config)
            save_version_folder(plain, tokenizer, partial, stop_ids=sorted(stop_token_ids(tokenizer)))
            del plain
            prove_export(direct, partial, tokenizer)
            write_manifest(partial, source=str(path), architecture=header.architecture)
    except (NightschoolError, OSError, MemoryError):
        raise
    except Exception as error:  # libraries meet foreign data here, and raise whatever they like
        raise ModelError(
            f"{path} ({header.architecture}) cannot be read back by transformers: {_first_line(error)} "
            "Take another file of this model, or its safetensors folder."
        ) from error


def _config_of(header: GgufHeader) -> PretrainedConfig:
    """The configuration that the file's keys describe, without a word of its packing."""
    path = header.path
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except (ValueError, NotImplementedError) as error:
        if "not supported yet" not in str(error) and "Unrecognized" not in str(error):
            raise
        raise ModelError(
            f"{path} has the architecture {header.architecture!r}, which transformers does not read back from GGUF. "
            f"It reads {', '.join(_architectures())}. Take the model's safetensors folder."
        ) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{path} holds a {config.model_type}, which is not a causal language model. Take a base that generates text."
        )
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    return cast(PretrainedConfig, type(config).from_dict(fields))


def _architectures() -> list[str]:
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    no_model = {"general", "tokenizer"}
    return sorted({*GGUF_CONFIG_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - no_model)


def _load(header: GgufHeader, config: PretrainedConfig) -> PreTrainedModel:
    """The weights as transformers reads them, in fp32; every number of the file is in them.

    Raises:
        Damaged: If a tensor is missing, left over or of another shape.
        ModelError: If the file holds what transformers does not read.
    """
    from transformers import GgufConfig

    path = header.path
    unread = [tensor.name for tensor in header.tensors if tensor.name in _ROTATIONS]
    if unread:
        raise ModelError(
            f"{path} holds {', '.join(unread)}, a rotation for long contexts that transformers does not read back: the model "
            "would answer otherwise. Take the model's safetensors folder."
        )
    with redirect_stderr(StringIO()):  # a progress bar that cannot be switched off
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            # Kept packed, weights would need a kernel of the hub.
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    model, report = loaded
    lost = not_loaded(report)
    if lost:
        raise ModelError(
            f"The tensors of {path} do not fit its configuration: {lost}. Fetch it again, or take the model's safetensors folder."
        )
    check_elements(model, FolderInfo(path.parent, config.model_type, None, header.tensors, quantized=False), str(path))
    check_values(model, str(path))
    return cast(PreTrainedModel, model.eval())


def _rebuilt(direct: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF and can therefore be saved."""
    dtype = _narrowest(direct)
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in direct.state_dict().items()
    }
    plain.load_state_dict(weights, strict=True, assign=True)
    plain.tie_weights()
    return cast(PreTrainedModel, plain)


def _narrowest(model: PreTrainedModel) -> torch.dtype:
    """The narrowest format that holds every weight exactly: 16 bits where the file was one of 16 bits."""
    weights = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            return dtype
    return torch.float32


def _tokenizer_of(header: GgufHeader) -> Any:
    """The tokenizer and chat template of the file, which splits text as the model's own does.

    Raises:
        ModelError: If transformers and we do not know how it splits.
    """
    path = header.path
    tokenizer: Any = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    split = header.metadata.get("tokenizer.ggml.pre", "default")
    if header.metadata.get("tokenizer.ggml.model") == "gpt2" and not _is_split_by_transformers(split):
        if split not in _SPLITS:
            raise ModelError(
                f"The tokenizer of {path} splits text in the way {split!r}, which transformers does not read back: the model "
                "would see other tokens than it learned. Take the model's safetensors folder."
            )
        tokenizer.backend_tokenizer.pre_tokenizer = _SPLITS[split]
    return tokenizer


def _is_split_by_transformers(split: str) -> bool:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return split in GGUF_PRE_TOKENIZER_SPLITS


def _as_gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _digit_by_digit() -> PreTokenizer:
    return InTurn([Digits(individual_digits=True), _as_gpt2()])


# How byte-level vocabularies split text, by the names of llama.cpp that transformers leaves to GPT-2's way.
_SPLITS: dict[str, PreTokenizer] = {
    **{name: _as_gpt2() for name in ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais")},
    **{name: _digit_by_digit() for name in ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone")},
}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
