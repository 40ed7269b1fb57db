"""The gate's report for people: which rule, which figures, which answers, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nightschool.evaluation.diff import shortened
from nightschool.evaluation.gate import show
from nightschool.evaluation.scores import OpenPair
from nightschool.evaluation.verdict import AnswerPair, GateReport, RuleResult


def render(report: GateReport, console: Console | None = None, *, max_examples: int = 5) -> None:
    """Print a report, readable from 60 columns on.

    Args:
        report: What the gate decided.
        console: Where to print; standard output without it.
        max_examples: At most this many answers under each heading; how many more there are is said.
    """
    console = console or Console()
    promoted = report.decision == "promote"
    head = Text.assemble(
        ("PASSED" if promoted else "REFUSED", "bold green" if promoted else "bold red"),
        "  ",
        (report.candidate, "bold"),
    )
    console.print(head, soft_wrap=True)
    base = ", its base, as there is no champion yet" if report.champion_is_base else ""
    console.print(Text(f"compared with {report.champion}{base}" if report.champion else "there is no champion yet"))
    console.print()
    console.print(_rules(report.rules))
    console.print()
    console.print(_why(report.rules))
    for note in report.notes:
        console.print(Text(note))
    shown: set[str] = set()
    for rule in report.failed:
        _answers(console, f"Behind {rule.rule}", "red", rule.examples, shown, max_examples)
        _margins(console, rule, max_examples)
    _answers(console, "Changed by the judge", "yellow", report.overruled, shown, max_examples)
    _answers(console, "Lost", "red", report.lost, shown, max_examples)
    _answers(console, "Learned", "green", report.learned, shown, max_examples)
    _open(console, report.open, max_examples)
    if report.suggestions:
        console.print(Text("\nWhat to do", style="bold"))
        for suggestion in report.suggestions:
            console.print(Padding(Text(suggestion), (0, 0, 0, 2)))


def _rules(rules: Sequence[RuleResult]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rule", "needed", "candidate", "champion", "verdict"):
        table.add_column(column, justify="right" if column in ("candidate", "champion") else "left", no_wrap=True)
    for rule in rules:
        figures = show(rule.candidate, rule.unit), show(rule.champion, rule.unit)
        table.add_row(rule.rule, Text(rule.limit), *figures, Text(*_VERDICTS[rule.passed]))
    return table


_VERDICTS = {True: ("passed", "green"), False: ("FAILED", "bold red"), None: ("not judged", "yellow")}


def _why(rules: Sequence[RuleResult]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for rule in rules:
        table.add_row(Text(rule.rule, style=_VERDICTS[rule.passed][1]), Text(rule.why))
    return table


def _answers(
    console: Console, title: str, style: str, pairs: Sequence[AnswerPair], shown: set[str], max_examples: int
) -> None:
    """Print the answers that were not printed under an earlier heading."""
    left = [pair for pair in pairs if pair.id not in shown]
    if not left:
        return
    before = len(pairs) - len(left)
    counted = f"{len(pairs)}" + (f", {before} of them above" if before else "")
    console.print(Text(f"\n{title} ({counted})", style=f"bold {style}"))
    for pair in left[:max_examples]:
        shown.add(pair.id)
        console.print(_pair(pair))
    if len(left) > max_examples:
        console.print(Text(f"  and {len(left) - max_examples} more"))


def _margins(console: Console, rule: RuleResult, max_examples: int) -> None:
    """Print the pairs whose better answer lost most against the worse one."""
    if not rule.pairs:
        return
    console.print(Text(f"\nBehind {rule.rule} ({len(rule.pairs)})", style="bold red"))
    for pair in rule.pairs[:max_examples]:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(Text("pair", style="dim"), Text(shortened(pair.question), style="bold"))
        table.add_row("better", Text(shortened(pair.chosen)))
        table.add_row("worse", Text(shortened(pair.rejected)))
        margins = f"champion {show(pair.champion_margin, 'nats')}, candidate {show(pair.candidate_margin, 'nats')}"
        table.add_row("margin", Text(f"{margins} nats"))
        console.print(Padding(table, (0, 0, 1, 2)))
    if len(rule.pairs) > max_examples:
        console.print(Text(f"  and {len(rule.pairs) - max_examples} more"))


def _open(console: Console, pairs: Sequence[OpenPair], max_examples: int) -> None:
    """Print the answers to open prompts that drifted most, beside the champion's."""
    if not pairs:
        return
    console.print(Text(f"\nOpen answers, those first that drifted most ({len(pairs)})", style="bold"))
    for pair in pairs[:max_examples]:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(Text("open", style="dim"), Text(shortened(pair.prompt), style="bold"))
        table.add_row("champion", Text(shortened(pair.champion_answer) or "(nothing)"))
        same = pair.candidate_answer == pair.champion_answer
        table.add_row("candidate", Text("the same" if same else shortened(pair.candidate_answer) or "(nothing)"))
        table.add_row("drift", Text(f"{show(pair.drift, 'nats')} nats a token"))
        console.print(Padding(table, (0, 0, 1, 2)))
    if len(pairs) > max_examples:
        console.print(Text(f"  and {len(pairs) - max_examples} more"))


def _pair(pair: AnswerPair) -> Padding:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(_KINDS[pair.kind], style="dim"), Text(shortened(pair.question), style="bold"))
    table.add_row("expected", Text(shortened(pair.expected)))
    if pair.key:
        table.add_row("key", Text(shortened("; ".join(pair.key))))
    if pair.alternatives:
        table.add_row("as right", Text(shortened("; ".join(pair.alternatives))))
    if pair.champion_answer is not None:
        champion = _marked(pair.champion_answer, correct=bool(pair.champion_correct), overruled=pair.champion_overruled)
        table.add_row("champion", champion)
    candidate = _marked(pair.candidate_answer, correct=pair.candidate_correct, overruled=pair.candidate_overruled)
    table.add_row("candidate", candidate)
    return Padding(table, (0, 0, 1, 2))


_KINDS = {"new": "new", "old": "old", "pin": "pinned", "general": "general"}


def _marked(answer: str, *, correct: bool, overruled: bool) -> Text:
    mark = ("✓ ", "green") if correct else ("✗ ", "red")
    by_judge = (f"  (the rules said {'wrong' if correct else 'right'})", "yellow") if overruled else ""
    return Text.assemble(mark, shortened(answer) or "(nothing)", by_judge)
