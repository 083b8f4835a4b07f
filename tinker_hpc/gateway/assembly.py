"""The parts of a gateway, put together: from a run folder to the ASGI application that answers for it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from starlette.applications import Starlette

from tinker_hpc.config import Config
from tinker_hpc.gateway import app, passes
from tinker_hpc.gateway.custom_losses import CustomLosses
from tinker_hpc.gateway.desk import Desk
from tinker_hpc.gateway.ledger import Ledger
from tinker_hpc.gateway.lookup import Lookup
from tinker_hpc.gateway.models import Models
from tinker_hpc.gateway.replay import Replay, tell_again
from tinker_hpc.gateway.retention import Reads
from tinker_hpc.gateway.retrieval import HOLD_S, Retrieval
from tinker_hpc.gateway.routing import RoutingReplay
from tinker_hpc.gateway.samplers import Samplers
from tinker_hpc.gateway.sessions import Sessions
from tinker_hpc.gateway.shelf import Shelf
from tinker_hpc.gateway.training import Training
from tinker_hpc.gateway.workers import Workers
from tinker_hpc.log import Lease
from tinker_hpc.run_folder import RunFolder, seed_of_run


@dataclass(frozen=True)
class Gateway:
    """One gateway, not yet listening. Call `recall` once before it answers."""

    application: Starlette
    desk: Desk
    ledger: Ledger
    workers: Workers
    replay: Replay

    def recall(self) -> None:
        """Rebuild from the request logs what earlier gateways of this run knew.

        Raises: CorruptLogError, DataRootError; nothing was changed then.
        """
        for link in self.workers.scan():
            self.ledger.replay(link.requests(), link.index, link.taken_back)
            tell_again(link, self.ledger.rewinds_told.get(link.index, ()))
        self.replay.restore()


def assemble(run: RunFolder, config: Config, lease: Lease, *, api_key: str, hold_s: float = HOLD_S) -> Gateway:
    """The gateway of `run`; `hold_s`: how long a poll is held before the client is asked to come again."""
    ledger = Ledger()
    workers = Workers(run, config.base_models, lease)
    replay = Replay(run, ledger, workers)
    sessions = Sessions(run.sessions, replay)
    losses = passes.Losses(CustomLosses(run.custom_losses), stable_reinforce=config.stable_reinforce)
    run_seed = seed_of_run(run.run_id, os.environ)
    desk = Desk(
        run.data_root,
        workers,
        ledger,
        sessions,
        reads=Reads(run.reads),
        replay=replay,
        run_seed=run_seed,
    )
    routing = RoutingReplay(ledger, on=config.routing_replay, config=config.path)
    application = app.build(
        desk=desk,
        models=Models(desk, routing, per_expert=config.expert_lora == "per_expert"),
        training=Training(desk, losses, routing),
        samplers=Samplers(desk, routing),
        lookup=Lookup(run.data_root, ledger, workers, sessions),
        retrieval=Retrieval(ledger, workers, hold_s=hold_s),
        shelf=Shelf(run.data_root, run.exports),
        run=run,
        api_key=api_key,
    )
    return Gateway(application, desk, ledger, workers, replay)
