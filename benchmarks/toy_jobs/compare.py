"""Lets every candidate pass."""

import argparse
import json
import sys
from pathlib import Path

from nightschool.store.home import Home
from nightschool.store.registry import Registry


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--home", "--run", "--candidate", "--champion"):
        parser.add_argument(name)
    parser.add_argument("--ahead", action="store_true")
    given = parser.parse_args()
    candidate = given.candidate
    if given.ahead:  # begun while the run trains: the candidate is told later, or never
        told = sys.stdin.readline()
        if not told:
            return
        candidate = json.loads(told)["candidate"]
    name, _, version = candidate.partition("@")
    Registry(Home(Path(given.home))).save_report(name, version, {"decision": "promote", "rules": []})


if __name__ == "__main__":
    main()
