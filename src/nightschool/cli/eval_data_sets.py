"""`nightschool eval --dataset`: a model on what data sets hold out."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nightschool.cli.formatting import figure
from nightschool.cli.output import answer, bold, note
from nightschool.config.data_sets import PromptStyle, data_sets_named
from nightschool.data.sources.data_sets import NamedRows, find_all, read_data_set
from nightschool.data.sources.problems import Problems
from nightschool.errors import UsageError
from nightschool.feedback.training_data import folders_of_data_sets
from nightschool.store.atomic import write_text
from nightschool.store.home import Home

if TYPE_CHECKING:
    from nightschool.evaluation.data_set_exam import DataSetFigures

Programs = Literal["confined", "unconfined", "off"]
NUM_ROWS = 16
MAX_SEQ_LEN = 1024
MAX_NEW_TOKENS = 256


def evaluate_data_sets(
    model: str,
    dataset: str,
    *,
    data_dir: Path | None,
    max_samples: int | None,
    sample: int | None,
    prompt_style: PromptStyle,
    programs: Programs,
    max_new_tokens: int | None,
    max_seq_len: int | None,
    show_examples: int,
    output_file: Path | None,
    experts_resident: int | None,
) -> None:
    """See `cli.evaluate.evaluate`."""
    from nightschool.engine.local_model import local_model
    from nightschool.evaluation.data_set_exam import examine_data_set, summary
    from nightschool.evaluation.judges import JUDGES
    from nightschool.evaluation.programs.sandbox import check_confinement

    for option, value in (("--max-samples", max_samples), ("--sample", sample)):
        if value is not None and value < 1:
            raise UsageError(f"{option} is {value}; it must be 1 or more.")
    try:
        names = data_sets_named([name.strip() for name in dataset.split(",")], trained=False)
    except ValueError as error:
        raise UsageError(f"--dataset: {error}.") from None
    if programs == "confined" and any(name in JUDGES and JUDGES[name].program for name in names):
        check_confinement()
    home = Home.find()
    # All of it is read before a model is loaded: what is missing is said at once.
    sets = _read(names, home, data_dir, max_samples)
    figures: list[DataSetFigures] = []
    with local_model(home, model, num_rows=NUM_ROWS, experts_resident=experts_resident) as local:
        for rows in sets:
            figures.append(
                examine_data_set(
                    local,
                    rows,
                    style=prompt_style,
                    max_seq_len=max_seq_len or MAX_SEQ_LEN,
                    num_questions=sample,
                    max_new_tokens=max_new_tokens or MAX_NEW_TOKENS,
                    confinement=None if programs == "off" else programs,
                )
            )
            note(f"{rows.name}: {len(rows.held_out)} rows are done.")
        ref = local.ref
    data: dict[str, Any] = {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": ref,
        "results": {one.name: one.to_json() for one in figures},
        "summary": summary(figures),
        "settings": {"prompt_style": prompt_style, "programs": programs, "max_samples": max_samples, "sample": sample},
    }
    shown = [
        one for each in figures for one in sorted(each.answers, key=lambda one: one.correct)[: max(0, show_examples)]
    ]
    if show_examples:
        data["examples"] = [vars(one) for one in shown]
    if output_file is not None:
        write_text(output_file, json.dumps(data, ensure_ascii=False, indent=2) + "\n")
        note(f"Wrote the figures to {output_file}.")

    def text() -> str:
        lines = [bold(ref), *("  ".join([f"{one.name:<10}", *_columns(one)]) for one in figures)]
        if data["summary"]:
            means = data["summary"]
            lines.append(
                f"{'mean':<10}  loss {figure(means['avg_loss'])}  perplexity {figure(means['avg_perplexity'])}  "
                f"accuracy {means['avg_token_accuracy']:.1%}"
            )
        for each in shown:
            lines += ["", f"{'✓' if each.correct else '✗'} {each.id}  {bold(each.question)}"]
            lines += [f"  expected {each.expected}", f"  answered {each.answer}"]
            lines += [f"  {each.why}"] if each.why else []
        return "\n".join(lines)

    answer(data, text, quiet=figure(data["summary"].get("avg_loss")) or "")


def _read(names: list[str], home: Home, data_dir: Path | None, max_samples: int | None) -> list[NamedRows]:
    folders = folders_of_data_sets(None if data_dir is None else str(data_dir), Path.cwd(), home)
    problems = Problems()
    sets = [
        read_data_set(
            name,
            files,
            root=Path.cwd(),
            problems=problems,
            max_samples=max_samples,
            trained=False,
        )
        for name, files in find_all(names, folders, trained=False).items()
    ]
    problems.check()
    return sets


def _columns(one: DataSetFigures) -> list[str]:
    columns = []
    if one.tokens is not None:
        columns.append(
            f"loss {one.tokens.loss:.4f}  perplexity {figure(one.tokens.perplexity_uncapped)}  accuracy {one.tokens.accuracy:.1%}  "
            f"{one.tokens.samples} samples, {one.tokens.tokens} tokens"
        )
    if one.answers:
        from nightschool.evaluation.judges import JUDGES

        low, high = one.share.interval
        measure = JUDGES[one.name].measure.replace("_", " ")
        columns.append(f"{measure} {one.share.count} of {one.share.asked} ({low:.1%} to {high:.1%})")
    return columns
