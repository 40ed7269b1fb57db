"""The section of a recipe that says how a frozen base learns to read an explicit memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from nightschool.config.fields import NotBlank, Section, Share


class Memory(Section):
    """Reading an explicit memory (method: memory). The base stays as it is."""

    stage: Literal["router", "fusion", "joint"] = Field(
        "joint",
        description="What learns: router: the memory gate, which finds entries, and what fits a question; fusion: the layers that read them; joint: both.",
    )
    name: NotBlank | None = Field(None, description="The memory that the finished version reads; any, without it.")
    gate_rank: int | None = Field(128, ge=0, description="Rank of what learns in the memory gate; 0 for all of it.")
    fusion_rank: int | None = Field(
        128, ge=0, description="Rank of the layers that read; 0 for the full width of the base."
    )
    knowledge_dim: int | None = Field(
        None,
        ge=2,
        description="Numbers of an address, half of them of the subject; without it 1536, or twice the base's width where that is less.",
    )
    knowledge_length: int = Field(
        16, ge=1, le=64, description="Longest entry in tokens; an example with a longer one is refused."
    )
    num_candidates: int = Field(
        16, ge=1, le=64, description="Entries that may be read at once; in training, any number up to this."
    )
    encoder_layers: int | None = Field(
        None, ge=1, description="Layers of the base through which entries go; four fifths of them without it."
    )
    fusion_layers: list[int] | None = Field(
        None, description="Layers, counted from 0, after which entries are read; two of the upper ones without it."
    )
    similarity_loss_coef: float = Field(
        0.1, ge=0, description="Weight of the gate's contrastive loss (stage joint; stage router has no other)."
    )
    diversity_loss_coef: float = Field(
        0.05, ge=0, description="Weight of how alike the addresses of candidates are (stages router and joint)."
    )
    irrelevant_share: Share = Field(
        0.4, description="Share of the examples that do not find their entry, and are to say what the base would."
    )
    misled_share: Share = Field(
        0.5, description="Of those, the share in which the gate is made to be sure of a wrong entry."
    )
    subject_closed_below: Share = Field(
        0.5,
        description="An entry is not read at all whose subject is less likely than this to be what the question names.",
    )
    relation_closed_below: Share = Field(
        0.3,
        description="The same of its relation and of what is asked; less lets more wordings pass that were never trained.",
    )
    redraw_values: bool = Field(
        default=True, description="Draw other values in each epoch, so that nothing can be remembered in place of read."
    )

    @field_validator("knowledge_dim")
    @classmethod
    def _two_halves(cls, size: int | None) -> int | None:
        if size is not None and size % 2:
            raise ValueError(f"{size} is odd, and an address has two halves; write {size + 1}")
        return size
