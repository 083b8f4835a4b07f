"""Tinker on the Slurm cluster you already have.

    import tinker_hpc                  # submit(), Run, session(): run a loop on a cluster
    import tinker_hpc as tinker        # everything public of the stock SDK, with a ServiceClient that finds GPUs

Names are resolved when they are first used (PEP 562): importing this package imports neither torch nor the SDK, so a
command line tool or a login node pays for what it touches.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinker import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]

    from tinker_hpc.runs import Run as Run
    from tinker_hpc.service import ServiceClient as ServiceClient
    from tinker_hpc.service import session as session
    from tinker_hpc.submission import submit as submit

__title__ = "tinker_hpc"
__version__ = "0.1.0"

# Our own public names and where they live; they win over the SDK's (`ServiceClient`).
_OWN = {
    "Run": "tinker_hpc.runs",
    "ServiceClient": "tinker_hpc.service",
    "session": "tinker_hpc.service",
    "submit": "tinker_hpc.submission",
}


def _sdk() -> Any:
    return import_module("tinker")


def _public_names() -> list[str]:
    return sorted({*_OWN, *_sdk().__all__})


def __getattr__(name: str) -> Any:
    if name == "__all__":  # depends on the installed SDK, so it is asked for, not written down
        value: Any = _public_names()
    elif name in _OWN:
        value = getattr(import_module(_OWN[name]), name)
    elif name.startswith("_") or find_spec(f"{__name__}.{name}") is not None:
        # A module of ours: `from tinker_hpc import custom_loss` asks here first, and then imports it.
        raise AttributeError(f"module 'tinker_hpc' has no attribute {name!r}")
    else:
        try:
            value = getattr(_sdk(), name)
        except AttributeError:
            raise AttributeError(f"neither tinker_hpc nor tinker has an attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_public_names(), *(name for name in globals() if not name.startswith("_"))})
