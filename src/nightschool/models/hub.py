"""Model folders of the hub: from its cache, or fetched if there is a network."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from nightschool.errors import NotFound
from nightschool.models.quiet import quiet_libraries
from nightschool.remotes.hub_token import hub_token

# Only what a model needs, only from the top of the repository, and no pickle.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def fetch_from_hub(ref: str) -> Path:
    """The folder of the hub model `ref`. With HF_HUB_OFFLINE=1 only the cache is looked at.

    Raises:
        NotFound: If it is neither in the cache nor to be had.
    """
    offline = constants.is_offline_mode()
    with quiet_libraries():
        try:
            folder = snapshot_download(
                ref, allow_patterns=_FILES, ignore_patterns=["*/*"], local_files_only=offline, token=hub_token()
            )
        except HFValidationError:
            raise NotFound(
                f"The base {ref!r} is not a name of the registry, a folder or a possible hub id. "
                "Write owner/model, ./folder, name@version or new:<preset>."
            ) from None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", "an error")
            raise NotFound(
                f"The hub answered {status} for the base {ref!r}. Check its name, and log in with `hf auth login` if it is gated or private."
            ) from None
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            why = "HF_HUB_OFFLINE is set" if offline else f"the hub does not answer ({type(error).__name__})"
            raise NotFound(
                f"The base {ref!r} is not a name of the registry and not on this machine, and {why}. Go online once, copy the model's folder here and "
                "write its path, or start with new:tiny."
            ) from None
    if not (Path(folder) / "config.json").is_file():
        raise NotFound(
            f"The base {ref!r} is not whole on this machine: its config.json was never fetched. Go online once, or write a folder's path."
        )
    return Path(folder)
