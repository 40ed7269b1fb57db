"""The error tree: what can go wrong, with the exit code and the HTTP status of each.

    NightschoolError                     exit 1    HTTP 500
    ├── UsageError                       exit 2    HTTP 400
    │   ├── RecipeError                  exit 2    HTTP 422
    │   ├── NameRefused                  exit 2    HTTP 400
    │   ├── NotInstalled                 exit 2    HTTP 501
    │   └── PromptTooLong                exit 2    HTTP 400
    ├── DataError                        exit 1    HTTP 422
    │   └── NothingToTrain               exit 1    HTTP 422
    ├── NotFound                         exit 4    HTTP 404
    ├── Conflict                         exit 1    HTTP 409
    │   ├── Locked                       exit 1    HTTP 409
    │   └── SwapFailed                   exit 1    HTTP 409
    ├── Damaged                          exit 1    HTTP 500
    │   ├── StateMismatch                exit 1    HTTP 409
    │   └── MadeByNewer                  exit 1    HTTP 409
    ├── ModelError                       exit 1    HTTP 422
    ├── NonFiniteLoss                    exit 1    HTTP 500
    ├── DiskFull                         exit 1    HTTP 507
    ├── NotLoaded                        exit 1    HTTP 503
    ├── QueueFull                        exit 1    HTTP 429
    │   └── QuotaExceeded                exit 1    HTTP 429
    ├── RemoteError                      exit 1    HTTP 502
    │   ├── CredentialsRefused           exit 1    HTTP 502
    │   ├── BucketMissing                exit 4    HTTP 404
    │   └── Unreachable                  exit 1    HTTP 503
    └── Interrupted                      exit 75   HTTP 503

Every message has one sentence of fact and one of remedy, in the names that the user typed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


class NightschoolError(Exception):
    """The root. `str(error)` is the whole message that a user sees.

    A subclass names its exit code and HTTP status where they differ from its parent's. `code`, which programs read, is
    its name in snake case unless it says otherwise.
    """

    exit_code: int = 1
    http_status: int = 500
    code: str = "internal_error"

    def __init_subclass__(
        cls, *, exit_code: int | None = None, http_status: int | None = None, code: str | None = None
    ) -> None:
        super().__init_subclass__()
        cls.exit_code = exit_code or cls.exit_code
        cls.http_status = http_status or cls.http_status
        cls.code = code or re.sub(r"\B(?=[A-Z])", "_", cls.__name__.removesuffix("Error")).lower()


class UsageError(NightschoolError, exit_code=2, http_status=400):
    """The request or the command makes no sense."""


class NotInstalled(UsageError, http_status=501):
    """It takes a package of an extra that is not installed."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a recipe.

    `where` is `file:line` or the override as it was typed; `key` is the dotted key.
    """

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


class RecipeError(UsageError, http_status=422):
    """All problems of one recipe, reported together."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class NameRefused(UsageError):
    """A name that may not become a path."""


class PromptTooLong(UsageError, code="context_length_exceeded"):
    """`prompt_tokens` and `max_new_tokens` do not fit `context_tokens`."""

    def __init__(self, prompt_tokens: int, max_new_tokens: int, context_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.context_tokens = context_tokens
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and the answer may take {max_new_tokens}, but the context "
            f"of this model holds {context_tokens}. Shorten the prompt or lower max_new_tokens."
        )


class DataError(NightschoolError, http_status=422):
    """A data file or row is wrong."""


class NothingToTrain(DataError):
    """No token would carry loss, or too much is cut."""


class NotFound(NightschoolError, exit_code=4, http_status=404):
    """A model, version, run, checkpoint or file is not there."""


class Conflict(NightschoolError, http_status=409):
    """The state forbids it (exists, is served, is pinned)."""


class Locked(Conflict):
    """Another process holds the lock."""


class SwapFailed(Conflict):
    """A swap that changed nothing, and why. `stage`: resolve, verify, load, warm_up, probe or switch."""

    def __init__(self, stage: str, message: str) -> None:
        self.stage, self.reason = stage, message
        super().__init__(f"The swap failed at the stage '{stage}' and changed nothing: {message}")


class Damaged(NightschoolError):
    """A stored artifact is incomplete or altered."""


class StateMismatch(Damaged, http_status=409):
    """A checkpoint does not fit the run that resumes from it."""


class MadeByNewer(Damaged, http_status=409):
    """Written by a newer version, in a form that this one cannot read."""


class ModelError(NightschoolError, http_status=422):
    """A base that is not a causal LM, or does not fit its tokenizer."""


class NonFiniteLoss(NightschoolError):
    """The loss became NaN or infinite."""


class DiskFull(NightschoolError, http_status=507):
    """No room; what was committed is still whole."""


class NotLoaded(NightschoolError, http_status=503):
    """No model is being served."""


class QueueFull(NightschoolError, http_status=429):
    """The queue is at its bound. `retry_after_seconds` goes into the `Retry-After` header."""

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


class QuotaExceeded(QueueFull):
    """A tenant has as much as it may have; `retry_after_seconds` as for its parent."""


class RemoteError(NightschoolError, http_status=502):
    """An object store refused, or answered with nonsense."""


class CredentialsRefused(RemoteError):
    """Credentials are missing, wrong, expired or too weak."""


class BucketMissing(RemoteError, exit_code=4, http_status=404):
    """The bucket, container or repository does not exist."""


class Unreachable(RemoteError, http_status=503):
    """The network or the store failed; later it may work."""


class Interrupted(NightschoolError, exit_code=75, http_status=503):
    """Stopped by a signal; resumable."""
