"""Files of environment variables, such as `.env`: one `NAME=value` a line, as `docker run --env-file` takes them."""

from __future__ import annotations

import re
from pathlib import Path

from nightschool.errors import NotFound, UsageError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file. Empty lines and lines that begin with `#` say nothing.

    A value may stand in quotes; without them, a `#` behind a space begins a comment. Nothing is expanded.

    Raises:
        NotFound: If there is no such file.
        UsageError: If a line is no `NAME=value`; the message names it.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound(f"There is no file {path}. Copy .env.example there, and set in it what you need.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8. Save it as UTF-8.") from None
    variables = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip().removeprefix("export ").strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.partition("=")
        if not equals or _NAME.fullmatch(name.strip()) is None:
            raise UsageError(f"{path}:{number}: This is no NAME=value. Write one a line, comments behind a #.")
        variables[name.strip()] = _plain(value.strip())
    return variables


def _plain(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return re.split(r"(?:^|\s)#", value, maxsplit=1)[0].rstrip()
