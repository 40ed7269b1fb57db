"""The tables of the state database. A change here needs a migration; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from nightschool.store.names import split_name
from nightschool.store.principal import DEFAULT_TENANT


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in, aware datetimes in UTC out, also where the database keeps no time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        assert value is None or value.tzinfo is not None, "moments carry their time zone"
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Texts that models and people wrote are kept as JSON strings: any text survives, also a NUL character (refused by
# PostgreSQL in TEXT) and half a surrogate pair (refused by SQLite).
AnyJson: TypeEngine[Any] = sa.JSON(none_as_null=True)

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

conversations = sa.Table(
    "conversations",
    metadata,
    sa.Column("request_id", sa.String(200), primary_key=True),
    sa.Column("recorded_at", UtcDateTime, nullable=False, index=True),
    sa.Column("model", sa.String(200), nullable=False, index=True),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("tenant", sa.String(64), nullable=False, server_default=DEFAULT_TENANT, index=True),
    # The SHA-256 of the key that asked, or None where nobody needs one.
    sa.Column("owner", sa.String(200)),
    sa.Column("messages", AnyJson, nullable=False),
    sa.Column("answer", AnyJson, nullable=False),
)

feedback = sa.Table(
    "feedback",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column(
        "request_id",
        sa.ForeignKey("conversations.request_id", ondelete="CASCADE"),
        nullable=False,
        index=True,
    ),
    sa.Column("recorded_at", UtcDateTime, nullable=False),
    sa.Column("rating", sa.String(8)),
    sa.Column("correction", AnyJson),
)

forgotten = sa.Table(
    "forgotten",
    metadata,
    sa.Column("request_id", sa.String(200), primary_key=True),
    sa.Column("forgotten_at", UtcDateTime, nullable=False),
)

accepted_versions = sa.Table(
    "accepted_versions",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True, server_default=DEFAULT_TENANT),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.String(32), primary_key=True),
    sa.Column("active", sa.Boolean, nullable=False),
)

accepted_examples = sa.Table(
    "accepted_examples",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False, server_default=DEFAULT_TENANT),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("version", sa.String(32), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("origin", sa.String(200), index=True),
    sa.Column("example", AnyJson, nullable=False),
    sa.ForeignKeyConstraint(
        ["tenant", "name", "version"],
        ["accepted_versions.tenant", "accepted_versions.name", "accepted_versions.version"],
    ),
    sa.UniqueConstraint("tenant", "name", "version", "digest"),
)

pins = sa.Table(
    "pins",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False, server_default=DEFAULT_TENANT),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("question", AnyJson, nullable=False),
    sa.Column("answer", AnyJson, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Index("ix_pins_tenant_name", "tenant", "name"),
)

cycles = sa.Table(
    "cycles",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False, server_default=DEFAULT_TENANT),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("due_at", UtcDateTime, nullable=False),
    sa.Column("trigger", sa.String(32), nullable=False),
    # The process that does it, as `ProcessIdentity`; None where an older nightschool did.
    sa.Column("owner", sa.String(200)),
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("outcome", sa.String(16)),
    sa.Column("detail", AnyJson),
    sa.Column("run_id", sa.String(200)),
    sa.Column("candidate", sa.String(200)),
    sa.Column("data_fingerprint", sa.String(128)),
    sa.UniqueConstraint("tenant", "name", "due_at"),
)

schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True, server_default=DEFAULT_TENANT),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("paused_at", UtcDateTime),
)

# One row per checkpoint and place. `digest` is the SHA-256 of its manifest.json: a checkpoint that is written again
# under its name begins anew.
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("home", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("run_id", sa.String(200), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("archive", sa.Boolean, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("bandwidth", sa.BigInteger),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_try_at", UtcDateTime, nullable=False),
    sa.Column("owner", sa.String(200)),
    sa.Column("lease_until", UtcDateTime),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error", AnyJson),
    sa.Column("queued_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
    sa.UniqueConstraint("path", "url"),
)

upload_files = sa.Table(
    "upload_files",
    metadata,
    sa.Column("upload_id", sa.ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.String(500), primary_key=True),
    sa.Column("place", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("stamp", sa.String(200)),
    sa.Column("sent_bytes", sa.BigInteger, nullable=False),
    sa.Column("session", sa.Text),
    sa.Column("etag", sa.String(200)),
)

# One row per job, which a worker turns into a run. `metadata` is whatever the submitter wants to find again.
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("recipe", AnyJson, nullable=False),
    sa.Column("root", sa.Text, nullable=False),
    sa.Column("source", sa.String(16), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("metadata", AnyJson, nullable=False),
    # How often it was begun; how often in a row its process died without having come further than `last_step`.
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("deaths", sa.Integer, nullable=False),
    sa.Column("last_step", sa.BigInteger, nullable=False),
    sa.Column("cancel_requested_at", UtcDateTime),
    sa.Column("pause_requested_at", UtcDateTime),
    sa.Column("not_before", UtcDateTime),
    sa.Column("owner", sa.String(200)),
    sa.Column("lease_until", UtcDateTime),
    sa.Column("run_id", sa.String(200)),
    sa.Column("outcome", sa.String(16)),
    sa.Column("candidate", sa.String(200)),
    sa.Column("detail", AnyJson),
    sa.Column("error", AnyJson),
    sa.Column("created_by", sa.String(200)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime),
    sa.Column("finished_at", UtcDateTime),
    # What jobs that may share a base have in common (`config/shared_base.py`), and which of them do so now.
    sa.Column("share_key", sa.String(64)),
    sa.Column("group_id", sa.String(64)),
    sa.Index("ix_jobs_state_tenant_created_at", "state", "tenant", "created_at"),
    sa.Index("ix_jobs_tenant_created_at", "tenant", "created_at"),
)


# Forms of a name's examples that are never made again. The question of a form, not its answer, makes its id.
rejected_forms = sa.Table(
    "rejected_forms",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("form", sa.String(16), primary_key=True),
    sa.Column("question", AnyJson, nullable=False),
    sa.Column("rejected_at", UtcDateTime, nullable=False),
    sa.Column("rejected_by", sa.String(200), nullable=False),
)

# Which entry of a memory holds a fact in place of a name's weights: of the fact only the digest, so that nothing of it is kept here.
adopted_facts = sa.Table(
    "adopted_facts",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("memory", sa.String(200), primary_key=True),
    sa.Column("identity", sa.String(32), nullable=False),
    sa.Column("entry", sa.String(24), nullable=False),
    sa.Column("version", sa.String(32), nullable=False),
    sa.Column("adopted_at", UtcDateTime, nullable=False),
)

# A key is kept as its SHA-256 in hex digits alone. Rows are revoked, never deleted.
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("tenant", sa.String(64), nullable=False, index=True),
    sa.Column("label", AnyJson, nullable=False),
    sa.Column("scopes", AnyJson, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("created_by", sa.String(200), nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
    sa.Column("last_used_at", UtcDateTime),
)

# What a tenant may use; None is unbounded. Tenants need no row: one without has no bounds of its own.
tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("requests_per_minute", sa.Float),
    sa.Column("tokens_per_day", sa.BigInteger),
    sa.Column("running_trainings", sa.Integer),
    sa.Column("open_trainings", sa.Integer),
    sa.Column("stored_versions", sa.Integer),
)

# `day` is YYYY-MM-DD in UTC.
usage = sa.Table(
    "usage",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("day", sa.String(10), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("generated_tokens", sa.BigInteger, nullable=False),
)

# Append-only: triggers refuse updates and deletions.
audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", UtcDateTime, nullable=False, index=True),
    sa.Column("tenant", sa.String(64), nullable=False, index=True),
    sa.Column("key_id", sa.String(64)),
    sa.Column("by", sa.String(200), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("target", AnyJson, nullable=False),
    sa.Column("request_id", sa.String(200)),
)

# Versions that learned a conversation which was deleted since, or grew from one that did.
tainted_versions = sa.Table(
    "tainted_versions",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.String(32), primary_key=True),
    sa.Column("request_id", sa.String(200), primary_key=True),
    sa.Column("tainted_at", UtcDateTime, nullable=False),
)

# Where a tenant is told of its events. The secret signs what is sent, so it is kept as it is.
webhook_endpoints = sa.Table(
    "webhook_endpoints",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False, index=True),
    sa.Column("name", AnyJson, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("event_types", AnyJson, nullable=False),
    sa.Column("secret", sa.String(200), nullable=False),
    sa.Column("old_secret", sa.String(200)),
    sa.Column("old_secret_until", UtcDateTime),
    # When it answered that it wants nothing any more.
    sa.Column("disabled_at", UtcDateTime),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
)

# That the tenant `project` may ask `name@pointer` of `tenant`.
checkpoint_permissions = sa.Table(
    "checkpoint_permissions",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("pointer", sa.String(64), nullable=False),
    sa.Column("project", sa.String(64), nullable=False, index=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("tenant", "name", "pointer", "project"),
)

# One row per event and endpoint that wants it.
webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("event_id", sa.String(64), primary_key=True),
    sa.Column("endpoint_id", sa.ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("event_type", sa.String(64), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_try_at", UtcDateTime, nullable=False),
    sa.Column("owner", sa.String(200)),
    sa.Column("lease_until", UtcDateTime),
    sa.Column("status_code", sa.Integer),
    sa.Column("error", AnyJson),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
    sa.Index("ix_webhook_deliveries_state_next_try_at", "state", "next_try_at"),
)


def key_of(name: str) -> dict[str, str]:
    """The values of the columns `tenant` and `name` for `tenant/name` or `name`.

    Raises:
        NameRefused: If it is not a name.
    """
    tenant, bare = split_name(name)
    return {"tenant": tenant, "name": bare}


def is_name_in(table: sa.Table, name: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    """The conditions under which a row is of `tenant/name` or `name`. Raises NameRefused if it is not a name."""
    tenant, bare = split_name(name)
    return table.c.tenant == tenant, table.c.name == bare
