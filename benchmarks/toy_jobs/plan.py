"""Says that every job is small."""

import argparse
from pathlib import Path

from nightschool.store.atomic import read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path)
    for name in ("--root", "--recipe", "--output"):
        parser.add_argument(name, type=Path, action="append")
    given = parser.parse_args()
    for recipe, output in zip(given.recipe, given.output, strict=True):
        plain = read_json(recipe)
        # A shape is one of a new base; where there is one already, the rank says how many megabytes the base has.
        base_bytes = 0 if plain["shape"].get("hidden_size") else plain["lora"]["r"] * 1_000_000
        peak_bytes = plain["shape"].get("hidden_size") or 2 * base_bytes
        plan = {"device": "cpu", "expected_peak_bytes": peak_bytes, "base_bytes": base_bytes}
        write_json(output, plan | {"device_total_bytes": None})


if __name__ == "__main__":
    main()
