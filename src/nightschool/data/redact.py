"""Personal data in examples → placeholders such as [EMAIL], before anything else sees them.

Found by the recognisers of Presidio that look at patterns and checksums (https://microsoft.github.io/presidio), and by those
for keys below. None asks a network or a model, so names of people and places are not found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nightschool.config.recipe import PersonalData
from nightschool.data.example import Example, NeededFact
from nightschool.errors import UsageError

# Keys and passwords as their makers shape them; what only looks random stays, for much of code does.
_KEY_PATTERNS = {
    "prefixed": r"\b(?:sk|pk|rk|ns|hf|ghp|gho|ghs|glpat|npm|pypi|xox[abprs])[-_][A-Za-z0-9_-]{16,}",
    "github": r"\bgithub_pat_[A-Za-z0-9_]{22,}",
    "aws": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "google": r"\bAIza[A-Za-z0-9_-]{35}",
    "token": r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    "pem": r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.|\n)*?-----END [A-Z ]*PRIVATE KEY-----",
    "bearer": r"(?<=Bearer )[A-Za-z0-9._~+/=-]{16,}",
    "named": r"""(?<=[?&])(?:api_?key|token|secret|password)=[^&\s"']{6,}""",
}

# The shortest telephone number that is looked for. Asking the recogniser takes 20 times as long as all others.
_ENOUGH_DIGITS = re.compile(r"\d(?:[^\d\n]{0,3}\d){6}")


class Redactor:
    """Replaces personal data of the given kinds.

    Where two finds overlap, the kind that is named first in `PersonalData` counts: a card number holds telephone numbers.

    Raises:
        UsageError: If Presidio is not installed.
    """

    def __init__(self, kinds: Sequence[PersonalData]) -> None:
        try:
            from presidio_analyzer import Pattern, PatternRecognizer  # with spaCy, which takes a second to import
            from presidio_analyzer import predefined_recognizers as known
        except ModuleNotFoundError as error:
            raise UsageError(
                f"`redact` takes the package presidio-analyzer, which is not installed ({error}). "
                f"Run: pip install 'nightschool[redact]'"
            ) from None

        class AnyEmail(known.EmailRecognizer):
            """Also of domains inside a company. The original one asks the network for the list of public domains."""

            def validate_result(self, pattern_text: str) -> bool | None:  # noqa: ARG002 - its signature
                return None

        def keys() -> Any:
            patterns = [Pattern(name, pattern, 1.0) for name, pattern in _KEY_PATTERNS.items()]
            return PatternRecognizer("KEY", name="keys", patterns=patterns, global_regex_flags=re.MULTILINE)

        makers: dict[PersonalData, Callable[[], Any]] = {
            "key": keys,
            "email": AnyEmail,
            "card": known.CreditCardRecognizer,
            "iban": known.IbanRecognizer,
            "ip": known.IpRecognizer,
            "phone": known.PhoneRecognizer,
        }
        self._recognizers = {kind: make() for kind, make in makers.items() if kind in kinds}

    def redact(self, example: Example, found: Counter[str]) -> Example:
        """The example without what is personal in it; what was replaced is counted in `found`, by kind.

        Its id and where it came from stay as they are.
        """

        def clean(text: str) -> str:
            return self._clean(text, found)

        def clean_fact(fact: NeededFact) -> NeededFact:
            return NeededFact(*map(clean, fact))

        return replace(
            example,
            messages=tuple(replace(message, content=clean(message.content)) for message in example.messages),
            text=None if example.text is None else clean(example.text),
            paraphrases=tuple(clean(wording) for wording in example.paraphrases),
            key=tuple(clean(part) for part in example.key),
            alternatives=tuple(clean(other) for other in example.alternatives),
            corrects=clean(example.corrects),
            fact=None if example.fact is None else clean_fact(example.fact),
            targets=tuple(target._replace(fact=clean_fact(target.fact)) for target in example.targets),
        )

    def _clean(self, text: str, found: Counter[str]) -> str:
        taken: list[tuple[int, int, str]] = []
        for kind, recognizer in self._recognizers.items():
            if kind == "phone" and _ENOUGH_DIGITS.search(text) is None:
                continue
            for one in recognizer.analyze(text, recognizer.supported_entities, None):
                if all(one.end <= start or end <= one.start for start, end, _ in taken):
                    taken.append((one.start, one.end, kind))
        for start, end, name in sorted(taken, reverse=True):
            found[name] += 1
            text = f"{text[:start]}[{name.upper()}]{text[end:]}"
        return text
