"""The sections of a recipe that say which training state is kept, and where."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from nightschool.config.fields import ByteCount, Milestone, NotBlank, Rhythm, Seconds, Section
from nightschool.units import Every


class Keep(Section):
    """Which checkpoints stay on disk."""

    last: int = Field(3, ge=1, description="This many newest ones.")
    best: int = Field(1, ge=0, description="This many with the lowest held-out loss.")
    every: Milestone | None = Field(
        None, description="Milestones that stay for ever: the first checkpoint of each `1000 steps` or `5 epochs`."
    )

    @field_validator("every")
    @classmethod
    def _of_training(cls, every: Every | None) -> Every | None:
        if every is not None and every.unit == "seconds":
            raise ValueError(f"`{every}` is a time, and milestones go by steps or epochs; write for example 1000 steps")
        return every


class Upload(Section):
    """Where checkpoints go besides the disk. A text alone is its `url`."""

    url: NotBlank | None = Field(
        None,
        description="`gs://bucket/folder`, `s3://…`, `az://container/…`, `hf://owner/repository` or `file:///folder`; "
        "without it nothing is uploaded.",
    )
    background: bool = Field(
        default=True, description="Upload in a process of its own; otherwise before training goes on."
    )
    archive: Literal["none", "tar.gz"] = Field(
        "none", description="`tar.gz` packs each checkpoint first; that costs CPU time and saves little."
    )
    bandwidth: ByteCount | None = Field(None, description="At most so many bytes per second: `20 MB`.")
    max_pending: ByteCount | None = Field(
        None, description="With more bytes than this waiting to be uploaded, training waits: `50 GB`."
    )
    wait_at_stop: Seconds = Field(
        20.0,
        ge=0,
        description="A run that is asked to stop waits this long for its uploads; what is left stays queued.",
    )


class Checkpoints(Section):
    """Full training state, resumable."""

    every: Rhythm | None = Field(
        None, description="How often: `500 steps`, `1 epochs`, `10m`; without it, at the end of each epoch."
    )
    each_epoch: bool = Field(
        default=False, description="Also at the end of each epoch, where `every` says something else."
    )
    keep: Keep = Field(default_factory=Keep, description="Retention.")
    background: bool = Field(
        default=True,
        description="Write in a process of its own while training goes on, from a copy of the state in memory.",
    )
    on_full_disk: Literal["stop", "continue"] = Field(
        "stop", description="What a run does when there is no room for a checkpoint; the one before stays whole."
    )
    publish: int = Field(
        0,
        ge=0,
        description="So many of the newest become versions, too, each under the alias `ckpt-step-N`, to be asked beside the best.",
    )
    upload: Upload = Field(default_factory=Upload, description="Where checkpoints go besides the disk.")

    @field_validator("upload", mode="before")
    @classmethod
    def _an_address(cls, value: Any) -> Any:
        return {"url": value} if value is None or isinstance(value, str) else value
