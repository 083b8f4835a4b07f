"""What travels between the client and the loop: the user's call there, its outcome back.

The call is a submitit `DelayedSubmission`, pickled by cloudpickle, behind a small header that says where the client
imported from (a function of the user's own module is pickled by name, so the job must find that module). Both files
lie in the user's own 0700 run folder; nothing else is ever pickled, and nothing pickled comes over the network.

    payload.pkl   pickle of the header {python, sys_path, cwd}, then pickle of the DelayedSubmission
    result.pkl    pickle of ("success", value) or ("error", (type name, message, traceback, pickled exception or None))
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle

from tinker_hpc.errors import SerializationError

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

_DEEPEST = 12  # how far the search for a culprit goes down; deeper ones are blamed on their container


@dataclass(frozen=True)
class Outcome:
    """How a loop ended, as `result.pkl` says it."""

    value: Any = None
    """The function's return value; None after an error."""
    error_type: str | None = None
    """Class name of the exception, None after a success."""
    message: str = ""
    remote_traceback: str = ""
    """The traceback in the job, as text."""
    exception: BaseException | None = None
    """The exception itself, if it could be pickled there and unpickled here."""


def dump_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """The bytes of `payload.pkl`.

    Raises: SerializationError naming the argument, global or closure variable that does not pickle, and why.
    """
    from submitit.core.utils import DelayedSubmission

    if not callable(function):
        raise SerializationError(
            f"submit() was given {type(function).__name__} {function!r}; expected a function. Pass the function "
            "itself and its arguments after it: submit(train, 100, base_model=...), not submit(train(100))."
        )
    header = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "sys_path": [os.path.abspath(entry) for entry in sys.path],
        "cwd": os.getcwd(),
    }
    try:
        body = cloudpickle.dumps(DelayedSubmission(function, *args, **kwargs), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        path, culprit, reason = find_culprit(function, args, kwargs) or ("the call", function, error)
        name = getattr(function, "__qualname__", type(function).__name__)
        raise SerializationError(
            f"cannot send {name}() to the job: {path} is a {_type_name(culprit)}, which does not pickle: {reason} "
            "Make it inside the function, or pass what it is made from (a path, a name, plain data).",
            path=path,
        ) from error
    return pickle.dumps(header, pickle.HIGHEST_PROTOCOL) + body


def load_call(data: bytes) -> DelayedSubmission:
    """The call in `payload.pkl`, after making the client's modules importable and its working folder ours.

    Side effects: extends sys.path, may chdir.
    Raises: SerializationError if another Python wrote it or a module is missing here.
    """
    stream = io.BytesIO(data)
    header = pickle.load(stream)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if header["python"] != here:
        raise SerializationError(
            f"the function was pickled by Python {header['python']}, but the job runs {here} ({sys.executable}). "
            f"Set python = the path of a {header['python']} interpreter in the cluster profile, or submit with {here}."
        )
    sys.path.extend(entry for entry in header["sys_path"] if entry not in sys.path and os.path.exists(entry))
    if os.path.isdir(header["cwd"]):
        os.chdir(header["cwd"])
    try:
        return pickle.load(stream)
    except (ImportError, AttributeError) as error:
        raise SerializationError(
            f"the job cannot import what the function needs: {error}. Install it in {sys.executable}'s environment, or "
            "define the function in the script you submit from (such functions travel by value)."
        ) from error


def dump_success(value: Any) -> bytes:
    """The bytes of `result.pkl` after a return. Raises: SerializationError naming the part that does not pickle."""
    try:
        return cloudpickle.dumps(("success", value), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        path, culprit, reason = _walk("the return value", value, 0, set()) or ("the return value", value, error)
        raise SerializationError(
            f"the loop finished, but {path} is a {_type_name(culprit)}, which does not pickle: {reason} "
            "Return plain data (numbers, lists, arrays, tinker:// paths) instead.",
            path=path,
        ) from error


def dump_error(error: BaseException) -> bytes:
    """The bytes of `result.pkl` after an exception, with its traceback as text."""
    text = "".join(traceback.format_exception(error))
    try:
        pickled: bytes | None = cloudpickle.dumps(error, pickle.HIGHEST_PROTOCOL)
    except Exception:
        pickled = None  # the type name, message and traceback still say it
    return pickle.dumps(("error", (type(error).__name__, str(error), text, pickled)), pickle.HIGHEST_PROTOCOL)


def load_outcome(data: bytes) -> Outcome:
    """The content of `result.pkl`.

    Raises: SerializationError if the value needs a module that is not installed here.
    """
    try:
        kind, content = pickle.loads(data)
    except Exception as error:
        raise SerializationError(
            f"the loop finished, but its return value cannot be loaded here: {type(error).__name__}: {error}. "
            "Install the module it comes from, or return plain data."
        ) from error
    if kind == "success":
        return Outcome(value=content)
    error_type, message, text, pickled = content
    exception = None
    if pickled is not None:
        try:
            loaded = pickle.loads(pickled)
            exception = loaded if isinstance(loaded, BaseException) else None
        except Exception:  # an exception class that lives only in the job, or whose __init__ wants more arguments
            exception = None
    return Outcome(error_type=error_type, message=message, remote_traceback=text, exception=exception)


def find_culprit(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, Any, str] | None:
    """The smallest part of a call that does not pickle: (where it is, the object, pickle's reason), or None."""
    seen: set[int] = set()
    for index, value in enumerate(args):
        if found := _walk(f"argument {index}", value, 0, seen):
            return found
    for name, value in kwargs.items():
        if found := _walk(f"argument {name!r}", value, 0, seen):
            return found
    return _walk(f"function {getattr(function, '__qualname__', function)!s}", function, 0, seen)


def _walk(path: str, value: Any, depth: int, seen: set[int]) -> tuple[str, Any, str] | None:
    try:
        cloudpickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        return None
    except Exception as error:
        reason = f"{error}."
    if id(value) in seen:  # a cycle: blame the part that closes it nowhere, its other members are looked at anyway
        return None
    seen.add(id(value))
    if depth < _DEEPEST:
        for step, child in _children(path, value):
            if found := _walk(step, child, depth + 1, seen):
                return found
    return path, value, reason


def _children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The parts pickle would go down into, each with its own path."""
    if isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f"variable {name!r} used by {value.__qualname__}", cell.cell_contents
            except ValueError:  # an empty cell
                continue
        for name in sorted(_names(value.__code__)):
            if name in value.__globals__:
                yield f"global variable {name!r} used by {value.__qualname__}", value.__globals__[name]
        yield f"a default of {value.__qualname__}", value.__defaults__ or ()
        yield f"a default of {value.__qualname__}", value.__kwdefaults__ or {}
    elif isinstance(value, types.MethodType):
        yield f"the object of {value.__qualname__}", value.__self__
        yield path, value.__func__
    elif isinstance(value, functools.partial):
        yield path, value.func
        for index, item in enumerate(value.args):
            yield f"argument {index} of {path}", item
        for name, item in value.keywords.items():
            yield f"argument {name!r} of {path}", item
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"a key of {path}", key
            yield f"{path}[{key!r}]", item
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
    elif isinstance(value, set | frozenset):
        for item in value:
            yield f"an element of {path}", item
    else:
        for name, item in (getattr(value, "__dict__", None) or {}).items():
            yield f"{path}.{name}", item


def _names(code: types.CodeType) -> set[str]:
    """Names a function and the functions inside it look up as globals."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
