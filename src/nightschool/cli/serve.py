"""`nightschool serve`."""

from __future__ import annotations

from pathlib import Path

from nightschool.cli.models import told, who
from nightschool.cli.output import note
from nightschool.cli.recipes import read_recipe
from nightschool.config.recipe import Serve
from nightschool.errors import UsageError
from nightschool.store.home import Home
from nightschool.store.names import check_full_name
from nightschool.store.registry import Registry
from nightschool.units import parse_seconds


def serve(
    source: str = "default",
    /,
    *overrides: str,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8001,
    model_check_interval: str | None = None,
    record_conversations: bool | None = None,
    api_keys_file: Path | None = None,
    num_rows: int = 16,
    context_tokens: int | None = None,
    queue_limit: int = 256,
    requests_per_minute: float | None = None,
    request_burst: int = 10,
    allowed_hosts: list[str] | None = None,
    max_body_bytes: int = 2_000_000,
    max_new_tokens_limit: int = 8192,
    drain_seconds: float = 30.0,
    log_level: str = "info",
) -> None:
    """Answer over HTTP with the champion of a name, and swap when another version is promoted.

    Starts with or without a model. Runs until SIGTERM or Ctrl-C; running answers may finish.

    Args:
        source: The name whose champion is served; or a recipe file, whose `name` and `serve` settings then hold; or a
            folder, a GGUF file or a hub id, which is first added as by nightschool models add.
        overrides: Settings of the recipe, as serve.record_conversations=true.
        name: The name to add a folder, a file or a hub model under; without it, one is made of the last part of SOURCE.
        host: Address to listen on. Other than 127.0.0.1 needs an API key, in NIGHTSCHOOL_API_KEY or a file.
        port: Port to listen on; 0 takes a free one.
        model_check_interval: How often to look for a newly promoted version: 3600, 10m, 1h; 3600 s without it.
        record_conversations: Keep conversations and feedback, so that a later night can study them.
        api_keys_file: A file with one API key a line.
        num_rows: Requests that are answered at the same time.
        context_tokens: Longest prompt and answer together, in tokens; the model's own limit without it.
        queue_limit: Requests that may wait; more are refused with 429.
        requests_per_minute: Bound per key, or per address without keys.
        request_burst: Requests that may come at once before that bound applies.
        allowed_hosts: A further name that may stand in the Host header, such as that of a reverse proxy; with keys,
            '*' takes any. May be given several times.
        max_body_bytes: Largest request body; a larger one is refused with 413.
        max_new_tokens_limit: Most tokens that one answer may be asked to have.
        drain_seconds: How long running answers may take to finish after SIGTERM.
        log_level: debug, info, warning or error.
    """
    from pydantic import ValidationError

    from nightschool.engine.local_model import serving_dtype
    from nightschool.models.dtype import resolve_device
    from nightschool.server.run import serve as serve_name
    from nightschool.server.settings import ServerSettings, read_api_keys

    served, wishes = _what_is_served(source, overrides, name)
    if record_conversations is None:
        record_conversations = wishes.record_conversations
    try:
        settings = ServerSettings(
            host=host,
            port=port,
            api_keys=read_api_keys(file=api_keys_file),
            model_check_interval=(
                wishes.model_check_interval if model_check_interval is None else parse_seconds(model_check_interval)
            ),
            record_conversations=record_conversations,
            requests_per_minute=requests_per_minute,
            request_burst=request_burst,
            allowed_hosts=tuple(one.lower() for one in allowed_hosts or ()),
            max_body_bytes=max_body_bytes,
            max_new_tokens_limit=max_new_tokens_limit,
            drain_seconds=drain_seconds,
            log_level=log_level,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("_", "-")
        raise UsageError(f"{option} {problem['input']}: {problem['msg']}. See nightschool serve --help.") from None
    except ValueError as error:
        raise UsageError(f"--model-check-interval: {error}.") from None
    if record_conversations:
        note("Conversations are kept in the home (record_conversations), so that a later night can study them.")
    device = resolve_device()
    engine = {
        "device": device,
        "dtype": serving_dtype(device),
        "num_rows": num_rows,
        "context_tokens": context_tokens,
        "queue_limit": queue_limit,
    }
    serve_name(Home.find(), served, settings, engine=engine)


def _what_is_served(source: str, overrides: tuple[str, ...], name: str | None) -> tuple[str, Serve]:
    """The served name and what its recipe wishes; a name alone has the defaults. A model from elsewhere is added first.

    Raises:
        UsageError: If settings follow a name, which has none, or `--name` follows what has a name.
    """
    is_recipe = source.endswith((".yaml", ".yml"))
    if overrides and not is_recipe:
        raise UsageError(
            f"{overrides[0]!r} is a setting of a recipe, but {source!r} is none. Write nightschool serve RECIPE.yaml "
            f"{overrides[0]}, or use the options of nightschool serve --help."
        )
    # A name has a slash only behind its tenant.
    is_path = "/" in source and source not in Registry(Home.find()).names()
    if not is_recipe and (is_path or source.lower().endswith(".gguf")):
        return _added(source, name), Serve()
    if name is not None:
        raise UsageError(f"--name is for a folder, a GGUF file or a hub id, and {source!r} has a name. Leave it out.")
    if is_recipe:
        recipe = read_recipe(Path(source), overrides)
        return recipe.name, recipe.serve
    return check_full_name(source), Serve()


def _added(source: str, name: str | None) -> str:
    """Add what lies at `source` and return its name. What was added before is served as it went on since."""
    from nightschool.training.add_model import add_model, name_for

    added = add_model(Home.find(), name or name_for(source), source, by=who())
    note(told(added))
    return added.version.name
