"""What `import tinker_hpc` is: ours plus everything public of the installed SDK, and no weight until it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import tinker_hpc

OWN = {"Run", "ServiceClient", "session", "submit"}
HEAVY = {"torch", "transformers", "megatron", "tinker", "numpy", "submitit", "huggingface_hub", "sqlite_utils", "rich"}


def modules_after(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter that ran `code`."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(set(name.split('.')[0] for name in sys.modules))))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    assert modules_after("import tinker_hpc") & HEAVY == set()
    assert modules_after("from tinker_hpc import custom_loss") & HEAVY == set(), (
        "a module of ours is no name of the SDK"
    )


def test_dunder_probes_load_nothing_heavy() -> None:
    """doctest, inspect and notebooks probe modules for attributes they may have."""
    code = "import tinker_hpc\nfor name in ('__wrapped__', '_repr_html_', '__path__'): getattr(tinker_hpc, name, None)"
    assert modules_after(code) & HEAVY == set()


@pytest.mark.parametrize(
    "module", ["runs", "sessions", "session_keeper", "registry", "config", "payload", "loop", "cli.main", "cli.states"]
)
def test_the_client_side_imports_neither_torch_nor_the_sdk(module: str) -> None:
    assert modules_after(f"import tinker_hpc.{module}") & {"torch", "megatron", "transformers", "tinker"} == set()


def test_help_imports_no_command() -> None:
    code = (
        "from tinker_hpc.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "assert not [m for m in sys.modules if m.startswith('tinker_hpc.') and m not in "
        "('tinker_hpc.cli', 'tinker_hpc.cli.main', 'tinker_hpc.errors')], list(sys.modules)"
    )
    assert modules_after(code) & HEAVY == set()


def test_all_is_sorted_and_is_the_sdks_and_ours() -> None:
    import tinker

    assert tinker_hpc.__all__ == sorted(tinker_hpc.__all__)
    assert set(tinker_hpc.__all__) == set(tinker.__all__) | OWN
    assert set(tinker_hpc.__all__) <= set(dir(tinker_hpc))


def test_it_is_a_drop_in() -> None:
    import tinker

    for name in tinker.__all__:
        ours, theirs = getattr(tinker_hpc, name), getattr(tinker, name)
        if name == "ServiceClient":
            assert issubclass(ours, theirs) and ours is not theirs
        elif not name.startswith("__"):
            assert ours is theirs, name
    public = {name for name in dir(tinker) if not name.startswith("_")}
    assert all(hasattr(tinker_hpc, name) for name in public)


def test_from_import_star() -> None:
    namespace: dict[str, object] = {}
    exec("from tinker_hpc import *", namespace)
    assert {*OWN, "Datum", "ModelInput", "types"} <= set(namespace)


def test_an_unknown_name_says_where_it_was_looked_for() -> None:
    with pytest.raises(AttributeError, match="neither tinker_hpc nor tinker has an attribute 'Dataum'"):
        tinker_hpc.Dataum  # noqa: B018
    with pytest.raises(ImportError):
        exec("from tinker_hpc import Dataum")


def test_signatures_promised_by_the_readme() -> None:
    import inspect

    keywords = set(inspect.signature(tinker_hpc.submit).parameters)
    assert {"base_model", "cluster", "nodes", "gpus_per_node", "time", "name", "args", "kwargs"} <= keywords
    assert {"base_model", "cluster"} <= set(inspect.signature(tinker_hpc.session).parameters)
    members = ("id", "status", "result", "metrics", "logs", "cancel", "checkpoints", "done", "exception", "__await__")
    assert all(hasattr(tinker_hpc.Run, name) for name in members)


def test_every_factory_of_the_service_client_serves_first() -> None:
    import tinker

    factories = [name for name in vars(tinker.ServiceClient) if name.startswith("create_") and "client" in name]
    naming = [name for name in factories if "rest" not in name]
    assert len(naming) >= 4
    for name in naming:
        assert name in vars(tinker_hpc.ServiceClient), f"{name} would not start a worker"


def test_with_a_base_url_it_is_the_stock_client(monkeypatch: pytest.MonkeyPatch) -> None:
    client = tinker_hpc.ServiceClient(base_url="http://127.0.0.1:9", api_key="tml-x")
    assert client._hpc_session is None
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    assert tinker_hpc.ServiceClient()._hpc_session is None
