"""Does the examiner judge answers of a real model as a reader does?

`data/examiner.jsonl`: different answers of SmolLM2-135M-Instruct, each labelled by hand by one reader, who knew only question and
expected answer. The model was asked alone, with the fact or four entries in its prompt, and with adapters in the middle of a
night, greedily and at temperature 0.8, about a made-up world and about the real one. By a digest of its question a row belongs
to half A, which was looked at while the rules were written, or to half B. Half B, and then `fresh`, which has other facts, were labelled
before the rules met them, and looked at once their figures had been taken; rules were mended by both. Those first figures are
in RESULTS.md and are the clean ones. `third` and `last` have other facts again; no rule was made
of them. The goals are held against `last`.

False accepts are shares of the wrong answers, false rejects of the right ones. Peers, on the same rows: the rules that stood
before (their verdicts are kept in the file), the same words, the expected answer's words in a row, and a token F1 of 0.5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Benchmark

from nightschool.data.match import is_correct, token_f1, words

ROWS = Path(__file__).resolve().parent / "data" / "examiner.jsonl"
Row = dict[str, Any]


def by_examiner(row: Row) -> bool:
    return is_correct(
        row["answer"],
        row["reference"],
        question=row["question"],
        key=row.get("key", ()),
        alternatives=row.get("alternatives", ()),
    )


def contains(row: Row) -> bool:
    said, wanted = words(row["answer"]), words(row["reference"])
    return any(said[start : start + len(wanted)] == wanted for start in range(len(said) - len(wanted) + 1))


JUDGES: dict[str, Callable[[Row], bool]] = {
    "examiner": by_examiner,
    "rules_before": lambda row: row["rules_before"] == "right",
    "exact_match": lambda row: words(row["answer"]) == words(row["reference"]),
    "containment": contains,
    "token_f1": lambda row: token_f1(words(row["answer"]), words(row["reference"])) >= 0.5,
}


def agreement(rows: list[Row], judge: Callable[[Row], bool]) -> tuple[float, float, float]:
    """Agreement, false accepts among the wrong, false rejects among the right."""
    verdicts = [(row["label"] == "right", judge(row)) for row in rows]
    right, wrong = ([said for label, said in verdicts if label is wanted] for wanted in (True, False))
    agreed = sum(label == said for label, said in verdicts) / len(verdicts)
    return agreed, sum(wrong) / len(wrong), right.count(False) / len(right)


def main() -> None:
    bench = Benchmark(
        "examiner",
        "Does the examiner judge answers of a real model as a reader does?",
        {"agreement": {"min": 0.97}, "false_accepts": {"max": 0.01}, "false_rejects": {"max": 0.05}},
    )
    rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
    halves = {half: [row for row in rows if row["half"] == half] for half in ("A", "B", "fresh", "third", "last")}
    figures: dict[str, float] = {}
    for half, of_half in halves.items():
        right = sum(row["label"] == "right" for row in of_half)
        told = []
        for name, judge in JUDGES.items():
            agreed, accepted, rejected = agreement(of_half, judge)
            told.append((name, f"agrees {agreed:.3f}  false accepts {accepted:.3f}  false rejects {rejected:.3f}"))
            prefix = "" if name == "examiner" else f"{name}_"
            if half == "last":
                figures |= {
                    f"{prefix}agreement": agreed,
                    f"{prefix}false_accepts": accepted,
                    f"{prefix}false_rejects": rejected,
                }
            elif name == "examiner":
                figures |= {
                    f"{half}_agreement": agreed,
                    f"{half}_false_accepts": accepted,
                    f"{half}_false_rejects": rejected,
                }
        print(f"{half}: {len(of_half)} answers, {right} of them right", flush=True)
        bench.table(told)
    bench.finish(figures)


if __name__ == "__main__":
    main()
