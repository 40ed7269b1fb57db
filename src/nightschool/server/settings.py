"""What an operator decides about the server: address, keys, bounds, recording."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from nightschool.config.training_service import TrainingServiceSettings
from nightschool.errors import NotFound, UsageError
from nightschool.store.names import check_name
from nightschool.store.principal import DEFAULT_TENANT, SCOPES, Scope, parse_scopes

KEY_VARIABLE = "NIGHTSCHOOL_API_KEY"


class ApiKey(BaseModel):
    """A key, and who asks with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: SecretStr
    tenant: str = DEFAULT_TENANT
    scopes: frozenset[Scope] = SCOPES


class ServerSettings(BaseModel):
    """Frozen after parsing; an unknown name is an error. Times are seconds, sizes are bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on. Other than loopback needs an API key.")
    port: int = Field(8001, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Further names that may stand in the Host header, such as that of a reverse proxy; with keys, "
        "* takes any. Loopback names always may, and with keys this machine's name and bare addresses.",
    )
    api_keys: tuple[ApiKey, ...] = Field(
        (),
        description=f"Accepted keys, from {KEY_VARIABLE} (comma separated) or a file, besides those that nightschool "
        "keys made; without any, all on this machine may ask.",
    )
    model_check_interval: float = Field(
        3600.0, gt=0, description="Seconds between two looks for a newly promoted version."
    )
    record_conversations: bool = Field(
        default=False, description="Keep conversations and feedback in the home, so that a later night can study them."
    )
    max_body_bytes: int = Field(2_000_000, ge=1024, description="Largest accepted request body; more is refused (413).")
    max_training_body_bytes: int = Field(
        64_000_000, ge=1024, description="The same of requests that bring conversations to be trained."
    )
    body_timeout_seconds: float = Field(30.0, gt=0, description="Longest time a client may take to send its body.")
    max_file_bytes: int = Field(
        512_000_000, ge=1024, description="Largest file that may be uploaded to be trained on; more is refused (413)."
    )
    file_timeout_seconds: float = Field(600.0, gt=0, description="Longest time a client may take to send a file.")
    max_connections: int = Field(
        1024, ge=1, description="Connections at once; over it, the one that waits longest for a request is closed."
    )
    max_connections_per_address: int = Field(
        512, ge=1, description="Of them, those of one address; behind a proxy all have one. Over it, likewise, or 429."
    )
    idle_timeout_seconds: float = Field(
        30.0, gt=0, description="Longest time a connection may stay without a whole head of a request."
    )
    write_timeout_seconds: float = Field(
        30.0, gt=0, description="Longest time a client may take to read 16 kB of its answer; then it is cut off."
    )
    max_new_tokens_limit: int = Field(8192, ge=1, le=65536, description="Most tokens one answer may be asked to have.")
    requests_per_minute: float | None = Field(
        None, gt=0, description="Requests per minute of one key, or of one address without keys; null is unbounded."
    )
    request_burst: int = Field(10, ge=1, description="Requests that may come at once before the rate applies.")
    max_loaded_names: int = Field(
        256,
        ge=1,
        description="Names loaded on demand that stay loaded; over it, the idle one asked for longest ago leaves.",
    )
    max_loaded_bytes: int | None = Field(
        None,
        ge=1,
        description="What their weights may take where they are computed with, bases under adapters apart; over it, the same. "
        "Null is unbounded.",
    )
    max_host_bytes: int = Field(
        512_000_000,
        ge=0,
        description="What adapters that left in this way may take in host memory, until they are asked for again.",
    )
    experts_resident: int | None = Field(
        None,
        ge=2,
        description="Experts of a mixture that are in memory at a time, those that are used most; null is all of them.",
    )
    memory: str | None = Field(
        None, description="The memory of its tenant that a request reads which names none; null reads none."
    )
    memory_read: Literal["layers", "prompt"] | None = Field(
        None, description="How: by layers of the model, or put into the prompt; null is layers where the model can."
    )
    shared_memories: tuple[str, ...] = Field(
        (),
        description="Memories of the home itself that every tenant reads, beneath its own of that name; none writes them.",
    )
    drain_seconds: float = Field(30.0, ge=0, description="How long running answers may take to finish after SIGTERM.")
    training_service: TrainingServiceSettings = Field(
        default_factory=TrainingServiceSettings, description="What the training service allows, and its defaults."
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="Least severe log lines kept.")

    @field_validator("api_keys", mode="before")
    @classmethod
    def _plain_keys(cls, keys: Any) -> Any:
        return [{"key": key} if isinstance(key, str | SecretStr) else key for key in keys]

    @field_validator("memory")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return None if name is None else check_name(name, what="memory")

    @field_validator("shared_memories")
    @classmethod
    def _names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_name(name, what="memory") for name in names)

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def check(self, *, stored_keys: bool = False) -> ServerSettings:
        """Refuse what would open the server to everybody.

        Args:
            stored_keys: Whether the database of the home has keys.

        Raises:
            UsageError: If the host is not loopback, or any Host header will do, and there is no API key.
        """
        has_keys = bool(self.api_keys) or stored_keys
        if "*" in self.allowed_hosts and not has_keys:
            raise UsageError(
                f"--allowed-hosts '*' lets every page that a browser opens ask this server, and there is no API key. "
                f"Make one with nightschool keys create, set {KEY_VARIABLE}, or name the hosts."
            )
        if not self.on_loopback and not has_keys:
            raise UsageError(
                f"The host {self.host} can be reached from other machines, and there is no API key. "
                f"Make one with nightschool keys create, set {KEY_VARIABLE}, or serve on --host 127.0.0.1."
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    if host == "localhost":
        return True
    return is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback


def is_address(host: str) -> bool:
    """Whether a host is an IP address, which no name server had to be asked for."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def read_api_keys(env: Mapping[str, str] | None = None, file: Path | None = None) -> tuple[ApiKey, ...]:
    """The keys of the environment (comma separated) and of a file (one a line, `#` starts a comment).

    In the file, a key may be followed by `tenant=NAME` and `scopes=infer,feedback`.

    Raises:
        NotFound: If the file is not there.
        UsageError: If a key has fewer than 8 characters or is not ASCII, or what follows it makes no sense.
    """
    lines = (os.environ if env is None else env).get(KEY_VARIABLE, "").split(",")
    # In the environment a key stands alone; a space there is a slip.
    found = [_api_key([line.strip()]) for line in lines if line.strip()]
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except FileNotFoundError:
            raise NotFound(f"The file of API keys {file} is not there. Write one key a line into it.") from None
        found += [_api_key(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return tuple({key.key.get_secret_value(): key for key in found}.values())


def _api_key(words: list[str]) -> ApiKey:
    key, *more = words
    shown = f"The API key that begins with {key[:2]!r}"
    if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"{shown} has {len(key)} characters or holds a character that a header cannot carry. "
            f"Use at least 8 printable ASCII characters without spaces."
        )
    fields = dict(word.partition("=")[::2] for word in more)
    tenant = check_name(fields.pop("tenant", DEFAULT_TENANT), what="tenant")
    names = fields.pop("scopes", None)
    if fields:
        raise UsageError(f"{shown} is followed by {', '.join(fields)!r}. {_HOW_TO_WRITE_KEYS}")
    try:
        scopes = SCOPES if names is None else parse_scopes(names.split(","))
    except ValueError as error:
        raise UsageError(f"{shown} has wrong scopes: {error}. {_HOW_TO_WRITE_KEYS}") from None
    return ApiKey(key=SecretStr(key), tenant=tenant, scopes=scopes)


_HOW_TO_WRITE_KEYS = (
    f"Write KEY, then tenant=NAME, then scopes= with some of {','.join(sorted(SCOPES))}, without spaces inside."
)
