"""Tasks of `lm-eval` (EleutherAI's evaluation harness), asked by the harness itself of a model that is loaded here.

The harness renders prompts, scores choices and judges answers, so figures are those that others publish. It is an extra: nothing here imports it
before a task is asked.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from nightschool.errors import DataError, NightschoolError, NotFound, NotInstalled
from nightschool.models.load import LoadedModel
from nightschool.models.quiet import quiet_libraries

# Loggers that say what is of no use to whoever asked, such as that the model was loaded already.
_TALKERS = ("lm_eval", "datasets", "evaluate", "httpx")


@dataclass(frozen=True)
class TaskFigure:
    """One figure of a task, as the harness names it: `acc`, by the `filter` that answers went through; `stderr` is None where it has none."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int


def harness() -> Any:
    """The package.

    Raises:
        NotInstalled: Without the extra `lm-eval`.
    """
    try:
        import_module("accelerate")
        return import_module("lm_eval")
    except ImportError as error:
        raise NotInstalled(
            f"Tasks of lm-eval take the package lm-eval, which is not installed here ({error}). Run: pip install 'nightschool[lm-eval]'"
        ) from None


def ask_tasks(
    loaded: LoadedModel,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    max_samples: int | None = None,
    num_fewshot: int | None = None,
    max_seq_len: int | None = None,
    batch_size: int = 8,
) -> tuple[list[TaskFigure], dict[str, Any]]:
    """Ask a model tasks; their figures, and the versions of the tasks.

    Args:
        loaded: Who is asked. Prompts are plain text, without a chat template, as the harness has them by default.
        names: Of tasks or groups of the harness, or of those in `folder`.
        folder: With the files of tasks of your own. Such a file may hold Python, which then runs here.
        max_samples: At most so many of each task, the first ones.
        num_fewshot: So many solved examples before each question; as the task says without it.
        max_seq_len: Longest prompt with its answer in tokens; the context of the model without it.
        batch_size: Prompts that pass together.

    Raises:
        NotInstalled: Without the extra.
        NotFound: If there is no such task.
        DataError: If the data of a task cannot be had.
    """
    lm_eval = harness()
    tasks, models = import_module("lm_eval.tasks"), import_module("lm_eval.models.huggingface")
    with quiet_libraries(), _Silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Those that come along are 10,000 files, which take seconds to look through.
        own = tasks.TaskManager(include_path=str(folder), include_defaults=False) if folder is not None else None
        manager = own if own is not None and set(names) <= set(own.all_tasks) else None
        manager = manager or tasks.TaskManager(include_path=None if folder is None else str(folder))
        if unknown := [name for name in names if not manager.match_tasks([name])]:
            where = "of lm-eval" if folder is None else f"of lm-eval or in {folder}"
            raise NotFound(f"There is no task {unknown[0]} {where}. `lm-eval ls tasks` lists those that come along.")
        model = models.HFLM(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            backend="causal",
            max_length=min(max_seq_len or loaded.context_tokens, loaded.context_tokens),
            batch_size=batch_size,
        )
        try:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(names),
                task_manager=manager,
                limit=max_samples,
                num_fewshot=num_fewshot,
                bootstrap_iters=1000,
                log_samples=False,
            )
        except NightschoolError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise DataError(
                f"lm-eval could not ask {', '.join(names)}: {error}. Its data come from the Hub, unless the file of the task names local ones "
                "(dataset_path: json, dataset_kwargs: {data_files: …}); with HF_HUB_OFFLINE=1 they must be in the cache."
            ) from error
    return _figures(found), {name: found["versions"].get(name) for name in found["results"]}


def _figures(found: Any) -> list[TaskFigure]:
    figures = []
    for task, values in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            kept = float(stderr) if isinstance(stderr, int | float) else None
            figures.append(TaskFigure(task, metric, filtered, float(value), kept, samples))
    return figures


class _Silent:
    """A block in which the harness and what it stands on say nothing but errors."""

    def __enter__(self) -> None:
        self._before = {name: logging.getLogger(name).level for name in _TALKERS}
        for name in _TALKERS:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for name, level in self._before.items():
            logging.getLogger(name).setLevel(level)
