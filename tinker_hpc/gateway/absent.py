"""What Tinker's cloud has and one's own cluster cannot: each answered with one sentence, at once.

404 and not 5xx, 408, 409 or 429, which the SDK would send again for five minutes before it showed the words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from tinker_hpc.gateway.http import route
from tinker_hpc.gateway.refusals import Refusal

_BILLING = "Nothing is billed here: the GPUs are your cluster's. `sacct` or `sreport` tell what your jobs used."
ABSENT: Mapping[tuple[str, str], str] = {
    ("GET", "billing/usage/events"): _BILLING,
    ("POST", "billing/usage/events"): _BILLING,
    ("GET", "billing/usage/checkpoints/current"): (
        "Checkpoint storage is not billed here: it is your quota. `tinker checkpoint list` and `du` tell the sizes."
    ),
    ("GET", "audit"): (
        "There is no audit log: a gateway has one user. What it accepted is in the run's request log "
        "(`tinker session export-trace`)."
    ),
    ("DELETE", "auth/apikey/me"): (
        "The key of a run cannot be deleted: it is in the run's gateway.json and ends with it (`tinker-hpc cancel`)."
    ),
}


def routes() -> list[Route]:
    """A route for each of them."""

    def refusing(sentence: str) -> Any:
        async def endpoint(request: Request) -> Any:
            raise Refusal(404, sentence)

        return endpoint

    return [route(method, path, refusing(sentence)) for (method, path), sentence in ABSENT.items()]
