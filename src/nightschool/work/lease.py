"""Who works on a row of a queue, until when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from nightschool.work.identity import ProcessIdentity


@dataclass(frozen=True)
class Lease:
    """`owner` may work until `until`, and gives signs of life before that. Without an owner nobody works.

    On the machine of its owner a lease ends with that process; on another one, after it was silent for too long.
    """

    owner: ProcessIdentity | None
    until: datetime | None

    @classmethod
    def begin(cls, moment: datetime, seconds: float) -> Lease:
        """A lease of this process, for so long."""
        return cls(ProcessIdentity.mine(), moment + timedelta(seconds=seconds))

    @classmethod
    def read(cls, owner: str | None, until: datetime | None) -> Lease:
        """The lease that a row of a queue keeps."""
        return cls(ProcessIdentity.parse(owner or ""), until)

    @property
    def columns(self) -> dict[str, str | datetime | None]:
        """What a row of a queue keeps of it."""
        return {"owner": None if self.owner is None else str(self.owner), "lease_until": self.until}

    def heartbeat(self, moment: datetime, seconds: float) -> Lease:
        """The lease after a sign of life of its owner."""
        return replace(self, until=moment + timedelta(seconds=seconds))

    def is_held_by_another(self, moment: datetime) -> bool:
        """Whether a process other than this one may still be at work."""
        if self.owner is not None and self.owner.is_here:
            return self.owner.lives and self.owner.pid != ProcessIdentity.mine().pid
        return self.until is not None and self.until > moment


class Leased:
    """A row of a queue, as it keeps who works on it."""

    owner: str | None
    lease_until: datetime | None

    @property
    def lease(self) -> Lease:
        return Lease.read(self.owner, self.lease_until)
