"""A Ray cluster as far as jobs need one: submit a command line, ask what became of it, stop it. All of `ray` is here."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from nightschool.errors import Unreachable, UsageError

# Ray's own name for the address of its dashboard, which goes before RAY_ADDRESS.
RAY_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_RAY_ADDRESS = "http://127.0.0.1:8265"
_TIMEOUT_SECONDS = 20
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class NodeSize:
    """What one node has, or what a command line takes of one. `memory_bytes` is on the host."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Submitted:
    """A command line that Ray has taken: waiting for a node, running on `node`, or ended, with what Ray says of that."""

    ended: bool
    waits: bool
    failed: bool
    node: str | None
    message: str | None


class RayCluster:
    """The jobs API of a cluster. `client` is a `JobSubmissionClient`, `nodes` lists the resources of the living nodes."""

    def __init__(self, client: Any, nodes: Callable[[], Iterable[dict[str, float]]]) -> None:
        self._client = client
        self._nodes = nodes

    def submit(self, submission: str, entrypoint: str, size: NodeSize) -> None:
        """Have a shell command run on a node that has so much left. Submitting an id again does nothing.

        Raises:
            Unreachable: If the cluster does not answer, so that nobody knows whether it was taken.
        """
        try:
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission,
                metadata={"job_name": submission},
                entrypoint_num_cpus=size.cpus,
                entrypoint_num_gpus=size.gpus or None,
                entrypoint_memory=size.memory_bytes or None,
            )
        except (OSError, RuntimeError) as error:
            if self.find(submission) is None:
                raise _unreachable(error) from error

    def find(self, submission: str) -> Submitted | None:
        """What became of a submission; None if the cluster knows nothing of it, as after it was started anew.

        Raises:
            Unreachable: If the cluster does not answer.
        """
        try:
            found = self._client.get_job_info(submission)
        except (OSError, RuntimeError) as error:
            if _is_unknown(error):
                return None
            raise _unreachable(error) from error
        node = found.driver_agent_http_address
        return Submitted(
            ended=found.status.is_terminal(),
            waits=found.status == "PENDING",
            failed=found.status == "FAILED",
            node=None if node is None else f"{urlsplit(node).hostname} ({found.driver_node_id[:12]})",
            message=found.message,
        )

    def stop(self, submission: str) -> None:
        """Let Ray end a submission and everything that it has started: by SIGTERM, and 3 s later by SIGKILL.

        Raises:
            Unreachable: If the cluster does not answer.
        """
        try:
            self._client.stop_job(submission)
        except (OSError, RuntimeError) as error:
            if not _is_unknown(error):
                raise _unreachable(error) from error

    def largest(self) -> NodeSize:
        """The most CPUs and the most GPUs that any living node has in all.

        Raises:
            Unreachable: If the cluster does not answer.
        """
        nodes = list(self._nodes())
        cpus, gpus = (max((one.get(kind, 0.0) for one in nodes), default=0.0) for kind in ("CPU", "GPU"))
        return NodeSize(cpus, gpus)


def open_cluster(address: str) -> RayCluster:
    """The cluster whose dashboard is at this address.

    Raises:
        UsageError: If `ray` is not installed, or that is no address of a dashboard.
        Unreachable: If nothing answers there.
    """
    try:
        from ray.job_submission import JobSubmissionClient
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException
    except ImportError as error:
        raise UsageError(
            "Jobs on a Ray cluster need the extra ray: pip install 'nightschool[ray]'. Or leave out --executor ray."
        ) from error
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise UsageError(f"The Ray address is {address!r}. Give that of the cluster's dashboard, as http://head:8265.")
    os.environ[RAY_ADDRESS_VARIABLE] = address  # else RAY_ADDRESS would be taken in place of what was asked for
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_SECONDS).close()
        client = JobSubmissionClient(address)
    except (OSError, RuntimeError, ValueError) as error:
        raise Unreachable(
            f"No Ray cluster answers at {address}: {error}. Start one with ray start --head, or give --ray-address."
        ) from error
    # Ray's client waits for ever by itself, and a worker has more to do than to wait for a cluster.
    client._do_request = partial(client._do_request, timeout=_TIMEOUT_SECONDS)

    def nodes() -> list[dict[str, float]]:
        try:
            # Without the last it refuses to answer where some nodes are dead.
            found = list_nodes(address=address, detail=True, timeout=_TIMEOUT_SECONDS, raise_on_missing_output=False)
        except RayStateApiException as error:
            raise _unreachable(error) from error
        return [node.resources_total for node in found if node.state == "ALIVE"]

    return RayCluster(client, nodes)


def _is_unknown(error: Exception) -> bool:
    return "status code 404" in str(error)


def _unreachable(error: Exception) -> Unreachable:
    lines = str(error).strip().splitlines()
    return Unreachable(f"The Ray cluster does not answer: {lines[-1] if lines else type(error).__name__}")
