"""Names that may become paths, and references to versions: `name`, `name@alias`, `name@version`.

A name of a tenant other than the default one is written `tenant/name`, wherever a name may stand.

Whatever comes from a request, a recipe or a command line passes through here before it touches the disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nightschool.errors import NameRefused
from nightschool.store.home import Home
from nightschool.store.principal import DEFAULT_TENANT

CHAMPION, LATEST, PREVIOUS = "champion", "latest", "previous"
RESERVED_ALIASES = (CHAMPION, LATEST, PREVIOUS)

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""What `check_name` takes, but for two dots in a row and our own suffixes; for schemas of requests."""
_NAME = re.compile(NAME_PATTERN)
_QUANTIZED = re.compile(r"(.+)\[([a-z0-9-]*)\]")
_STAMP = re.compile(r"[0-9]{8}_[0-9]{6}")
_STAMP_FORMAT = "%Y%m%d_%H%M%S"
_MOST_KEY_BYTES = 900
# Suffixes of our own files: such a name would be swept away or taken for a lock.
_OUR_SUFFIXES = (".partial", ".lock")


def check_name(name: str, *, what: str = "name") -> str:
    """Return `name` if it may become a part of a path.

    Raises:
        NameRefused: Unless it is `[a-z0-9][a-z0-9._-]{0,63}`, without `..` and not ending like our own files.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or ".." in name:
        raise NameRefused(
            f"The {what} {name!r} is refused. Write 1 to 64 of the characters a-z, 0-9, '.', '_' and '-', "
            f"starting with a letter or a digit, without '..'."
        )
    if name.endswith(_OUR_SUFFIXES):
        raise NameRefused(
            f"The {what} {name!r} is refused, because '{name[name.rindex('.') :]}' marks files that are being written. "
            f"Choose a name with another ending."
        )
    return name


def is_name(text: str) -> bool:
    """Whether `check_name` takes it."""
    try:
        return check_name(text) == text
    except NameRefused:
        return False


def check_key(key: str) -> str:
    """Return `key` if it is a relative path with `/` that stays where it is put.

    Raises:
        NameRefused: If it is empty, absolute, too long, has `..`, an empty part, a backslash or a control character.
    """
    parts = key.split("/")
    wrong = (
        not key
        or any(part in ("", ".", "..") for part in parts)
        or any(ord(letter) < 32 or letter in "\\\x7f" for letter in key)
        or len(key.encode(errors="replace")) > _MOST_KEY_BYTES
    )
    if wrong:
        raise NameRefused(
            f"The object name {key[:200]!r} is refused, because as a path it could lead elsewhere. "
            f"Write parts of a path between single slashes, without '..'."
        )
    return key


def path_below(folder: Path, key: str) -> Path:
    """Where the object of that name is kept below `folder`: the one function that makes local paths of keys.

    Raises:
        NameRefused: As `check_key` does.
    """
    return folder.joinpath(*check_key(key).split("/"))


def is_stamp(text: str) -> bool:
    """Whether `text` is a moment in the form `YYYYmmdd_HHMMSS`, as version ids and the ends of run ids are."""
    if _STAMP.fullmatch(text) is None:
        return False
    try:
        return stamp_of(moment_of(text)) == text
    except ValueError:
        return False


def moment_of(stamp: str) -> datetime:
    """The moment in UTC that a stamp names. Raises ValueError if there is no such moment."""
    return datetime.strptime(stamp, _STAMP_FORMAT).replace(tzinfo=UTC)


def stamp_of(moment: datetime) -> str:
    """A moment as `YYYYmmdd_HHMMSS` in UTC; parts of a second are cut."""
    moment = moment.astimezone(UTC)
    # `%Y` does not pad years before 1000 to four digits on every platform.
    return f"{moment.year:04d}{moment:%m%d_%H%M%S}"


def next_free_stamp(moment: datetime, taken: Callable[[str], bool]) -> str:
    """The first stamp at or after `moment` that is not taken, moving on by a second at a time."""
    while taken(stamp := stamp_of(moment)):
        moment += timedelta(seconds=1)
    return stamp


def check_version_id(version: str) -> str:
    """Return `version` if it is a version id.

    Raises:
        NameRefused: Unless it is `YYYYmmdd_HHMMSS`.
    """
    if not isinstance(version, str) or not is_stamp(version):
        raise NameRefused(f"The version {version!r} is refused. A version id looks like 20261121_023000.")
    return version


def check_alias(alias: str) -> str:
    """Return `alias` if it is a name and cannot be taken for a version id.

    Raises:
        NameRefused: Otherwise.
    """
    check_name(alias, what="alias")
    if _STAMP.fullmatch(alias) is not None:
        raise NameRefused(f"The alias {alias!r} is refused, because it reads like a version id. Choose a word.")
    return alias


def split_name(name: str) -> tuple[str, str]:
    """The tenant and the name that `tenant/name` or `name` stand for.

    Raises:
        NameRefused: If either may not become a part of a path.
    """
    tenant, slash, bare = name.rpartition("/") if isinstance(name, str) else ("", "", name)
    return check_name(tenant, what="tenant") if slash else DEFAULT_TENANT, check_name(bare)


def full_name(tenant: str, name: str) -> str:
    """`tenant/name` as people read and write it: the default tenant is never shown."""
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"


def check_full_name(name: str) -> str:
    """Return `tenant/name` or `name` in the form of `full_name`. Raises NameRefused as `split_name` does."""
    return full_name(*split_name(name))


def home_of(home: Home, tenant: str) -> Home:
    """Where the runs, models and locks of a tenant lie. Those of the default tenant lie in the home itself."""
    return home if tenant == DEFAULT_TENANT else Home(home.tenants / check_name(tenant, what="tenant"))


def tenants_of(home: Home) -> list[str]:
    """The tenants that have anything on this disk, the default one first."""
    if not home.tenants.is_dir():
        return [DEFAULT_TENANT]
    found = (path.name for path in home.tenants.iterdir() if is_name(path.name) and path.name != DEFAULT_TENANT)
    return [DEFAULT_TENANT, *sorted(found)]


def lock_path(home: Home, kind: str, name: str) -> Path:
    """The lock file of one kind of work on a name: `models`, `cycle`, `schedule`. Raises as `split_name` does."""
    tenant, bare = split_name(name)
    return home_of(home, tenant).locks / f"{kind}-{bare}.lock"


def model_path(home: Home, name: str) -> Path:
    """The folder of all versions of a name. Raises NameRefused as `split_name` does."""
    tenant, bare = split_name(name)
    return home_of(home, tenant).models / bare


def memory_path(home: Home, name: str) -> Path:
    """The folder of an explicit memory. Raises NameRefused as `split_name` does."""
    tenant, bare = split_name(name)
    return home_of(home, tenant).memories / bare


def version_path(home: Home, name: str, version: str) -> Path:
    """The folder of one version: the one function that joins names and versions into a path.

    Raises:
        NameRefused: If the name or the version is anything but a name and a version id.
    """
    return model_path(home, name) / check_version_id(version)


@dataclass(frozen=True)
class Ref:
    """A version by its id, or by an alias: exactly one of `version` and `alias` is set.

    `name` is `tenant/name`, or the name alone for the default tenant.
    """

    name: str
    version: str | None = None
    alias: str | None = None

    @property
    def tenant(self) -> str:
        return split_name(self.name)[0]

    def __str__(self) -> str:
        return f"{self.name}@{self.version or self.alias}"


def split_quantization(ref: str) -> tuple[str, str | None]:
    """A reference to weights without its `[…]`, and what stands in it: how they are quantised, or None."""
    match = _QUANTIZED.fullmatch(ref)
    return (ref, None) if match is None else (match[1], match[2])


def parse_ref(text: str) -> Ref:
    """`name` (its champion), `name@alias` or `name@version`, of the default tenant, or with `tenant/` before it.

    Raises:
        NameRefused: If a part of it is not a name, alias or version id.
    """
    name, at, pointer = text.partition("@")
    name = check_full_name(name)
    if not at:
        return Ref(name, alias=CHAMPION)
    if _STAMP.fullmatch(pointer) is not None:
        return Ref(name, version=check_version_id(pointer))
    return Ref(name, alias=check_alias(pointer))
