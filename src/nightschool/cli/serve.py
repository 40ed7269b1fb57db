"""`nightschool serve`."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from nightschool.cli.models import told
from nightschool.cli.output import note, who
from nightschool.cli.recipes import read_recipe
from nightschool.config.env_file import read_env_file
from nightschool.config.recipe import Serve
from nightschool.config.training_service import TrainingServiceSettings, variables_without_a_use
from nightschool.errors import UsageError
from nightschool.store.home import Home
from nightschool.store.names import check_full_name
from nightschool.store.registry import Registry
from nightschool.units import parse_seconds

# serve.port=1, but no path with an equals sign in it.
_SETTING = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*=")


def serve(
    *sources: str,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    env_file: Path | None = None,
    model_check_interval: str | None = None,
    record_conversations: bool | None = None,
    api_keys_file: Path | None = None,
    num_rows: int = 16,
    max_adapters: int = 8,
    merge_adapters: bool = False,
    admission: Literal["fair", "first-come"] = "fair",
    context_tokens: int | None = None,
    queue_limit: int = 256,
    requests_per_minute: float | None = None,
    request_burst: int = 10,
    allowed_hosts: list[str] | None = None,
    max_connections: int = 1024,
    max_connections_per_address: int = 512,
    idle_timeout_seconds: float = 30.0,
    write_timeout_seconds: float = 30.0,
    max_body_bytes: int = 2_000_000,
    max_training_body_bytes: int = 64_000_000,
    max_file_bytes: int = 512_000_000,
    file_timeout_seconds: float = 600.0,
    max_new_tokens_limit: int = 8192,
    max_loaded_names: int = 256,
    max_loaded_bytes: int | None = None,
    max_host_bytes: int = 512_000_000,
    experts_resident: int | None = None,
    memory: str | None = None,
    memory_read: Literal["layers", "prompt"] | None = None,
    shared_memories: list[str] | None = None,
    drain_seconds: float = 30.0,
    with_worker: bool = False,
    log_level: str | None = None,
) -> None:
    """Answer over HTTP with the champions of one name or several, and swap when another version is promoted.

    The `model` of a request says which name answers; without one it is the first. Names on one base share one engine, and
    each adapter is served unmerged beside the others on it. Starts with or without a model. Runs until SIGTERM or Ctrl-C;
    running answers may finish.

    Args:
        sources: The names whose champions are served; without any, whatever the home has, loaded when somebody asks for
            it. A recipe file stands for its `name`, and its `serve` settings hold, changed by settings such as
            serve.record_conversations=true. A folder, a GGUF file or a hub id is first added as by nightschool models add.
        name: The name to add a folder, a file or a hub model under; without it, one is made of its last part.
        host: Address to listen on. Other than 127.0.0.1 needs an API key, in NIGHTSCHOOL_API_KEY or a file.
        port: Port to listen on, 0 for a free one; PORT, or 8001, without it.
        env_file: A file of variables, as .env.example has them; what the environment says goes before it.
        model_check_interval: How often to look for a newly promoted version: 3600, 10m, 1h; 3600 s without it.
        record_conversations: Keep conversations and feedback, so that a later night can study them.
        api_keys_file: A file with one API key a line.
        num_rows: Requests that are answered at the same time by one base.
        max_adapters: Different adapters among them.
        merge_adapters: Merge every adapter into a copy of its base: as fast as the base alone, and one more base in
            memory for each.
        admission: Who is next when more wait than are answered: fair shares by tenant, or first-come.
        context_tokens: Longest prompt and answer together, in tokens; the model's own limit without it.
        queue_limit: Requests that may wait; more are refused with 429.
        requests_per_minute: Bound per key, or per address without keys.
        request_burst: Requests that may come at once before that bound applies.
        allowed_hosts: A further name that may stand in the Host header, such as that of a reverse proxy; with keys,
            '*' takes any. May be given several times.
        max_connections: Connections at once; over it, the one that waits longest for a request is closed.
        max_connections_per_address: Of them, those of one address; raise it behind a proxy, where all have one.
        idle_timeout_seconds: Longest time a connection may stay without a whole head of a request.
        write_timeout_seconds: Longest time a client may take to read 16 kB of its answer; then it is cut off.
        max_body_bytes: Largest request body; a larger one is refused with 413.
        max_training_body_bytes: The same of requests that bring conversations to be trained.
        max_file_bytes: Largest file that may be uploaded to be trained on.
        file_timeout_seconds: Longest time a client may take to send a file.
        max_new_tokens_limit: Most tokens that one answer may be asked to have.
        max_loaded_names: Names loaded on demand that stay loaded; over it, the idle one asked for longest ago leaves.
        max_loaded_bytes: What their weights may take, bases under adapters apart; over it, the same. Unbounded without it.
        max_host_bytes: What adapters that left may take in host memory, until they are asked for again.
        experts_resident: So many experts of a mixture are in memory at a time, those that are used most; the others are read
            from the version's files when they are needed. All of them without it.
        memory: A memory that requests read which name none, each tenant its own; see nightschool memory.
        memory_read: How: layers lets the model's own layers read the entries, prompt puts them before the question; without
            it, layers where the model was trained by method: memory.
        shared_memories: Memories of this home that every tenant reads, beneath its own of that name, and none writes.
        drain_seconds: How long running answers may take to finish after SIGTERM.
        with_worker: Start nightschool worker beside the server, which does the queued jobs and ends with it.
        log_level: debug, info, warning or error; LOG_LEVEL, or info, without it.
    """
    from pydantic import ValidationError

    from nightschool.engine.admission import ADMISSION_POLICIES
    from nightschool.engine.local_model import serving_dtype
    from nightschool.jobs.worker_beside import worker_beside
    from nightschool.models.dtype import resolve_device
    from nightschool.server.run import serve as serve_names
    from nightschool.server.settings import ServerSettings, read_api_keys

    if env_file is not None:
        os.environ.update({key: value for key, value in read_env_file(env_file).items() if key not in os.environ})
    for sentence in variables_without_a_use():
        note(sentence)
    served, wishes = _what_is_served(sources, name)
    if record_conversations is None:
        record_conversations = wishes.record_conversations
    try:
        settings = ServerSettings(
            host=host,
            port=os.environ.get("PORT") or 8001 if port is None else port,
            api_keys=read_api_keys(file=api_keys_file),
            model_check_interval=(
                wishes.model_check_interval if model_check_interval is None else parse_seconds(model_check_interval)
            ),
            record_conversations=record_conversations,
            requests_per_minute=requests_per_minute,
            request_burst=request_burst,
            allowed_hosts=tuple(one.lower() for one in allowed_hosts or ()),
            max_connections=max_connections,
            max_connections_per_address=max_connections_per_address,
            idle_timeout_seconds=idle_timeout_seconds,
            write_timeout_seconds=write_timeout_seconds,
            max_body_bytes=max_body_bytes,
            max_training_body_bytes=max_training_body_bytes,
            max_file_bytes=max_file_bytes,
            file_timeout_seconds=file_timeout_seconds,
            max_new_tokens_limit=max_new_tokens_limit,
            max_loaded_names=max_loaded_names,
            max_loaded_bytes=max_loaded_bytes,
            max_host_bytes=max_host_bytes,
            experts_resident=experts_resident,
            memory=memory,
            memory_read=memory_read,
            shared_memories=tuple(shared_memories or ()),
            drain_seconds=drain_seconds,
            training_service=TrainingServiceSettings.of_environment(),
            log_level=(log_level or os.environ.get("LOG_LEVEL") or "info").lower(),
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
        "max_adapters": max_adapters,
        "merge_adapters": merge_adapters,
        "admission": ADMISSION_POLICIES[admission],
        "context_tokens": context_tokens,
        "queue_limit": queue_limit,
    }
    home = Home.find()
    with worker_beside(home.ensure()) if with_worker else nullcontext():
        serve_names(home, served, settings, engine=engine)


def _what_is_served(arguments: tuple[str, ...], name: str | None) -> tuple[list[str], Serve]:
    """The served names and what their recipe wishes; names alone have the defaults. Models from elsewhere are added first.

    Raises:
        UsageError: If settings stand without a recipe, or `--name` without one model to be added.
    """
    settings = tuple(argument for argument in arguments if _SETTING.match(argument))
    sources = [argument for argument in arguments if argument not in settings]
    recipes = [source for source in sources if source.endswith((".yaml", ".yml"))]
    elsewhere = [source for source in sources if _is_elsewhere(source)]
    if settings and not recipes:
        raise UsageError(
            f"{settings[0]!r} is a setting of a recipe, but no recipe was given. Write nightschool serve RECIPE.yaml "
            f"{settings[0]}, or use the options of nightschool serve --help."
        )
    if len(recipes) > 1:
        raise UsageError(f"{' and '.join(recipes)} may want different things of one server. Name one recipe.")
    if name is not None and len(elsewhere) != 1:
        raise UsageError(
            f"--name is for one folder, GGUF file or hub id, and there are {len(elsewhere)}. Leave it out, and add models "
            "with nightschool models add."
        )
    recipe = read_recipe(Path(recipes[0]), settings) if recipes else None
    served = []
    for source in sources:
        if recipe is not None and source in recipes:
            served.append(recipe.name)
        else:
            served.append(_added(source, name) if source in elsewhere else check_full_name(source))
    return served, recipe.serve if recipe is not None else Serve()


def _is_elsewhere(source: str) -> bool:
    """Whether a model would have to be added first: a path, a hub id or a file, but no recipe and no `tenant/name`."""
    if source.endswith((".yaml", ".yml")):
        return False
    return source.lower().endswith(".gguf") or ("/" in source and source not in Registry(Home.find()).names())


def _added(source: str, name: str | None) -> str:
    """Add what lies at `source` and return its name. What was added before is served as it went on since."""
    from nightschool.training.add_model import add_model, name_for

    added = add_model(Home.find(), name or name_for(source), source, by=who())
    note(told(added))
    return added.version.name
