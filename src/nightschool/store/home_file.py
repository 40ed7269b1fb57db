"""`home.json`: the form of a home, and its id, by which homes that share a PostgreSQL database are told apart."""

from __future__ import annotations

import secrets

from nightschool.errors import Damaged, MadeByNewer, NotFound
from nightschool.store.atomic import read_json, write_json
from nightschool.store.home import Home
from nightschool.store.locks import lock

FORMAT = 1
_FILE = "home.json"
_WAIT_SECONDS = 30.0


def check_format(home: Home) -> str | None:
    """The id of a home; None if it has none yet.

    Raises:
        MadeByNewer: If a newer nightschool has given the home another form.
        Damaged: If the file was altered.
    """
    path = home.path / _FILE
    try:
        content = read_json(path)
    except NotFound:
        return None
    form, home_id = content.get("format"), content.get("id")
    if isinstance(form, int) and form > FORMAT:
        raise MadeByNewer(
            f"{home.path} has the form {form} of a newer nightschool; this one knows {FORMAT}. Install the newer one again."
        )
    if form != FORMAT or not isinstance(home_id, str) or not home_id.isalnum():
        raise Damaged(f'{path} is damaged: it should hold "format": {FORMAT} and an "id". Restore it from a copy.')
    return home_id


def id_of(home: Home) -> str:
    """The id of a home, which is given out once and never changes. Raises as `check_format` does."""
    home_id = check_format(home)
    if home_id is None:
        with lock(home.locks / "home.lock", f"the form of {home.path}", wait_seconds=_WAIT_SECONDS):
            home_id = check_format(home)  # another process may have been quicker
            if home_id is None:
                home_id = secrets.token_hex(6)
                write_json(home.path / _FILE, {"format": FORMAT, "id": home_id})
    return home_id
