"""SkyRL's JAX server (skyrl 0.3.0) from an environment made by pip; runs in that environment.

    .venv-skyrl/bin/python serve.py --port P --base-model FOLDER --backend jax --backend-config JSON ...

Its own start, `python -m skyrl.tinker.api`, wants to be a child of `uv run` and starts its engine by `uv run` too; and
its types need Python 3.12 (typing.TypedDict, in pydantic). Both are set right here, nothing else is changed.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import typing

import typing_extensions

typing.TypedDict = typing_extensions.TypedDict


def serve() -> None:
    import uvicorn
    from skyrl.tinker import api
    from skyrl.tinker.config import EngineConfig, add_model, config_to_argv

    def engine_command(parent_command: list[str], config: EngineConfig) -> list[str]:
        return [sys.executable, __file__, "engine", *config_to_argv(config)]

    api._build_uv_run_cmd_engine = engine_command
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    add_model(parser, EngineConfig)
    given = vars(parser.parse_args())
    api.app.state.engine_config = EngineConfig.model_validate({k: given[k] for k in EngineConfig.model_fields})
    uvicorn.run(api.app, host="127.0.0.1", port=given["port"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        del sys.argv[1]
        runpy.run_module("skyrl.tinker.engine", run_name="__main__", alter_sys=True)
    else:
        serve()
