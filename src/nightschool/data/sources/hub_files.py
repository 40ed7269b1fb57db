"""Files of data sets of the Hugging Face Hub: from its cache, or fetched if there is a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nightschool.data.sources.rows import ENDINGS
from nightschool.errors import NotFound
from nightschool.remotes.hub_token import hub_token

SCHEME = "hf://datasets/"


def is_on_hub(path: str) -> bool:
    """Whether a path of a recipe names files of a data set of the Hub."""
    return path.startswith(SCHEME)


def files_named(path: str, key: str) -> list[Path]:
    """The files that `hf://datasets/OWNER/NAME/*.parquet` names, sorted.

    Raises:
        NotFound: If they are not to be had; the message begins with `key` and says what to do.
    """
    owner, _, rest = path.removeprefix(SCHEME).partition("/")
    name, _, pattern = rest.partition("/")
    if not owner or not name or not pattern:
        raise NotFound(f"{key}: {path} names no files. Write {SCHEME}OWNER/NAME/data/*.parquet.")
    try:
        return hub_files(f"{owner}/{name}", [pattern])
    except NotFound as error:
        raise NotFound(f"{key}: {error}") from None


def hub_files(repository: str, patterns: Sequence[str]) -> list[Path]:
    """The data files of a repository that fit a pattern. With HF_HUB_OFFLINE=1 only the cache is looked at.

    Raises:
        NotFound: If the repository, or such a file in it, is neither in the cache nor to be had.
    """
    # It takes 0.3 s to import, and few runs read data of the Hub.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    offline = constants.is_offline_mode()
    disable_progress_bars()
    try:
        folder = Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                allow_patterns=list(patterns),
                local_files_only=offline,
                token=hub_token(),
            )
        )
    except HFValidationError:
        raise NotFound(f"{repository} is no possible name of a data set of the Hub. Write OWNER/NAME.") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise NotFound(
            f"the Hub answered {status} for the data set {repository}. Check its name, and log in with `hf auth login` if it is gated."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if offline else f"the Hub does not answer ({type(error).__name__})"
        raise NotFound(f"the data set {repository} is not in the Hub's cache, and {why}. Go online once.") from None
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.suffix.lower() in ENDINGS})
    if not found:
        raise NotFound(
            f"the data set {repository} has no file {' or '.join(patterns)} here. Look at its files on the Hub; where the cache is not whole, "
            "go online once."
        )
    return found
