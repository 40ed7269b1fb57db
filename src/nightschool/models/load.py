"""Loading a base: every tensor that the model needs, nothing else, or an error that names it.

A reference is one of: a hub id (`Qwen/Qwen3-0.6B`), a folder (`./model`), a GGUF file (`./model.gguf`), a version of the
registry (`name@version`, `name@alias`, or `name` alone for its champion), or `new:<preset>`. All but the last may end in
`[nf4]`, `[nf4-double]`, `[fp4]`, `[fp4-double]` or `[int8]`: with linear layers quantised so (see `models.quantize`).

transformers only logs what it could not load and goes on with random weights. Here its report is an error, and so is a
difference between the number of elements in the files and in the model: no conversion of names can hide a lost tensor
from a count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nightschool.errors import Damaged, ModelError
from nightschool.models.adapters import adapter_base, load_adapter, merge_adapter
from nightschool.models.build import build_config, build_model
from nightschool.models.folder import FolderInfo, inspect_folder, is_adapter_folder, is_memory_folder
from nightschool.models.gguf_header import SUFFIX as GGUF
from nightschool.models.hub import fetch_from_hub
from nightschool.models.memory_modules import MemoryModules
from nightschool.models.memory_version import read_memory_folder
from nightschool.models.quantize import dequantized, quantization_config, quantization_of, steady
from nightschool.models.quiet import quiet_libraries
from nightschool.models.streamed import ExpertPlace, build_streamed, read_streamed
from nightschool.models.strict import check_causal, check_elements, check_values, not_loaded
from nightschool.models.weights_file import ENDINGS as WEIGHTS_FILES
from nightschool.models.weights_file import refuse_weights_file
from nightschool.store.home import Home
from nightschool.store.names import split_quantization
from nightschool.store.registry import Registry, Version
from nightschool.units import format_bytes
from nightschool.work.host_memory import host_bytes

if TYPE_CHECKING:
    from peft import PeftModel

# A model that states no context gets this many tokens.
_UNSTATED_CONTEXT_TOKENS = 2048
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, in evaluation mode.

    `ref` is what was asked for, resolved: `name@version` for a champion, an absolute path for a folder or file. `base_ref`
    is what its weights stand on: for an adapter that is kept apart its base, else `ref`. `path` is the folder of the full weights that an adapter can stand
    on; None where no folder holds them (`new:` models, merged adapters).
    `adapter` says whether `model` is a `PeftModel` whose adapter is kept apart.
    `memory` has the memory modules of a version that is a base with an explicit memory; `model` is then the base alone.
    `vocab_size` counts rows of the embedding, `tokenizer_size` ids of the tokenizer; the former is never smaller.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    ref: str
    base_ref: str
    path: Path | None
    context_tokens: int
    vocab_size: int
    tokenizer_size: int
    adapter: bool = False
    memory: MemoryModules | None = None

    @property
    def adapter_base(self) -> str | None:
        """The reference of the base under an adapter that is kept apart."""
        return self.base_ref if self.adapter else None

    @property
    def base_location(self) -> str | None:
        """Where plain peft finds the base under an adapter: a hub id or an absolute folder; None where there is none."""
        if self.path is None:
            return None
        plain, _ = split_quantization(self.base_ref)
        of_the_hub = "@" not in plain and not Path(plain).is_absolute()
        return plain if of_the_hub else str(self.path)


ReadFolder = Callable[
    [Path, str, torch.dtype, torch.device | str, str | None], tuple[PreTrainedModel, PreTrainedTokenizerBase]
]


def load_base(
    ref: str,
    home: Home,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 42,
    merge: bool = True,
    root: Path | None = None,
    shape: Mapping[str, Any] | None = None,
    read: ReadFolder | None = None,
    experts: ExpertPlace | None = None,
    moment_bytes: float = 0,
) -> LoadedModel:
    """Load what `ref` means.

    Args:
        ref: See the module.
        home: Whose registry is asked.
        dtype: Of the parameters.
        device: Where the model goes.
        tokenizer: Needed for `new:<preset>`, which has none; else the base's own is taken and this one is ignored.
        seed: Of the weights of `new:<preset>`.
        merge: Whether an adapter is added into its base's weights (to serve, to train in full) or kept apart (to go on
            training it).
        root: Folder against which a relative path is taken; the working directory without it.
        shape: Fields of the configuration of `new:<preset>` that differ from the preset's.
        read: What reads a folder of full weights, in place of `read_folder`.
        experts: Where the experts of a mixture live, if not with all other weights.
        moment_bytes: What its optimizer will keep of each number of `new:<preset>`, for which there must be room.

    Raises:
        NotFound: If nothing of that name is here; the message says what to do.
        ModelError: If it is not a causal language model, or its vocabulary is smaller than its tokenizer.
        Damaged: If a file is broken, or a tensor is missing, unexpected or of the wrong shape.
    """
    if ref.startswith("new:"):
        return _build_new(ref, tokenizer, seed, dtype, device, shape, experts, moment_bytes)
    found = locate(ref, home, root)
    return load_located(found, home, dtype=dtype, device=device, merge=merge, read=read, experts=experts)


def embedding_rows(model: PreTrainedModel | PeftModel) -> int:
    """Rows of the input embedding: ids that the model knows."""
    return int(cast(Any, model).get_input_embeddings().weight.shape[0])


def context_of(model: PreTrainedModel | PeftModel) -> int:
    """Tokens that the model was made to look at, from its configuration."""
    config = cast(Any, model).config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(stated) if stated else _UNSTATED_CONTEXT_TOKENS


def as_path(ref: str, root: Path | None) -> Path | None:
    """The folder or file that `ref` means, or None. What is written like a path is one, there or not."""
    path = Path(ref).expanduser()
    path = path if path.is_absolute() or root is None else root / path
    if (
        ref.startswith(("./", "../", "/", "~", ".\\"))
        or ref in (".", "..")
        or ref.lower().endswith((GGUF, *WEIGHTS_FILES))
    ):
        return path.resolve()
    return path.resolve() if "@" not in ref and path.is_dir() else None


def plain_folder(path: Path, home: Home) -> Path:
    """The Hugging Face folder of what `as_path` found: the folder itself, or what a GGUF file was unpacked into.

    Raises:
        NotFound, ModelError, Damaged: If the file is not there or cannot be read back, see `models.gguf.unpacked`; or if it is one
            of weights that are no model, see `models.weights_file`.
    """
    if path.name.lower().endswith(WEIGHTS_FILES) and not path.is_dir():
        refuse_weights_file(path, str(path))
    if not path.name.lower().endswith(GGUF) or path.is_dir():
        return path
    from nightschool.models.gguf import unpacked  # few bases are GGUF files

    return unpacked(path, home)


@dataclass(frozen=True)
class Located:
    """The plain folder that a reference means. `base` is what the registry says that an adapter stands on.

    `quantization` says how the linear layers of the weights are to be quantised.
    """

    folder: Path
    ref: str
    base: str | None = None
    quantization: str | None = None


def locate(ref: str, home: Home, root: Path | None = None) -> Located:
    """Find what `ref` means: a folder or GGUF file, a version of the registry, or a repository of the hub. See `load_base`."""
    plain, quantization = split_quantization(ref)
    if quantization is not None:
        found = locate(plain, home, root)
        return replace(found, ref=f"{found.ref}[{quantization}]", quantization=quantization)
    path = as_path(ref, root)
    if path is not None:
        return Located(plain_folder(path, home), str(path))
    registry = Registry(home)
    if "@" in ref or ref in registry.names():
        return located_version(registry.resolve(ref))
    return Located(fetch_from_hub(ref), ref)


def located_version(version: Version) -> Located:
    return Located(version.path, version.ref, version.facts.base if version.facts.kind != "model" else None)


def down_to_weights(found: Located, home: Home) -> list[Located]:
    """What a reference stands on: itself, and below an adapter or memory modules its base, down to a folder of full weights.

    Raises:
        ModelError: If an adapter names no base, or stands on itself or on memory modules.
    """
    chain = [found]
    while is_adapter_folder(chain[-1].folder) or is_memory_folder(chain[-1].folder):
        last = chain[-1]
        if len(chain) > 1 and is_memory_folder(last.folder):
            raise ModelError(
                f"{chain[-2].ref!r} stands on {last.ref!r}, which reads a memory, and nothing can stand on that. Train it on the "
                "base of that version, and the memory on top."
            )
        base = last.base or (
            read_memory_folder(last.folder)[1].base if is_memory_folder(last.folder) else adapter_base(last.folder)
        )
        if base is None:
            raise ModelError(f"The adapter {last.ref!r} names no base. Publish it again with its base.")
        under = locate(base, home)
        if last.quantization is not None and under.quantization is None:
            under = replace(under, ref=f"{under.ref}[{last.quantization}]", quantization=last.quantization)
        if any(under.folder.resolve() == above.folder.resolve() for above in chain):
            raise ModelError(
                f"The adapter {last.ref!r} names the base {base!r}, which stands on this adapter itself. "
                "Correct base_model_name_or_path in its adapter_config.json."
            )
        chain.append(under)
    return chain


def _build_new(
    ref: str,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
    shape: Mapping[str, Any] | None,
    experts: ExpertPlace | None,
    moment_bytes: float,
) -> LoadedModel:
    if tokenizer is None:
        raise ModelError(
            f"The base {ref!r} is made from nothing and has no tokenizer. Train one on the data and pass it."
        )
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if experts is not None:
        config = build_config(ref, len(tokenizer), **ids, shape=shape)
        return _finish(build_streamed(config, seed, experts, device), tokenizer, ref, None)
    _check_room(ref, build_config(ref, len(tokenizer), **ids, shape=shape), torch.device(device), moment_bytes)
    model = _moved(build_model(ref, len(tokenizer), seed, **ids, shape=shape), device, dtype)
    return _finish(model, tokenizer, ref, None)


def _check_room(ref: str, config: Any, device: torch.device, moment_bytes: float) -> None:
    """Refuse a fresh model that finds no room while it is drawn in fp32, or on a CPU with gradients and moments, rather than have all memory filled."""
    with torch.device("meta"), quiet_libraries():
        outline: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    numbers = sum(parameter.numel() for parameter in outline.parameters())
    free, needed = host_bytes().free, int(numbers * (8 + moment_bytes if device.type == "cpu" else 4))
    if needed > free:
        raise ModelError(
            f"The base {ref!r} has {numbers:,} parameters: {format_bytes(4 * numbers)} in fp32, and "
            f"{format_bytes(int((8 + moment_bytes) * numbers))} with gradients and moments; {format_bytes(free)} of memory are free. Take a smaller one, or for a mixture write experts.tier: disk."
        )


def _refuse_what_streams_not(found: Located, home: Home, *, merge: bool) -> None:
    """Experts are streamed from a folder of full weights alone, on which an adapter may stand that is kept apart."""
    chain = down_to_weights(found, home)
    if len(chain) > (1 if merge else 2):
        raise ModelError(
            f"The base {found.ref} is an adapter, and experts are streamed from full weights. Write "
            "experts.tier: device (to serve, leave --experts-resident out), or take the version that it stands on."
        )


def _read_streamed(
    place: ExpertPlace, folder: Path, ref: str, dtype: torch.dtype, device: torch.device | str, quantization: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `read_folder`, with experts where `place` says."""
    facts = inspect_folder(folder, ref)
    model = read_streamed(facts, load_config(folder, ref), ref, place, dtype, device, quantization)
    return model, load_tokenizer(folder, ref)


def load_located(
    found: Located,
    home: Home,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    merge: bool = True,
    read: ReadFolder | None = None,
    experts: ExpertPlace | None = None,
) -> LoadedModel:
    """Load what was found; an adapter brings its base with it. See `load_base`."""
    if experts is not None:
        _refuse_what_streams_not(found, home, merge=merge)
        read = partial(_read_streamed, experts)
    folder, ref = found.folder, found.ref
    chain = down_to_weights(found, home)
    if len(chain) == 1:
        weights, tokenizer = (read or read_folder)(folder, ref, dtype, device, found.quantization)
        return _finish(weights, tokenizer, ref, folder)
    if is_memory_folder(folder):
        modules, _ = read_memory_folder(folder)
        base = load_located(chain[1], home, dtype=dtype, device=device, merge=True, read=read)
        return replace(base, ref=ref, base_ref=base.ref, memory=modules.to(device))
    # A base that is an adapter itself has to become one set of weights before another adapter stands on it. Merging
    # changes weights in place, so those that others may hold too are never merged into.
    of_its_own = merge or len(chain) > 2
    under = load_located(chain[1], home, dtype=dtype, device=device, merge=True, read=None if of_its_own else read)
    if merge and chain[1].quantization is not None:
        under = replace(under, model=dequantized(cast(PreTrainedModel, under.model), under.ref))
    wrapped = load_adapter(cast(PreTrainedModel, under.model), folder, trainable=not merge)
    wrapped.eval()
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder, ref) if has_tokenizer else under.tokenizer
    if merge:
        return _finish(merge_adapter(wrapped), tokenizer, ref, None)
    return replace(_finish(wrapped, tokenizer, ref, under.path), base_ref=under.ref, adapter=True)


def find_tokenizer(ref: str, home: Home, root: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder, in a GGUF file or at a hub id. Raises as `load_base` does."""
    path = as_path(ref, root)
    return load_tokenizer(fetch_from_hub(ref) if path is None else plain_folder(path, home), ref)


def load_tokenizer(folder: Path, ref: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        ModelError: If there is none that can be read.
    """
    # Without this, transformers makes up an empty tokenizer of the model's usual class.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"The base {ref!r} has no tokenizer that can be read in {folder} (none of {', '.join(_TOKENIZER_FILES)}). "
            "Put the base's tokenizer.json and tokenizer_config.json there."
        )
    with quiet_libraries():
        try:
            loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the files are foreign: transformers raises whatever it stumbles over
            raise ModelError(
                f"The base {ref!r} has no tokenizer that can be read in {folder} ({_said(error)[:-1]}). "
                "Put the base's tokenizer.json and tokenizer_config.json there."
            ) from None
    return cast(PreTrainedTokenizerBase, loaded)


def load_config(folder: Path, ref: str) -> Any:
    """The configuration of a model folder, a `PreTrainedConfig`, without the kernels that it may ask for.

    Raises:
        Damaged: If transformers cannot make a configuration of its config.json.
    """
    with quiet_libraries():
        try:
            config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the file is foreign: a configuration divides by what is written there
            raise Damaged(
                f"{folder / 'config.json'} of the base {ref!r} cannot be used: {_said(error)} Fetch or copy the folder again."
            ) from None
    # A config may name a kernel of the hub, which would be fetched and run; with None the library's own is chosen.
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def read_folder(
    folder: Path, ref: str, dtype: torch.dtype, device: torch.device | str, quantization: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer that a folder of full weights holds. Raises as `load_base` does."""
    weights = _load_weights(inspect_folder(folder, ref), ref, dtype, device, quantization)
    return weights, load_tokenizer(folder, ref)


def _load_weights(
    facts: FolderInfo, ref: str, dtype: torch.dtype, device: torch.device | str, quantization: str | None
) -> PreTrainedModel:
    config = load_config(facts.path, ref)
    # Quantised layer by layer while it is read, where it will be, so that the whole is never there in full.
    quantized: dict[str, Any] = {}
    if quantization is not None:
        if facts.quantized:
            raise ModelError(f"The base {ref!r} is quantised already. Leave [{quantization}] out.")
        quantized = {
            "quantization_config": quantization_config(quantization, dtype, ref),
            "device_map": {"": torch.device(device)},
        }
    with quiet_libraries():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(facts.path),
                config=config,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                **quantized,
            )
        except Exception as error:  # the files are foreign: transformers raises whatever it stumbles over
            raise Damaged(
                f"The base {ref!r} cannot be loaded from {facts.path}: {_said(error)} "
                "Its configuration and its weights do not belong together, or a file is broken; fetch it again."
            ) from None
    model, report = loaded
    lost = not_loaded(report)
    if lost:
        raise Damaged(
            f"The weights of the base {ref!r} do not fit its configuration: {lost}. "
            "Fetch it again, or correct its config.json."
        )
    check_elements(model, facts, ref)
    check_values(model, ref)
    if not type(model).__name__.endswith("ForCausalLM"):  # encoders have language-model heads, too
        check_causal(model, ref)
    if quantization is not None:
        if quantization_of(model) is None:
            raise ModelError(f"No layer of the base {ref!r} can be quantised. Take method: lora.")
        steady(model, device)
        return cast(PreTrainedModel, model)
    return _moved(cast(PreTrainedModel, model), device)


def _finish(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, ref: str, path: Path | None
) -> LoadedModel:
    rows, ids = embedding_rows(model), len(tokenizer)
    if ids > rows:
        raise ModelError(
            f"The tokenizer of the base {ref!r} has {ids} ids and the model's vocabulary only {rows}. "
            "Take the tokenizer that belongs to the model."
        )
    model.eval()
    return LoadedModel(model, tokenizer, ref, ref, path, context_of(model), rows, ids)


def _moved(model: PreTrainedModel, device: torch.device | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    return cast(PreTrainedModel, cast(Any, model).to(device=device, dtype=dtype))


def _said(error: BaseException) -> str:
    """The first line of what a library said, as a sentence."""
    said = (str(error).strip().splitlines() or [""])[0][:300]
    if not isinstance(error, OSError | ValueError | RuntimeError):
        said = f"{type(error).__name__} {said}".strip()  # `'hidden_size'` or `division by zero` alone say little
    return said if said.endswith((".", "!")) else f"{said}."
