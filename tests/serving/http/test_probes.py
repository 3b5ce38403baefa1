"""What strangers do to a port: every row of the table of HTTP probes, over raw connections if needed."""

import concurrent.futures
import contextlib
import gzip
import json
import socket
import time

import httpx
import pytest

from dsv4_jax.serving.requests import Output
from tests.serving.http import served
from tests.serving.http.served import error_of, events_of, until

CHAT = "/v1/chat/completions"
BODY = b'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}'


def head(path=CHAT, length=None, *lines, method="POST"):
    found = [f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines]
    if length is not None:
        found.append(f"Content-Length: {length}")
    return "\r\n".join(found).encode() + b"\r\n\r\n"


def answer(connection):
    """(status, everything until the connection is closed, or the whole response)."""
    data = b""
    while True:
        try:
            piece = connection.recv(1 << 16)
        except ConnectionResetError:
            piece = b""
        data += piece
        start, gap, body = data.partition(b"\r\n\r\n")
        length = [
            line.split(b":")[1] for line in start.split(b"\r\n") if line.lower().startswith(b"content-len")
        ]
        if not piece or (gap and length and len(body) >= int(length[0])):
            return int(start.split(b" ")[1]) if start else None, data


def is_closed(connection):
    connection.settimeout(10)
    try:
        return connection.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    ("size", "statuses"), [(60_000, {200}), (128_000, {400, None}), (8 << 20, {400, None})]
)
def test_http_large_headers(acted, size, statuses):
    with acted.connect() as connection:
        try:
            connection.sendall(head(CHAT, len(BODY), "X-Large: " + "a" * size) + BODY)
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert answer(connection)[0] in statuses


def test_http_a_body_beyond_the_limit_is_refused_before_it_is_read(acted):
    with acted.connect() as connection:
        connection.sendall(head(CHAT, (1 << 20) + 1))
        status, data = answer(connection)
        assert status == 413 and b"connection: close" in data.lower()
        assert is_closed(connection)
    assert acted.post(CHAT, b" " * (1 << 20)).status_code == 400


def test_http_an_endless_chunked_body_is_cut_at_the_limit(acted):
    with acted.connect() as connection:
        connection.sendall(head(CHAT, None, "Transfer-Encoding: chunked"))
        sent = 0
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        try:
            while sent < 8 << 20:
                connection.sendall(piece)
                sent += 65536
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert sent < 8 << 20
    until(acted.idle)
    assert acted.metric("rejected_requests_total", reason="body_too_large") >= 1


@pytest.mark.parametrize("data", [
    b"POST /v1/chat", head(CHAT, 100)[:-2], head(CHAT, len(BODY)), head(CHAT, len(BODY)) + BODY[:20], b"",
    head(CHAT, None, "Transfer-Encoding: chunked") + b"5\r\nabc",
], ids=["half line", "half head", "no body", "half body", "nothing", "half chunk"])  # fmt: skip
def test_http_half_a_request_is_not_waited_for(hasty, data):
    with hasty.connect() as connection:
        connection.sendall(data)
        assert answer(connection)[0] in (None, 408)
        assert is_closed(connection)


def test_http_a_head_that_drips_has_no_more_time(hasty):
    with hasty.connect() as connection:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for byte in head(CHAT, 5):
                connection.sendall(bytes([byte]))
                time.sleep(0.05)


def test_http_half_a_second_request_is_not_waited_for(hasty):
    with hasty.connect() as connection:
        connection.sendall(head("/health", None, method="GET") + b"GET /hea")
        assert answer(connection)[0] == 200
        assert is_closed(connection)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_http_numbers_that_are_none(acted, value):
    error = error_of(acted.post(CHAT, BODY[:-1] + f', "temperature": {value}}}'.encode()), 400)
    assert "finite" in error["message"]


@pytest.mark.parametrize("depth", [65, 5000, 100_000])
def test_http_nesting(acted, depth):
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        inner = opening * depth + b"1" + closing * depth
        error_of(acted.post(CHAT, BODY[:-1] + b', "metadata": ' + inner + b"}"), 400)
    error_of(acted.post(CHAT, b"[" * depth), 400)


@pytest.mark.parametrize("value", ["true", '"3"', "1.0", "[1]", "{}", "1e2"])
def test_http_an_integer_is_an_integer(acted, value):
    for field in ("n", "max_tokens", "seed", "top_k"):
        body = BODY.replace(b', "max_tokens": 4', b"")[:-1] + f', "{field}": {value}}}'.encode()
        assert error_of(acted.post(CHAT, body), 400)["param"] == field


def test_http_of_equal_keys_the_last_counts(acted):
    assert acted.post(CHAT, BODY[:-1] + b', "max_tokens": 0, "max_tokens": 2}').status_code == 200
    assert acted.engine.asked[0][1].max_tokens == 2


BAD_BODIES = {
    "gzip": (415, gzip.compress(BODY), {"content-encoding": "gzip"}),
    "form": (415, BODY, {"content-type": "application/x-www-form-urlencoded"}),
    "plain": (415, BODY, {"content-type": "text/plain"}),
    "charset": (415, BODY, {"content-type": "application/json; charset=utf-16"}),
    "latin-1": (400, BODY.replace(b"hello", b"h\xe4llo"), {}),
    "utf-16": (400, BODY.decode().encode("utf-16"), {}),
    "bom": (400, b"\xef\xbb\xbf" + BODY, {}),
    "empty": (400, b"", {}),
    "array": (400, b"[" + BODY + b"]", {}),
    "string": (400, b'"hello"', {}),
    "null": (400, b"null", {}),
    "cut": (400, BODY[:-1], {}),
    "two": (400, BODY + BODY, {}),
    "digits": (400, BODY[:-1] + b', "seed": ' + b"9" * 5000 + b"}", {}),
    "surrogate": (400, BODY.replace(b"hello", b"\\ud800"), {}),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_http_bodies_that_are_no_json_object(acted, name):
    status, data, headers = BAD_BODIES[name]
    error_of(acted.post(CHAT, data, headers=headers), status)
    assert (
        acted.post(CHAT, BODY, headers={"content-type": "application/json; charset=UTF-8"}).status_code == 200
    )


def test_http_unknown_routes_and_methods(acted):
    for method, path, status in (
        ("GET", "/nothing", 404), ("GET", CHAT, 405), ("PUT", CHAT, 405), ("OPTIONS", CHAT, 405),
        ("DELETE", "/v1/models", 405), ("POST", "/health", 405), ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/other", 404), ("POST", CHAT + "/", 404), ("GET", "/V1/models", 404),
    ):  # fmt: skip
        error_of(acted.client.request(method, path), status)
    assert acted.client.head(CHAT).status_code == 405
    assert "POST" in acted.client.get(CHAT).headers["allow"]
    assert acted.client.get("/v1/models/tiny").json()["max_model_len"] == 8192


def test_http_a_connection_goes_on_after_an_error(acted):
    with httpx.Client(base_url=acted.url) as client:
        for _ in range(3):
            error_of(client.post(CHAT, content=b"{}", headers={"content-type": "application/json"}), 400)
            assert client.get("/health").status_code == 200
    with acted.connect() as connection:
        connection.sendall(head(CHAT, 2) + b"{}" + head("/health", None, "Connection: close", method="GET"))
        data = b""
        while piece := connection.recv(1 << 16):
            data += piece
        assert data.count(b"HTTP/1.1 400") == data.count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "steps", [[30.0], [70, 30.0], [70, 71, 0.2, 72, 30.0]], ids=["queued", "first", "later"]
)
def test_http_a_client_that_leaves_is_forgotten(acted, steps, is_stream):
    acted.engine.script = lambda ids, sampling: steps
    before = acted.metric("disconnect_aborts_total")
    body = json.dumps(json.loads(BODY) | {"max_tokens": 99, "stream": is_stream, "n": 2}).encode()
    with acted.connect() as connection:
        connection.sendall(head(CHAT, len(body)) + body)
        until(lambda: acted.engine.num_open == 2)
        time.sleep(0.1)
    until(acted.idle)
    until(lambda: acted.metric("disconnect_aborts_total") == before + 1)


def test_http_a_client_that_leaves_at_the_last_chunk(acted):
    body = json.dumps(json.loads(BODY) | {"stream": True}).encode()
    with acted.connect() as connection:
        connection.sendall(head(CHAT, len(body)) + body)
        data = b""
        while b'finish_reason":"stop' not in data:
            data += connection.recv(1 << 16)
    until(acted.idle)


def test_http_a_slow_reader_is_cut_off_and_others_are_not(acted):
    long = Output((70,), "x" * 2000)
    acted.engine.script = lambda ids, sampling: [long] * 40_000 if sampling.seed == 1 else [70, 1]
    body = json.dumps({"prompt": "a", "max_tokens": 8000, "stream": True, "seed": 1}).encode()
    before = acted.metric("slow_reader_aborts_total")
    with contextlib.closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", acted.port))
        connection.sendall(head("/v1/completions", len(body)) + body)
        until(lambda: acted.engine.num_open == 1)
        assert acted.complete(seed=2).status_code == 200
        until(lambda: acted.metric("slow_reader_aborts_total") == before + 1, 60)
        until(acted.idle)
        connection.settimeout(10)
        received = b""
        try:
            while piece := connection.recv(1 << 16):
                received += piece
        except ConnectionResetError:
            pass
        assert b"[DONE]" not in received and len(received) < 40_000 * 2000


def test_http_a_thousand_connections(acted):
    connections = [socket.create_connection(("127.0.0.1", acted.port), timeout=30) for _ in range(1000)]
    try:
        for connection in connections[::10]:
            connection.sendall(head("/health", None, method="GET"))
        for connection in connections[::10]:
            assert answer(connection)[0] == 200
    finally:
        for connection in connections:
            connection.close()
    assert acted.client.get("/health").status_code == 200


def test_http_too_many_requests_are_told_when_to_come_again():
    limits = served.dataclasses.replace(served.LIMITS, requests=8)
    server = served.Served(served.acted_model(), limits=limits)
    try:
        server.engine.script = lambda ids, sampling: [0.3, 70, 1]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda _: server.complete(), range(32)))
        statuses = {response.status_code for response in found}
        assert statuses == {200, 503}
        assert all(response.headers["retry-after"] for response in found if response.status_code == 503)
        until(server.idle)
    finally:
        server.close()


def test_http_a_full_queue_is_told_when_to_come_again(acted):
    acted.engine.script = lambda ids, sampling: [served.EngineBusy("full")]
    for fields in ({}, {"stream": True}, {"n": 3}):
        response = acted.chat(**fields)
        assert error_of(response, 429)["code"] == "busy" and response.headers["retry-after"] == "1"
    # Waiting prompts count as well: a second one that does not fit is refused, not kept.
    acted.engine.script = lambda ids, sampling: [0.5, 70, 1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        long = [70] * 8000
        found = list(pool.map(lambda _: acted.complete(long, n=2).status_code, range(4)))
    assert sorted(set(found)) == [200, 429]


def test_http_nothing_is_served_while_loading_or_draining():
    server = served.Served(None)
    try:
        for state in ("loading", "draining"):
            server.service.state = state
            assert httpx.get(server.url + "/health").status_code == 200
            ready = httpx.get(server.url + "/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, state)
            for response in (server.chat(), server.complete(), httpx.get(server.url + "/v1/models")):
                assert error_of(response, 503)["code"] == state and response.headers["retry-after"]
        assert httpx.get(server.url + "/version").json()["version"]
    finally:
        server.close()


def test_http_an_engine_that_failed_is_said_to_have(acted):
    acted.engine.failed = True
    try:
        assert acted.client.get("/health").status_code == 503
        assert acted.client.get("/ready").json() == {"status": "failed"}
        assert error_of(acted.chat(), 503)["code"] == "failed"
    finally:
        acted.engine.failed = False


def test_http_an_answer_that_fails_after_its_first_byte_ends_with_an_error(acted):
    acted.engine.script = lambda ids, sampling: [
        70,
        71,
        Output(finish_reason="error", error="/secret/path broke"),
    ]
    response = acted.chat(stream=True)
    assert response.status_code == 200 and not response.text.endswith("[DONE]\n\n")
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_error" and "secret" not in response.text
    assert error_of(acted.chat(), 500)["code"] == "engine_error"


def test_http_unknown_models(acted):
    for name in ("other", "", "tiny ", "../tiny"):
        assert error_of(acted.chat(model=name), 404)["code"] == "model_not_found"
        assert error_of(acted.complete(model=name), 404)["param"] == "model"
    assert acted.chat(model="tiny").status_code == 200


def test_http_sixteen_choices_in_one_stream(acted):
    acted.engine.say("wörld 🙂")
    chunks = events_of(acted.chat(stream=True, n=16).text)
    texts = dict.fromkeys(range(16), "")
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == dict.fromkeys(range(16), "wörld 🙂")
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    first = [chunk["choices"][0]["index"] for chunk in chunks[:40]]
    assert first != sorted(first), "the choices take turns"


def test_http_every_event_is_whole_text(acted):
    acted.engine.say("🙂 你好" * 5)
    with httpx.stream(
        "POST", acted.url + "/v1/completions", json={"prompt": "a", "stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert (
            response.headers["cache-control"] == "no-store" and response.headers["x-accel-buffering"] == "no"
        )
        for piece in response.iter_raw():
            piece.decode()
    # A stop text that begins inside a character of several tokens.
    answer = acted.chat(stop=["好"], max_tokens=99).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("🙂 你", "stop")


def test_http_lengths_of_answers(acted):
    acted.engine.say("hello " * 9000)
    prompt = [70] * 8000
    assert error_of(acted.chat(max_tokens=0), 400)["param"] == "max_tokens"
    assert acted.complete(prompt, max_tokens=0).json()["choices"][0]["text"] == ""
    for most in (1, 192):
        answer = acted.complete(prompt, max_tokens=most).json()
        assert (
            answer["usage"]["completion_tokens"] == most and answer["choices"][0]["finish_reason"] == "length"
        )
    error = error_of(acted.complete(prompt, max_tokens=193), 400)
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("8000", "193", "8192"))


def test_http_silent_streams_get_comments():
    limits = served.dataclasses.replace(served.LIMITS, event_seconds=0.05)
    server = served.Served(served.acted_model(), limits=limits)
    try:
        server.engine.script = lambda ids, sampling: [0.3, 70, 0.3, 1]
        text = server.chat(stream=True).text
        assert text.startswith(": keep-alive\n\n") and text.count(": keep-alive") >= 4
        assert events_of(text)[-1]["choices"][0]["finish_reason"] == "stop"
    finally:
        server.close()


def test_http_requests_have_deadlines():
    for name, script, code in (
        ("queue_seconds", [9.0, 70], "queue_timeout"), ("request_seconds", [70, 71, 9.0, 72], "timeout"),
    ):  # fmt: skip
        limits = served.dataclasses.replace(served.LIMITS, **{name: 0.2})
        server = served.Served(served.acted_model(), limits=limits)
        try:
            server.engine.script = lambda ids, sampling: script  # noqa: B023
            response = server.chat()
            assert error_of(response, response.status_code)["code"] == code
            assert response.status_code in (503, 504)
            until(server.idle)
        finally:
            server.close()
