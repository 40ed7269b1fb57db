"""Lets every candidate of a group pass, one after the other."""

import argparse
import json
import sys
from pathlib import Path

from nightschool.store.atomic import write_json
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home")
    home = Home(Path(parser.parse_args().home))
    for line in sys.stdin:
        told = json.loads(line)
        if "candidate" in told:  # else it is only expected
            name, _, version = told["candidate"].partition("@")
            Registry(home).save_report(name, version, {"decision": "promote", "rules": []})
            write_json(RunStore(home).get(told["run"]).gate_path, {"exit_code": 0, "error": None})


if __name__ == "__main__":
    main()
