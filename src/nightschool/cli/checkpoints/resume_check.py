"""`nightschool checkpoints verify --resume`: proof that the user's own run resumes exactly."""

from __future__ import annotations

from nightschool.cli.lookup import find_run_or_checkpoint
from nightschool.cli.output import answer, note
from nightschool.errors import UsageError
from nightschool.jobs.resume_check import FEWEST_STEPS, Verdict, check_resume
from nightschool.store.home import Home
from nightschool.units import format_bytes

SHOWN_DIFFERENCES = 10


def verify_resume(home: Home, target: str | None, steps: int) -> int:
    """Train, and print the verdict; return 0 if it is exact, else 1.

    Raises:
        UsageError: If there are too few steps to be interrupted.
    """
    if steps < FEWEST_STEPS:
        raise UsageError(f"--steps {steps} cannot be interrupted half-way. Write at least --steps {FEWEST_STEPS}.")
    run, point = find_run_or_checkpoint(home, target)
    if point is not None:
        point.verify(digests=True)
    note(f"Training up to {steps} steps of {run.id} twice, in copies. The run itself stays as it is.")
    verdict = check_resume(run, steps=steps, point=point)
    answer(verdict.to_json(), lambda: "\n".join(_lines(verdict)), quiet="exact" if verdict.exact else "different")
    return 0 if verdict.exact else 1


def _lines(verdict: Verdict) -> list[str]:
    first, middle, last = verdict.first_step, verdict.break_step, verdict.last_step
    found = verdict.comparison
    lines = [
        f"run            {verdict.run_id}",
        f"from           {verdict.checkpoint or 'step 0: no checkpoint lies early enough'}",
        f"uninterrupted  {_steps(first, last)}",
        f"resumed        {_steps(first, middle)}, saved; then, started anew, {_steps(middle, last)}",
        f"compared       {found.num_tensors} tensors ({format_bytes(found.tensor_bytes)}) bit by bit, "
        f"and {found.num_values} plain values",
    ]
    lines += [f"loss           {loss!r} in step {step}" for step, loss in verdict.losses.items()]
    if verdict.recorded_equal or verdict.recorded_different:
        both = verdict.recorded_equal + verdict.recorded_different
        lines.append(f"the run itself had written the very same loss in {verdict.recorded_equal} of {both} steps")
    if verdict.exact:
        return [*lines, f"EXACT          {verdict.run_id} resumes bit for bit as if it had never been interrupted"]
    lines += [f"differs        {one}" for one in found.differences[:SHOWN_DIFFERENCES]]
    if len(found.differences) > SHOWN_DIFFERENCES:
        lines.append(f"               and {len(found.differences) - SHOWN_DIFFERENCES} more; --json lists them")
    return [*lines, f"DIFFERENT      {len(found.differences)} things differ after the resume"]


def _steps(after: int, last: int) -> str:
    return f"step {last}" if last == after + 1 else f"steps {after + 1} to {last}"
