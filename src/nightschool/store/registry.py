"""The registry: versions and aliases of every name.

    models/<name>/<version>/        published, read-only, with nightschool.json and manifest.json
    tenants/<tenant>/models/…       the same of every tenant but the default one, whose names are written tenant/name
    models/<name>/aliases.json      champion, users' aliases, the history of moves, ids that were given out
    models/<name>/reports/          what the gate said of each candidate

A version exists when its manifest is there and it was not removed. `latest` is the newest version that exists, and
`previous` follows from the history, so neither can be left behind by a crash. Reading takes no lock: aliases.json is
replaced as a whole.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from nightschool.errors import Conflict, Damaged, DiskFull, NotFound
from nightschool.events import now
from nightschool.store.alias_state import AliasMove, AliasState
from nightschool.store.atomic import publish_directory, read_json, remove_folder, write_json
from nightschool.store.home import Home
from nightschool.store.manifest import write_manifest
from nightschool.store.names import (
    CHAMPION,
    LATEST,
    PREVIOUS,
    RESERVED_ALIASES,
    check_alias,
    check_full_name,
    check_version_id,
    full_name,
    home_of,
    is_name,
    model_path,
    parse_ref,
    split_quantization,
    tenants_of,
    version_path,
)
from nightschool.store.registry_entry import RegistryEntry
from nightschool.store.versions import FACTS, Probe, Version, VersionMetadata

__all__ = ["AliasMove", "Registry", "Version", "VersionMetadata"]


class Registry:
    """Everything that was published in a home. Methods may be called from any thread and process."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def names(self, tenant: str | None = None) -> list[str]:
        """The names that have at least one version, in order: of one tenant, or of all, the default one's first."""
        names: list[str] = []
        for one in tenants_of(self.home) if tenant is None else [tenant]:
            models = home_of(self.home, one).models
            found = sorted(path.name for path in models.iterdir()) if models.is_dir() else []
            names += [full_name(one, name) for name in found if is_name(name)]
        return [name for name in names if self._shelf(name).is_used]

    def versions(self, name: str) -> list[Version]:
        """The versions of a name, newest first; none if the name is unknown."""
        name = check_full_name(name)
        return [Version(name, id_, version_path(self.home, name, id_)) for id_ in self._shelf(name).ids()]

    def champion(self, name: str) -> Version | None:
        """The version that is served under a name; None if none was promoted yet."""
        try:
            return self.resolve(f"{name}@{CHAMPION}")
        except NotFound:
            return None

    def resolve(self, ref: str) -> Version:
        """The version that `name` (its champion), `name@alias` or `name@version` points to.

        Raises:
            NameRefused: If it is no such reference.
            NotFound: If there is no such version; the message lists what exists.
        """
        wanted = parse_ref(ref)
        shelf = self._shelf(wanted.name)
        # The book before the folders: read the other way round, a version that is published and promoted in between
        # would be a champion that does not exist.
        book, ids = shelf.book(), shelf.ids()
        aliases = _aliases(book, ids)
        version = wanted.version or aliases.get(wanted.alias or "")
        if version in ids:
            return Version(wanted.name, version, version_path(self.home, wanted.name, version))
        if not ids:
            names = self.names(wanted.tenant)
            exists = f"There are {', '.join(names)}." if names else "Nothing was published yet."
            raise NotFound(f"There is no version of {wanted.name!r} in {self.home.models}. {exists}")
        if version is not None and wanted.alias is not None:
            raise NotFound(
                f"{wanted} points to {version}, but that version was deleted by hand. "
                f"Promote one that exists: {', '.join(ids)}."
            )
        if wanted.alias == CHAMPION:
            raise NotFound(
                f"{wanted.name!r} has no champion yet: none of its versions was promoted. "
                f"Promote one of {', '.join(ids)}, or name it: {wanted.name}@{ids[0]}."
            )
        known = ", ".join([*sorted(aliases), *ids])
        raise NotFound(f"There is no {str(wanted)!r}. {wanted.name!r} has {known}.")

    def aliases(self, name: str) -> dict[str, str]:
        """Where each alias of a name points to, with `champion`, `latest` and `previous` where there are any."""
        shelf = self._shelf(name)
        return _aliases(shelf.book(), shelf.ids())

    def mark(self, name: str) -> tuple[int, ...] | None:
        """Changes whenever an alias of the name moves, and takes one `stat` to ask for; None if no alias ever moved."""
        return self._shelf(name).mark()

    def history(self, name: str) -> list[AliasMove]:
        """Every move of an alias of a name, oldest first."""
        return list(self._shelf(name).book().history)

    def pinned(self, name: str) -> Version | None:
        """The version that the champion is pinned to, if it is."""
        book = self._shelf(name).book()
        return self.resolve(f"{name}@{book.champion}") if book.pinned else None

    def new_version_id(self, name: str) -> str:
        """Give out an id `YYYYmmdd_HHMMSS` (UTC) that was never given out before, later than all others of the name.

        Two processes that ask in the same second get different ones: the second moves on by a second.
        """
        return self._shelf(name).issue()

    def publish(
        self,
        name: str,
        fill: Callable[[Path], None],
        facts: VersionMetadata,
        *,
        probes: Callable[[], list[Probe]] = list,
    ) -> Version:
        """Publish a version as a whole or not at all; `latest` then points to it.

        `fill` writes the Hugging Face folder into the (empty) folder that it is given. nightschool.json is added,
        all files are made read-only, and the manifest is written last. If `fill` raises, nothing is published.

        Args:
            name: The name to publish under.
            fill: Called once, without any lock of the name.
            facts: `name` and `created_at` are filled in. With an empty `version` a new id is given out; else it
                must be one that `new_version_id` gave out and that was not published yet.
            probes: Asked for further ones after `fill`.

        Raises:
            Conflict: If the version exists, was removed, or was never given out.
            DiskFull: If there is no room.
        """
        name = check_full_name(name)
        version = check_version_id(facts.version) if facts.version else self.new_version_id(name)
        book = self._shelf(name).book()
        if version in book.removed or version not in book.issued:
            why = "was removed" if version in book.removed else "was never given out"
            raise Conflict(f"{name}@{version} {why}, and ids are never used again. Publish without a version id.")
        path = version_path(self.home, name, version)
        self._shelf(name).sweep()
        with publish_directory(path) as folder:
            fill(folder)
            known = {"name": name, "version": version, "created_at": now(), "probes": [*facts.probes, *probes()]}
            facts = facts.model_copy(update=known)
            write_json(folder / FACTS, facts.model_dump(mode="json"))
            write_manifest(
                folder,
                ref=f"{name}@{version}",
                parent=facts.parent,
                recipe_digest=facts.recipe_digest,
                data_fingerprint=facts.data_fingerprint,
                heldout_loss=facts.heldout_loss,
            )
            _make_read_only(folder)
        return Version(name, version, path)

    def promote(self, name: str, version: str, *, by: str) -> Version:
        """Make a version (an id or an alias) the champion, after comparing every byte with its manifest.

        Raises:
            NotFound: If there is no such version.
            Damaged: If it was altered since it was published.
            Conflict: If the champion is pinned to another version.
        """
        return self._make_champion(name, version, "promote", by)

    def rollback(self, name: str, *, by: str) -> Version:
        """Make the previous champion the champion again; called again, it walks further back.

        Raises:
            NotFound: If there is no version of this name.
            Conflict: If there is no previous champion, or the champion is pinned.
            Damaged: If the previous champion was altered since it was published.
        """
        with self._shelf(name).editing() as edit:
            ids = self._shelf(name).ids()
            if not ids:
                self.resolve(f"{name}@{LATEST}")
            version = edit.book.previous(ids)
            if version is None:
                raise Conflict(
                    f"{name!r} has no previous champion to go back to (champion: {edit.book.champion or 'none'}). "
                    f"Promote one of {', '.join(ids)}."
                )
            self._refuse_pinned(name, edit.book, version)
            found = self._whole(name, version)
            edit.book = edit.book.moved(CHAMPION, version, "rollback", by)
        return found

    def pin(self, name: str, version: str, *, by: str = "user") -> Version:
        """Make a version the champion and keep it there: nothing moves the champion until `unpin`.

        Raises:
            NotFound: If there is no such version.
            Damaged: If it was altered since it was published.
            Conflict: If another version is pinned.
        """
        return self._make_champion(name, version, "pin", by)

    def unpin(self, name: str, *, by: str = "user") -> None:
        """Let the champion move again. Raises Conflict if it is not pinned."""
        with self._shelf(name).editing() as edit:
            if not edit.book.pinned:
                raise Conflict(
                    f"The champion of {name!r} is not pinned, so there is nothing to unpin. List the models."
                )
            edit.book = edit.book.moved(CHAMPION, edit.book.champion, "unpin", by).model_copy(update={"pinned": False})

    def set_alias(self, name: str, alias: str, version: str, *, by: str = "user") -> Version:
        """Point an alias of the user's own to a version (an id or an alias).

        Raises:
            NotFound: If there is no such version.
            Conflict: If the alias is one of ours, which move by `promote`, `rollback` and `publish`.
        """
        self._refuse_reserved(alias)
        found = self.resolve(f"{name}@{version}")
        with self._shelf(name).editing() as edit:
            self._refuse_gone(found)
            edit.book = edit.book.moved(alias, found.id, "set", by)
        return found

    def remove_alias(self, name: str, alias: str, *, by: str = "user") -> None:
        """Take an alias of the user's own away. Raises NotFound if there is none, Conflict if it is one of ours."""
        self._refuse_reserved(alias)
        with self._shelf(name).editing() as edit:
            if alias not in edit.book.aliases:
                raise NotFound(
                    f"{name!r} has no alias {alias!r}. It has {', '.join(sorted(edit.book.aliases)) or 'none'}."
                )
            edit.book = edit.book.moved(alias, None, "unset", by)

    def remove(self, name: str, version: str) -> None:
        """Remove a version; its id is never used again, and the gate's report stays.

        Raises:
            NotFound: If there is no such version.
            Conflict: If it is the champion, the previous one, pinned, named by an alias, or the base of an adapter.
        """
        found = self.resolve(f"{name}@{version}")
        with self._shelf(name).editing() as edit:
            self._refuse_gone(found)
            self._refuse_used(found, edit.book)
            edit.book = edit.book.model_copy(update={"removed": (*edit.book.removed, found.id)})
            # The tombstone first: after a crash in between, the folder is not a version any more, and is swept. On a
            # full disk it is written afterwards, because removing is how room is made.
            with suppress(DiskFull):
                edit.save()
            remove_folder(found.path)

    def report_path(self, name: str, version: str) -> Path:
        """Where the gate's report of a version lies."""
        return model_path(self.home, name) / "reports" / f"{check_version_id(version)}.json"

    def save_report(self, name: str, version: str, report: dict[str, Any]) -> Path:
        """Keep the gate's report of a version, in place of an earlier one. Returns its path."""
        path = self.report_path(name, version)
        write_json(path, report)
        return path

    def load_report(self, name: str, version: str) -> dict[str, Any]:
        """The gate's report. Raises NotFound if the version was never examined, Damaged if the file was altered."""
        path = self.report_path(name, version)
        if not path.is_file():
            raise NotFound(f"There is no report of {name}@{version}: the gate has not examined it. Evaluate it first.")
        return read_json(path)

    def _shelf(self, name: str) -> RegistryEntry:
        return RegistryEntry(self.home, name)

    def _make_champion(self, name: str, version: str, action: Literal["promote", "pin"], by: str) -> Version:
        found = self._whole(name, version)
        with self._shelf(name).editing() as edit:
            self._refuse_pinned(name, edit.book, found.id)
            self._refuse_gone(found)
            pinned = edit.book.pinned or action == "pin"
            if edit.book.champion != found.id or edit.book.pinned != pinned:
                edit.book = edit.book.moved(CHAMPION, found.id, action, by).model_copy(update={"pinned": pinned})
        return found

    def _whole(self, name: str, version: str) -> Version:
        found = self.resolve(f"{name}@{version}")
        found.verify(digests=True)
        return found

    def _refuse_gone(self, found: Version) -> None:
        """A version may have been removed between finding it and taking the lock."""
        if found.id not in self._shelf(found.name).ids():
            raise NotFound(f"{found.ref} was removed by another process. Choose another version.")

    def _refuse_used(self, found: Version, book: AliasState) -> None:
        uses = [alias for alias, version in self.aliases(found.name).items() if version == found.id and alias != LATEST]
        uses += [
            f"the base of {other.ref}"
            for name in self.names()
            for other in self.versions(name)
            if _stands_on(other, found.ref)
        ]
        if uses:
            pinned = " and pinned" if book.pinned and book.champion == found.id else ""
            raise Conflict(
                f"{found.ref} is {', '.join(uses)}{pinned}, so it stays. Move or remove what points to it first."
            )

    @staticmethod
    def _refuse_pinned(name: str, book: AliasState, version: str) -> None:
        if book.pinned and book.champion != version:
            raise Conflict(
                f"The champion of {name!r} is pinned to {book.champion}, so it does not move to {version}. "
                f"Unpin {name!r} first."
            )

    @staticmethod
    def _refuse_reserved(alias: str) -> None:
        if check_alias(alias) in RESERVED_ALIASES:
            raise Conflict(
                f"The alias {alias!r} cannot be set by hand: it moves by promoting, rolling back and publishing. "
                f"Choose another word."
            )


def _aliases(book: AliasState, ids: list[str]) -> dict[str, str]:
    derived = {LATEST: ids[0] if ids else None, PREVIOUS: book.previous(ids)}
    return {**book.aliases, **{alias: version for alias, version in derived.items() if version}}


def _stands_on(version: Version, ref: str) -> bool:
    try:
        return version.facts.kind != "model" and split_quantization(version.facts.base)[0] == ref
    except (Damaged, NotFound):
        return False


def _make_read_only(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
