"""What travels to the loop and back, and which object is blamed when it cannot."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from tinker_hpc.errors import SerializationError
from tinker_hpc.payload import dump_call, dump_error, dump_success, load_call, load_outcome

LOCK = threading.Lock()


def add(a: int, b: int = 0) -> int:
    return a + b


def uses_a_global() -> object:
    return LOCK


@dataclass
class Settings:
    name: str
    lock: object = None


@pytest.fixture(autouse=True)
def _stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """load_call changes the working folder and sys.path, as it should in a loop's own process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_call_arrives() -> None:
    assert load_call(dump_call(add, (2,), {"b": 3})).result() == 5
    offset = 40
    assert load_call(dump_call(lambda x: x + offset, (2,), {})).result() == 42


def by_closure():
    lock = threading.Lock()

    def train():
        return lock

    return train


def by_default(lock=LOCK):
    return lock


def local_reader_of_global():
    namespace = {"HANDLE": LOCK, "__name__": "__main__"}
    exec("def train():\n    return [HANDLE for _ in range(1)]", namespace)
    return namespace["train"]


class Trainer:
    def __init__(self) -> None:
        self.config = {"steps": 3, "writer": LOCK}

    def train(self):
        return self.config


def nested_function(f):
    """The same function as if it were written in a script: pickled by value, with what it uses."""
    namespace = dict(f.__globals__, __name__="__main__")
    return type(f)(f.__code__, namespace, f.__name__, f.__defaults__, f.__closure__)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "words"),
    [
        (add, (LOCK,), {}, ["argument 0 is", "_thread.lock"]),
        (add, (1,), {"b": LOCK}, ["argument 'b' is", "_thread.lock"]),
        (add, ({"data": [1, (2, LOCK)]},), {}, ["argument 0['data'][1][1] is"]),
        (add, (Settings("x", LOCK),), {}, ["argument 0.lock is"]),
        (by_closure(), (), {}, ["variable 'lock' used by", "train"]),
        (nested_function(by_default), (), {}, ["a default of by_default"]),
        (local_reader_of_global(), (), {}, ["global variable 'HANDLE' used by train"]),
        (nested_function(uses_a_global), (), {}, ["global variable 'LOCK' used by uses_a_global"]),
        (Trainer().train, (), {}, [".config['writer'] is"]),
        (functools.partial(add, b=LOCK), (1,), {}, ["argument 'b' of function"]),
        (add, (iter(x for x in "ab"),), {}, ["argument 0 is a generator"]),
    ],
)
def test_the_culprit_is_named(function, args, kwargs, words) -> None:
    with pytest.raises(SerializationError) as caught:
        dump_call(function, args, kwargs)
    message = str(caught.value)
    for word in [*words, "Make it inside the function"]:
        assert word in message


def test_a_called_function_is_refused() -> None:
    with pytest.raises(SerializationError, match=r"given int 3; expected a function"):
        dump_call(add(1, 2), (), {})  # type: ignore[arg-type]


def test_cycles_do_not_hang_the_search() -> None:
    cycle: list[object] = [LOCK]
    cycle.append(cycle)
    with pytest.raises(SerializationError, match=r"argument 0\[0\]"):
        dump_call(add, (cycle,), {})


def test_another_python_is_refused_by_name() -> None:
    old = pickle.dumps({"python": "3.9", "sys_path": [], "cwd": "/"})
    with pytest.raises(SerializationError, match=r"pickled by Python 3\.9, but the job runs"):
        load_call(old + dump_call(add, (1,), {}))


def test_modules_of_the_client_are_found_in_the_loop(tmp_path: Path) -> None:
    """A function of the user's own module is pickled by name: the job must import from where the client did."""
    (tmp_path / "my_recipe.py").write_text("def train(n):\n    return n * 2\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import my_recipe\n"
        "from tinker_hpc.payload import dump_call; sys.stdout.buffer.write(dump_call(my_recipe.train, (21,), {}))"
    )
    data = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True).stdout
    assert load_call(data).result() == 42
    sys.modules.pop("my_recipe")
    (tmp_path / "my_recipe.py").unlink()
    sys.path_importer_cache.clear()
    with pytest.raises(SerializationError, match=r"cannot import what the function needs.*my_recipe"):
        load_call(data)


def test_a_return_value_comes_back() -> None:
    assert load_outcome(dump_success({"losses": [1.0, 0.5]})).value == {"losses": [1.0, 0.5]}


def test_an_unpicklable_return_value_names_the_part() -> None:
    with pytest.raises(SerializationError, match=r"the return value\['writer'\] is a _thread.lock"):
        dump_success({"loss": 1.0, "writer": LOCK})


class NeedsTwo(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class HoldsALock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = LOCK


@pytest.mark.parametrize(
    ("error", "comes_back"), [(KeyError("x"), True), (NeedsTwo(1, 2), False), (HoldsALock("held"), False)]
)
def test_an_exception_comes_back_or_at_least_its_words(error, comes_back) -> None:
    try:
        raise error
    except Exception as raised:
        outcome = load_outcome(dump_error(raised))
    assert outcome.error_type == type(error).__name__
    assert outcome.message == str(error)
    assert "test_payload.py" in outcome.remote_traceback and "raise error" in outcome.remote_traceback
    assert isinstance(outcome.exception, type(error)) is comes_back


def test_a_value_of_a_module_missing_here_says_so(tmp_path: Path) -> None:
    (tmp_path / "only_there.py").write_text("class Thing:\n    pass\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import only_there\n"
        "from tinker_hpc.payload import dump_success; sys.stdout.buffer.write(dump_success(only_there.Thing()))"
    )
    data = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True).stdout
    with pytest.raises(SerializationError, match=r"cannot be loaded here.*only_there"):
        load_outcome(data)
