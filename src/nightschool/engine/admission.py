"""In which order those that wait are admitted. Names and numbers, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nightschool.engine.scheduler import ScheduledRequest


class AdmissionPolicy(Protocol):
    """What the scheduler asks. One policy belongs to one scheduler."""

    def order(self, waiting: Iterable[ScheduledRequest]) -> Iterable[ScheduledRequest]:
        """Who comes next, next but one, …, of those that wait, which are given in the order in which they came."""
        ...

    def arrived(self, tenant: str, present: Collection[str]) -> None:
        """A request of `tenant` was queued; `present` are the tenants that waited or ran before it."""
        ...

    def served(self, tenant: str, tokens: int) -> None:
        """So many tokens of `tenant` are computed; fewer than 0 if some turned out to be known already."""
        ...


class FirstCome:
    """Strictly in the order of arrival."""

    def order(self, waiting: Iterable[ScheduledRequest]) -> Iterable[ScheduledRequest]:
        return waiting

    def arrived(self, tenant: str, present: Collection[str]) -> None:
        """It changes nothing who it is."""

    def served(self, tenant: str, tokens: int) -> None:
        """It changes nothing who was served."""


class FairByTenant:
    """The tenant that was served the fewest tokens comes next, with the oldest of its requests.

    Virtual token counters (Sheng et al. 2024, arXiv 2401.00588): who comes back begins level with the least served of
    those that are here, so that nobody saves up turns while away. One tenant alone is served in the order of arrival.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def order(self, waiting: Iterable[ScheduledRequest]) -> Iterable[ScheduledRequest]:
        return sorted(waiting, key=lambda request: self._tokens.get(request.tenant, 0))

    def arrived(self, tenant: str, present: Collection[str]) -> None:
        if tenant in present:
            return
        least = min((self._tokens.get(other, 0) for other in present), default=0)
        # Who is away and was served no more than the least starts level anyway, so nothing of it has to be known.
        self._tokens = {
            other: tokens for other, tokens in self._tokens.items() if other in present or (present and tokens > least)
        }
        self._tokens[tenant] = max(self._tokens.get(tenant, 0), least)

    def served(self, tenant: str, tokens: int) -> None:
        self._tokens[tenant] = self._tokens.get(tenant, 0) + tokens


ADMISSION_POLICIES: dict[str, Callable[[], AdmissionPolicy]] = {"fair": FairByTenant, "first-come": FirstCome}
