"""The error tree: what can go wrong, with the exit code and the HTTP status of each.

    NightschoolError                     exit 1    HTTP 500
    ├── UsageError                       exit 2    HTTP 400   the request or command makes no sense
    │   ├── RecipeError                  exit 2    HTTP 422   problems in a recipe, all reported together
    │   ├── NameRefused                  exit 2    HTTP 400   a name that may not become a path
    │   └── PromptTooLong                exit 2    HTTP 400   prompt + answer do not fit the context
    ├── DataError                        exit 1    HTTP 422   a data file or row is wrong
    │   └── NothingToTrain               exit 1    HTTP 422   no token would carry loss, or too much is cut
    ├── NotFound                         exit 4    HTTP 404   a model, version, run, checkpoint or file is not there
    ├── Conflict                         exit 1    HTTP 409   the state forbids it (exists, is served, is pinned)
    │   ├── Locked                       exit 1    HTTP 409   another process holds the lock
    │   └── SwapFailed                   exit 1    HTTP 409   a swap changed nothing; `stage` says where it failed
    ├── Damaged                          exit 1    HTTP 500   a stored artifact is incomplete or altered
    │   ├── StateMismatch                exit 1    HTTP 409   a checkpoint does not fit the run that resumes from it
    │   └── MadeByNewer                  exit 1    HTTP 409   written by a newer version, in a form that this one cannot read
    ├── ModelError                       exit 1    HTTP 422   a base that is not a causal LM, or does not fit its tokenizer
    ├── NonFiniteLoss                    exit 1    HTTP 500   the loss became NaN or infinite
    ├── DiskFull                         exit 1    HTTP 507   no room; what was committed is still whole
    ├── NotLoaded                        exit 1    HTTP 503   no model is being served
    ├── QueueFull                        exit 1    HTTP 429   too many requests wait; retry later
    ├── RemoteError                      exit 1    HTTP 502   an object store refused, or answered with nonsense
    │   ├── CredentialsRefused           exit 1    HTTP 502   credentials are missing, wrong, expired or too weak
    │   ├── BucketMissing                exit 4    HTTP 404   the bucket, container or repository does not exist
    │   └── Unreachable                  exit 1    HTTP 503   the network or the store failed; later it may work
    └── Interrupted                      exit 75   HTTP 503   stopped by a signal; resumable

Every message has one sentence of fact and one of remedy, in the names that the user typed.
"""

from __future__ import annotations

from dataclasses import dataclass


class NightschoolError(Exception):
    """The root. `str(error)` is the whole message that a user sees."""

    exit_code: int = 1
    http_status: int = 500
    code: str = "internal_error"


class UsageError(NightschoolError):
    exit_code = 2
    http_status = 400
    code = "usage"


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


class RecipeError(UsageError):
    """All problems of one recipe, reported together."""

    http_status = 422
    code = "recipe"

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class NameRefused(UsageError):
    code = "name_refused"


class PromptTooLong(UsageError):
    """`prompt_tokens` and `max_new_tokens` do not fit `context_tokens`."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, max_new_tokens: int, context_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.context_tokens = context_tokens
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and the answer may take {max_new_tokens}, but the context "
            f"of this model holds {context_tokens}. Shorten the prompt or lower max_new_tokens."
        )


class DataError(NightschoolError):
    http_status = 422
    code = "data"


class NothingToTrain(DataError):
    code = "nothing_to_train"


class NotFound(NightschoolError):
    exit_code = 4
    http_status = 404
    code = "not_found"


class Conflict(NightschoolError):
    http_status = 409
    code = "conflict"


class Locked(Conflict):
    code = "locked"


class SwapFailed(Conflict):
    """A swap that changed nothing. `stage`: resolve, verify, load, warm_up, probe or switch."""

    code = "swap_failed"

    def __init__(self, stage: str, message: str) -> None:
        self.stage = stage
        super().__init__(f"The swap failed at the stage '{stage}' and changed nothing: {message}")


class Damaged(NightschoolError):
    code = "damaged"


class StateMismatch(Damaged):
    http_status = 409
    code = "state_mismatch"


class MadeByNewer(Damaged):
    http_status = 409
    code = "made_by_newer"


class ModelError(NightschoolError):
    http_status = 422
    code = "model"


class NonFiniteLoss(NightschoolError):
    code = "non_finite_loss"


class DiskFull(NightschoolError):
    http_status = 507
    code = "disk_full"


class NotLoaded(NightschoolError):
    http_status = 503
    code = "not_loaded"


class QueueFull(NightschoolError):
    """The queue is at its bound. `retry_after_seconds` goes into the `Retry-After` header."""

    http_status = 429
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


class RemoteError(NightschoolError):
    http_status = 502
    code = "remote"


class CredentialsRefused(RemoteError):
    code = "credentials_refused"


class BucketMissing(RemoteError):
    exit_code = 4
    http_status = 404
    code = "bucket_missing"


class Unreachable(RemoteError):
    http_status = 503
    code = "unreachable"


class Interrupted(NightschoolError):
    exit_code = 75
    http_status = 503
    code = "interrupted"
