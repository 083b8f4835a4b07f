"""Whatever is sent, on every route: answered in words with a 4xx, and the gateway lives.

Seeded, so that a failure comes again: FUZZ_SEED=N FUZZ_REQUESTS=M pytest tests/contract/test_fuzz.py.
"""

from __future__ import annotations

import collections
import http.client
import json
import os
import random
import socket
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
import serving
import tinker
from starlette.routing import Route
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tinker_hpc.config import load_config
from tinker_hpc.gateway.assembly import assemble
from tinker_hpc.log import Lease

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FUZZ_SEED", "20261124"))
REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "3000"))
WAIT_S = 60
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW")
TRICKS = (
    "..", ".", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "a%00b", "%ff%fe", "%", "a%0d%0aX-Evil:1",
    "x" * 4000, "s-1:train:0", "s-1:train:0/weights", "%F0%9F%92%A5", "-1", "weights", "~", "*", "a;b", "a?b", "CON",
    "${HOME}", "'", "%22",
)  # fmt: skip
QUERIES = ("limit=-1", "limit=%C2%B2", "offset=" + "9" * 5000, "limit=1&limit=x", "&&=%", "limit=")
FIELDS = (
    "session_id", "model_seq_id", "seq_id", "model_id", "base_model", "lora_config", "rank", "path", "optimizer",
    "adam_params", "learning_rate", "prompt", "chunks", "tokens", "num_samples", "sampling_params", "max_tokens",
    "stop", "name",
    "sampling_session_id", "sampling_session_seq_id", "request_id", "request_ids", "ttl_seconds", "tinker_path", "kind",
    "source_path", "destination_project_id", "project_id", "display_name", "user_metadata", "limit", "cursor", "owner",
    "statuses", "reason", "detail", "tags", "topk_prompt_logprobs", "target_prompt_logprobs", "seed", "temperature",
    "overwrite", "optimizer_config", "model_path", "prompt_logprobs_last_n", "events", "type", "graph", "inputs",
)  # fmt: skip


@pytest.fixture(scope="module")
def routes(tmp_path_factory) -> list[tuple[str, str]]:
    """(method, path) of every route there is, found by building the application."""
    run, _ = serving.new_run(tmp_path_factory.mktemp("routes") / "root")
    lease = Lease.acquire(run.gateway_lease, {}, holder="gateway")
    built = assemble(run, load_config(), lease, api_key="").application
    found = [(route.path, route.methods or set()) for route in built.routes if isinstance(route, Route)]
    methods = [(method, path) for path, methods in found for method in sorted(methods - {"HEAD"})]
    return [each for each in methods if each[1] != "/internal/close"]  # that one closes the run


def right_bodies(session: str, model: str, sampler: str, base_model: str) -> dict[str, dict[str, Any]]:
    """A right body of each JSON route that reads one, to be made wrong in one place."""
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]}
    adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0}
    params = {"max_tokens": 1, "seed": 1, "stop": ["a"], "temperature": 1.0, "top_k": -1, "top_p": 1.0}
    in_order = {"model_id": model, "seq_id": 5}
    path = f"tinker://{model}/weights/none"
    lora = {"rank": 1, "seed": 1, "train_mlp": True, "train_attn": True, "train_unembed": True}
    new = {"session_id": session, "model_seq_id": 88, "base_model": base_model, "lora_config": lora}
    target = {"dtype": "int64", "shape": [2], "data": [1, 2]}
    search = {"session_id": session, "display_name": "x", "user_metadata": {"a": "b"}, "limit": 3, "project_ids": ["p"]}
    return {
        "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "0.38.0", "project_id": "p"},
        "session_heartbeat": {"session_id": session},
        "create_model": {**new, "user_metadata": {"a": "b"}, "optimizer_config": {"type": "adamw"}},
        "get_info": {"model_id": model},
        "optim_step": {**in_order, "adam_params": adam},
        "save_weights": {**in_order, "path": "name", "ttl_seconds": 3600, "overwrite": True, "user_metadata": {}},
        "load_weights": {**in_order, "path": path, "optimizer": True},
        "save_weights_for_sampler": {**in_order, "path": "name", "sampling_session_seq_id": 3, "kind": "snapshot"},
        "save_weights_external": {**in_order, "path": "name", "age_encryption_recipients": ["age1"]},
        "create_sampling_session": {"session_id": session, "sampling_session_seq_id": 99, "model_path": path},
        "asample": {
            **{
                "sampling_session_id": sampler,
                "seq_id": 1,
                "num_samples": 1,
                "prompt": prompt,
                "prompt_logprobs": True,
            },
            **{"sampling_params": params, "topk_prompt_logprobs": 1, "target_prompt_logprobs": target},
        },
        "retrieve_future": {"request_id": "none", "allow_metadata_only": True},
        "weights_info": {"tinker_path": path},
        "copy_weights": {"session_id": session, "model_seq_id": 5, "source_path": path, "ttl_seconds": 3600},
        "sessions/search": {
            **search,
            "owner": {"type": "user", "owner_urns": ["u"]},
            "statuses": [{"type": "client_finished", "reasons": ["success"]}],
            "cursor": {"last_created_at": "2026-01-01T00:00:00+00:00", "last_session_id": "s"},
        },
        "project": {"project_id": "p"},
        "ttl": {"ttl_seconds": 3600},
        "finish": {"reason": {"type": "success"}, "detail": "d"},
    }


class Fuzzer:
    """Draws requests. `real` are ids that exist, `right` are `right_bodies`."""

    def __init__(
        self, rng: random.Random, routes: list[tuple[str, str]], real: list[str], right: dict[str, Any]
    ) -> None:
        self.rng, self.routes, self.real, self.right = rng, routes, real, right

    def value(self, depth: int = 0) -> Any:
        kind = self.rng.randrange(16 if depth < 4 else 11)
        return (
            lambda: None,
            lambda: self.rng.random() < 0.5,
            lambda: self.rng.choice((0, 1, -1, 7, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30)),
            lambda: self.rng.choice((0.0, -0.5, 1e308, -1e-320, float("nan"), float("inf"))),
            lambda: "",
            lambda: self.rng.choice(self.real),
            lambda: self.rng.choice(("tinker://", "tinker://a/b/c", "tinker://s-1:train:0/weights/..", "/etc/passwd")),
            lambda: "x" * self.rng.choice((1, 300, 70_000)),
            lambda: self.rng.choice(("\x00\u202e\U0001f4a5", "\ud800")),
            lambda: self.rng.choice(("adamw", "encoded_text", "base", "cross_entropy", "snapshot", "own", "active")),
            lambda: f"tinker://{self.rng.choice(self.real)}/weights/x",
            lambda: [self.value(depth + 1) for _ in range(self.rng.randrange(4))],
            lambda: self.object(depth + 1),
            lambda: self.object(depth + 1),
            lambda: {"chunks": [{"type": "encoded_text", "tokens": self.value(depth + 1)}]},
            lambda: {"type": self.value(depth + 1), "data": self.value(depth + 1), "dtype": "int64", "shape": [3]},
        )[kind]()

    def object(self, depth: int = 0) -> dict[str, Any]:
        return {self.rng.choice(FIELDS): self.value(depth) for _ in range(self.rng.randrange(12))}

    def nearly(self, right: Any) -> Any:
        """A copy of `right` with something else in one place."""
        places = list(right) if isinstance(right, dict) else list(range(len(right)))
        where = self.rng.choice(places)
        copy = dict(right) if isinstance(right, dict) else list(right)
        deeper = isinstance(copy[where], dict | list) and copy[where] and self.rng.random() < 0.7
        copy[where] = self.nearly(copy[where]) if deeper else self.value()
        return copy

    def body(self, path: str) -> bytes:
        ends = [right for name, right in self.right.items() if path.endswith(f"/{name}")]
        if ends and self.rng.random() < 0.7:
            return json.dumps(self.nearly(ends[0])).encode("utf-8", "surrogatepass")
        kind = self.rng.randrange(12)
        if kind < 7:
            return json.dumps(self.object()).encode("utf-8", "surrogatepass")
        if kind == 7:
            return json.dumps(self.value()).encode("utf-8", "surrogatepass")
        if kind == 8:
            whole = json.dumps(self.object()).encode()
            return whole[: self.rng.randrange(len(whole))]
        if kind == 9:
            depth = self.rng.choice((60, 900, 5000))
            return b'{"%s":' % self.rng.choice(FIELDS).encode() + b"[" * depth + b"]" * depth + b"}"
        if kind == 10:
            return self.rng.randbytes(self.rng.randrange(300))
        return self.protobuf()

    def protobuf(self) -> bytes:
        length = self.rng.randrange(1, 5)
        inputs = {"target_tokens": [1] * length, "weights": [1.0] * self.rng.randrange(1, 5)}
        datum = tinker.Datum(model_input=tinker.ModelInput.from_ints([1] * length), loss_fn_inputs=inputs)
        call = tinker.types.ForwardBackwardInput(data=[datum], loss_fn="cross_entropy")
        seq_id = self.rng.choice((0, 1, 2**31 - 1))
        request = ForwardBackwardRequest(
            forward_backward_input=call, model_id=self.rng.choice(self.real), seq_id=seq_id
        )
        body = bytearray(forward_backward_request_to_proto(request).SerializeToString())
        for _ in range(self.rng.randrange(6)):
            body[self.rng.randrange(len(body))] = self.rng.randrange(256)
        return bytes(body[: self.rng.randrange(1, len(body) + 40)])

    def headers(self, key: str) -> dict[str, str]:
        headers = {"X-API-Key": key, "Content-Type": "application/json"}
        extra = {
            "X-API-Key": ("", "tml-x", "eyJ.eyJ.x", "eyJ", "\xff\xfe", "x" * 3000),
            "Content-Type": ("application/x-protobuf", "text/html; charset=\xff", ""),
            "Content-Encoding": ("gzip", "zstd", "identity", "\xb2"),
            "X-Tinker-Request-Iteration": ("1", "\xb2", "-1", "9" * 5000, "x"),
            "X-Idempotency-Key": ("same", "\xff"),
            "X-Stainless-Package-Version": ("0.25.0", "0.\xb2", "9" * 4000),
            "Host": ("evil.example", "[", "127.0.0.1:x"),
            "Accept": ("\xb2",),
        }
        while self.rng.random() < 0.4:
            name = self.rng.choice(sorted(extra))
            headers[name] = self.rng.choice(extra[name])
        return headers

    def request(self, key: str) -> tuple[str, str, bytes, dict[str, str]]:
        method, path = self.rng.choice(self.routes)
        body = self.body(path)
        if self.rng.random() < 0.15:
            method = self.rng.choice(METHODS)
        while "{" in path:
            name = path[path.index("{") : path.index("}") + 1]
            real = "s-none" if path.endswith("/finish") else self.rng.choice(self.real)  # a finished one refuses all
            path = path.replace(name, self.rng.choice((self.rng.choice(TRICKS), urllib.parse.quote(real))), 1)
        if self.rng.random() < 0.1:
            path += "/" + self.rng.choice(TRICKS)
        if self.rng.random() < 0.3:
            path += "?" + self.rng.choice(QUERIES)
        headers = self.headers(key)
        if "forward_backward" in path and self.rng.random() < 0.8:
            body, headers["Content-Type"] = self.protobuf(), "application/x-protobuf"
        return method, path, body, headers


class Line:
    """One connection, opened again when the gateway closed it."""

    def __init__(self, service: serving.Service) -> None:
        where = urllib.parse.urlsplit(service.base_url)
        self.connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=WAIT_S)

    def send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        for attempt in range(2):
            try:
                self.connection.putrequest(method, path, skip_host="Host" in headers)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.connection.putheader(name, value.encode("latin-1"))
                self.connection.endheaders(body)
                response = self.connection.getresponse()
                return response.status, response.read()
            except (http.client.RemoteDisconnected, ConnectionError):
                self.connection.close()
                if attempt:
                    raise
        raise AssertionError


@pytest.fixture
def line(service) -> Iterator[Line]:
    opened = Line(service)
    yield opened
    opened.connection.close()


def in_words(status: int, body: bytes) -> bool:
    """Whether it is an answer, or a refusal that says why."""
    if status < 400:
        return True
    if status >= 500:
        return False
    if body == b"Invalid HTTP request received.":  # the HTTP parser's own words
        return status == 400
    try:
        answer = json.loads(body)
    except ValueError:
        return False
    return status == 408 or len(answer.get("error", "")) > 10


def test_every_route_answers_anything_in_words_and_the_gateway_lives(service, training_client, routes, line):
    rng = random.Random(SEED)
    # A session of its own: a request accepted by chance would have its place in the order of the model that trains.
    session = service.post("create_session", {}).json["session_id"]
    base_model = service.base_model
    ask = {"session_id": session, "model_seq_id": 0, "base_model": base_model, "lora_config": {"rank": 1}}
    model = service.post("create_model", ask).json["model_id"]
    ask = {"session_id": session, "sampling_session_seq_id": 0, "base_model": base_model}
    sampler = service.post("create_sampling_session", ask).json["sampling_session_id"]
    right = right_bodies(session, model, sampler, base_model)
    fuzzer = Fuzzer(rng, routes, [session, model, sampler, "s-none", "s-none:train:0", "s-none:sample:0"], right)
    statuses: collections.Counter[int] = collections.Counter()
    touched: set[str] = set()
    wrong: list[tuple[Any, ...]] = []
    for number in range(REQUESTS):
        method, path, body, headers = fuzzer.request(service.api_key)
        status, answer = line.send(method, path, body, headers)
        if not in_words(status, answer):
            wrong.append((number, method, path[:100], status, answer[:300], body[:300], headers))
        statuses[status] += 1
        touched.add(path.partition("?")[0].split("/")[3] if path.count("/") > 2 else path)
    assert not wrong, "\n".join(map(repr, wrong[:20]))
    assert statuses.total() == REQUESTS and sum(n for status, n in statuses.items() if status >= 400) > REQUESTS / 2
    assert len(touched) >= len({path.split("/")[3] for _, path in routes})
    print(f"{REQUESTS} requests on {len(routes)} routes: {dict(sorted(statuses.items()))}")
    inputs = {"target_tokens": [2, 3], "weights": [1.0, 1.0]}
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints([1, 2]), loss_fn_inputs=inputs)
    passed = training_client.forward_backward([datum], "cross_entropy")
    assert training_client.optim_step(tinker.AdamParams()).result(WAIT_S).metrics["grad_norm:mean"] > 0
    assert passed.result(WAIT_S).metrics["loss:sum"] > 0


POST = b"POST /api/v1/telemetry HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: %s\r\n"
RAW = {
    "no request at all": b"\x00\xff\r\n\r\n",
    "half a request": POST[:-20],
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "a length that is none": POST + b"Content-Length: many\r\n\r\n",
    "a body that never comes": POST + b"Content-Length: 9\r\n\r\n",
    "chunks that are none": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a header without end": b"GET /api/v1/healthz HTTP/1.1\r\nX: " + b"x" * 200_000,
}


@pytest.mark.parametrize("case", RAW)
def test_what_is_not_http_closes_that_connection_only(service, case):
    where = urllib.parse.urlsplit(service.base_url)
    with socket.create_connection((where.hostname, where.port), timeout=WAIT_S) as connection:
        answer = b""
        try:
            connection.sendall(RAW[case].replace(b"%s", service.api_key.encode()))
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(4096):
                answer += piece
        except OSError as error:  # the gateway may hang up before all is said (ECONNRESET, EPIPE, ENOTCONN)
            assert not isinstance(error, TimeoutError), "it says nothing and does not hang up"
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 2")), answer[:200]
    assert service.get("healthz").json == {"status": "ok"}


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(service):
    where = urllib.parse.urlsplit(service.base_url)
    for path, kind in (("asample", "application/json"), ("forward_backward", "application/x-protobuf")):
        with socket.create_connection((where.hostname, where.port), timeout=WAIT_S) as connection:
            head = f"POST /api/v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {service.api_key}\r\n"
            connection.sendall(f"{head}Content-Type: {kind}\r\nContent-Length: {2**40}\r\n\r\n".encode())
            answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 413"), answer
