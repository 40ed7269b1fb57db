"""Published versions: immutable folders that say in `nightschool.json` where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nightschool.errors import Damaged
from nightschool.store.atomic import read_json
from nightschool.store.manifest import Manifest, verify

FACTS = "nightschool.json"
MEMORY_CONFIG = "memory_config.json"
"""In the folder of a version of the kind `memory`: its base, the name and the revision of its memory."""

VersionKind = Literal["model", "adapter", "memory"]


class Probe(BaseModel):
    """Token ids in, token ids out under greedy decoding: what a version must answer before it is served."""

    model_config = ConfigDict(frozen=True)

    prompt_ids: list[int]
    expected_ids: list[int]


class VersionMetadata(BaseModel):
    """Where a version comes from and what it is. Fields that a newer nightschool added are left out when read."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    name: str = Field("", description="The name it is published under; filled by the registry.")
    version: str = Field("", description="Its id; filled by the registry when it is empty.")
    created_at: datetime | None = Field(None, description="When it was published; filled by the registry.")
    kind: VersionKind = Field(
        "model", description="All weights, an adapter on `base`, or what lets `base` read an explicit memory."
    )
    method: str = Field("full", description="How it was trained; `import` if it was not trained here.")
    base: str = Field("", description="The reference that the weights stand on, as load_base reads it.")
    parent: str | None = Field(None, description="The version that the run started from, as name@version.")
    run_id: str | None = Field(None, description="The run that made it.")
    source_digest: str | None = Field(None, description="SHA-256 of the files it was added from.")
    recipe_digest: str | None = Field(None, description="SHA-256 of the resolved recipe.")
    data_fingerprint: str | None = Field(None, description="Fingerprint of the examples that were trained.")
    num_parameters: int | None = Field(None, description="Parameters of the whole model, with its base.")
    dtype: str | None = Field(None, description="Type of the stored weights.")
    context_tokens: int | None = Field(None, description="Longest prompt and answer together, in tokens.")
    heldout_loss: float | None = Field(None, description="Nats per token on the held-out split.")
    probes: list[Probe] = Field(default_factory=list, description="What it must answer before it is served.")


@dataclass(frozen=True)
class Version:
    """One published version. Nothing is read until its facts are asked for."""

    name: str
    id: str
    path: Path

    @property
    def ref(self) -> str:
        """`name@id`."""
        return f"{self.name}@{self.id}"

    @cached_property
    def facts(self) -> VersionMetadata:
        """What nightschool.json says. Raises Damaged if it was altered, NotFound if the version was removed."""
        path = self.path / FACTS
        content = read_json(path)
        try:
            facts = VersionMetadata.model_validate(content)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(str(part) for part in problem["loc"])
            raise Damaged(
                f"{path} has a wrong {field}: {problem['msg']}. Restore the file from a copy, or remove the version."
            ) from error
        if (facts.name, facts.version) != (self.name, self.id):
            raise Damaged(
                f"{path} names {facts.name}@{facts.version}, but lies in the folder of {self.ref}. "
                f"Folders of versions are never renamed or copied; restore it, or remove it."
            )
        return facts

    def verify(self, *, digests: bool = True) -> Manifest:
        """Compare every file with the manifest. Raises Damaged, naming the file and both values, or NotFound."""
        return verify(self.path, digests=digests)
