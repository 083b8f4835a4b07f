"""Routing replay on the gateway's side: which requests have their experts noted, and whose experts a datum is given.

It is decided here, once, and logged with the request: redoing it takes the same experts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tinker_hpc.base_models import BaseModel
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.refusals import try_again
from tinker_hpc.gateway.validate import refuse
from tinker_hpc.gateway.workers import WorkerLink

PATIENCE_S = 20.0
"""The SDK's own is longer, and it asks again."""


class RoutingReplay:
    """Config.routing_replay. Lives on the event loop."""

    def __init__(self, ledger: Ledger, *, on: bool, config: Path | None) -> None:
        """config: the file that says so, for messages."""
        self._ledger = ledger
        self._on = on
        self._config = config

    def check(self, base: BaseModel) -> None:
        """Raises: RequestError for a model to be trained whose base has no experts."""
        if self._on and not base.num_experts:
            refuse(
                f"routing_replay = true stands in {self._config or 'the configuration'}, but {base.name} has no "
                "experts: there is no routing to replay. Remove that line, or train a mixture of experts."
            )

    def of_sample(self, base: BaseModel) -> dict[str, Any]:
        """What a sample's header says."""
        return {"note_experts": True} if self._on and base.num_experts else {}

    async def of_pass(self, link: WorkerLink, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What a forward_backward's header says: of each datum the sequence it was sampled as, or None.

        Raises: Refusal 503 while a gateway that was started again has not read all results: it may know too little.
        """
        if not (self._on and link.base.num_experts):
            return {}
        deadline = time.monotonic() + PATIENCE_S
        while not link.caught_up:
            if time.monotonic() > deadline:
                raise try_again("nothing was accepted: the results of this run are still being read.")
            await asyncio.sleep(0.02)
        futures = self._ledger.futures
        offsets = arrays["offsets"]
        pieces = [arrays["tokens"][start:end] for start, end in pairwise(offsets.tolist())]
        found = [link.sampled.find(tokens, futures.__contains__) for tokens in pieces]
        return {"routing_from": [None if source is None else list(source) for source in found]}
