"""How answers are drawn: one table of what can be set, as options of a command and while talking."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from nightschool.errors import UsageError


@dataclass(frozen=True)
class Setting:
    """What a parameter is called before people, and the numbers that it can be, both ends among them."""

    label: str
    low: float
    high: float
    kind: type[int] | type[float] = float

    def refused(self, value: object) -> UsageError:
        """The error for a value that it cannot be."""
        what = "a whole number" if self.kind is int else "a number"
        return UsageError(f"Invalid {self.label} value: {value}. Write {what} from {self.low:g} to {self.high:g}.")


SETTINGS = {
    "temperature": Setting("temperature", 0, 2),
    "top_p": Setting("top-p", 0.001, 1),
    "top_k": Setting("top-k", 0, 1000, int),
    "max_new_tokens": Setting("maximum length", 1, 65_536, int),
    "repetition_penalty": Setting("repetition penalty", 0.01, 10),
    "presence_penalty": Setting("presence penalty", -2, 2),
    "frequency_penalty": Setting("frequency penalty", -2, 2),
    "seed": Setting("seed", 0, 2**63 - 1, int),
}


@Parameter(name="*")
@dataclass(frozen=True)
class Params:
    """How an answer is drawn, as options.

    Attributes:
        temperature: 0 always takes the likeliest token; 1 draws as the model says.
        top_p: Draw from the likeliest tokens that together have this probability.
        top_k: Draw from this many likeliest tokens; 0 from all.
        max_new_tokens: Longest answer in tokens.
        repetition_penalty: Divides the scores of tokens that stand in question or answer already; 1 is none.
        presence_penalty: Lowers the scores of tokens that were answered already; 0 is none.
        frequency_penalty: Lowers them once for each time; 0 is none.
        seed: Draw the same way each time.

    Raises:
        UsageError: If a value is none that it can be.
    """

    temperature: Annotated[float, Parameter(name=["--temperature", "-t"])] = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: Annotated[int, Parameter(name=["--max-new-tokens", "--max-tokens", "--max-length"])] = 256
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            setting = SETTINGS[name]
            if value is not None and not (math.isfinite(value) and setting.low <= value <= setting.high):
                raise setting.refused(f"{value:g}")

    def with_value(self, name: str, text: str) -> Params:
        """These parameters with one of them read from `text`.

        Raises:
            UsageError: If there is no such parameter, or the text is no such value.
        """
        if name not in SETTINGS:
            raise UsageError(f"There is no parameter {name!r}. There are {', '.join(SETTINGS)}.")
        try:
            value: Any = SETTINGS[name].kind(text)
        except ValueError:
            raise SETTINGS[name].refused(repr(text)) from None
        return dataclasses.replace(self, **{name: value})

    def shown(self, name: str) -> str:
        """The value of one, as it would be typed."""
        value = getattr(self, name)
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


@Parameter(name="*")
@dataclass(frozen=True)
class GreedyParams(Params):
    """The same, and the likeliest token is taken unless the temperature says otherwise.

    Attributes:
        temperature: 0 always takes the likeliest token; 1 draws as the model says.
    """

    temperature: Annotated[float, Parameter(name=["--temperature", "-t"])] = 0.0
