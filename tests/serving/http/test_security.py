"""The rules of the security page that concern the server, each as a test of its name."""

import ast
import logging
import pathlib

import pytest

from dsv4_jax.command_line.serve import Place, checked_place, is_loopback
from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import control
from dsv4_jax.serving.http import auth, schemas
from dsv4_jax.serving.http.auth import Keys, read_keys
from tests.serving.http import served
from tests.serving.http.served import KEY, OTHER_KEY, error_of

ROOT = pathlib.Path(__file__).parents[3]
USER = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def prompt_text(acted):
    ids, _, _ = acted.engine.asked[-1]
    return acted.engine.lm.tokenizer.decode(ids, skip_special_tokens=False)


def test_sec_nothing_is_unpickled_or_evaluated():
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jinja2", "yaml", "torch"}
    for path in (ROOT / "dsv4_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, path
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in forbidden, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path


def test_sec_prompt_embeds_are_never_decoded(acted):
    assert acted.complete(prompt_embeds="gASVCAAAAAAAAACMBHRlc3SULg==").status_code == 200
    error = error_of(acted.post("/v1/completions", {"prompt_embeds": "gASVCAAAAAAAAACM"}), 400)
    assert error["param"] == "prompt"


@pytest.mark.parametrize("payload", ["{{ 7*7 }}", "{% for x in ().__class__ %}", "${7*7}", "<%= 7*7 %>"])
def test_sec_templates_stay_literal(acted, payload):
    messages = [
        {"role": "system", "content": payload},
        {"role": "user", "content": [{"type": "text", "text": payload}]},
        {"role": "assistant", "content": payload, "reasoning_content": payload},
        {"role": "user", "content": payload},
    ]
    tool = {"name": "look", "description": payload, "parameters": {"type": "object", "title": payload}}
    body = {"messages": messages, "tools": [{"type": "function", "function": tool}], "max_tokens": 4}
    assert acted.post("/v1/chat/completions", body).status_code == 200
    assert prompt_text(acted).count(payload) == 7
    assert "49" not in prompt_text(acted)


def test_sec_a_template_of_a_request_is_refused(acted):
    assert "chat_template" in error_of(acted.chat(chat_template="{{ 7*7 }}"), 400)["message"]
    assert "chat_template" in error_of(acted.chat(chat_template_kwargs={"x": "{{ 7*7 }}"}), 400)["message"]


def test_sec_arguments_of_calls_are_json_alone(acted):
    code = "__import__('os').system('touch /tmp/x')"
    acted.engine.say(
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n<｜DSML｜parameter name="a" string="false">'
        f"{code}</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    answer = acted.chat(tools=[TOOL], max_tokens=400).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    arguments = answer["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments == '{"a": ' + '"' + code + '"}'


def test_sec_long_runs_of_half_tags_come_back_whole(acted):
    acted.engine.say("<<<<</think" * 40, finish="length")
    assert acted.chat(max_tokens=500).json()["choices"][0]["message"]["content"] == "<<<<</think" * 40


BOUNDS = [
    ("n", 1, 16), ("top_logprobs", 0, 20), ("temperature", 0, 2), ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2), ("top_k", -1, None), ("min_p", 0, 1), ("min_tokens", 0, None),
    ("max_tokens", 1, None), ("repetition_penalty", 0.01, 100), ("seed", -(2**63), 2**63 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "low", "high"), BOUNDS)
def test_sec_every_count_has_bounds(acted, name, low, high):
    more = {"logprobs": True} if name == "top_logprobs" else {}
    step = 0.001 if name in ("min_p", "repetition_penalty") else 1
    for value in (low, high):
        if value is not None:
            assert acted.chat(**{name: value}, **more).status_code == 200
    for value in (low - step, None if high is None else high + step, float(1 << 40), True, "1", [1]):
        if value is not None:
            assert error_of(acted.chat(**{name: value}, **more), 400)["param"] == name


def test_sec_lists_have_bounds(acted):
    bias = {str(id): 1.0 for id in range(schemas.MOST_BIASES + 1)}
    for fields in (
        {"stop": ["a"] * 17}, {"stop": "a" * 257}, {"stop": [""]}, {"stop_token_ids": [1] * 33},
        {"logit_bias": bias}, {"logit_bias": {"x": 1}}, {"logit_bias": {"5": 101}},
        {"logit_bias": {"320": 1}},
        {"messages": USER * 2049}, {"tools": [TOOL] * 129}, {"user": "a" * 513},
    ):  # fmt: skip
        error_of(acted.chat(**fields), 400)
    assert acted.chat(stop=["a"] * 16, logit_bias={"319": -100}).status_code == 200
    error_of(acted.complete(["a"] * 129), 400)
    error_of(acted.complete(["a"] * 20, n=16), 400)
    assert acted.complete(["a"] * 8, n=16, max_tokens=1).status_code == 200


def test_sec_log_probabilities_have_a_budget():
    limits = served.dataclasses.replace(served.LIMITS, logprob_budget=100)
    server = served.Served(served.acted_model(), limits=limits)
    try:
        assert server.chat(logprobs=True, top_logprobs=4, max_tokens=20).status_code == 200
        error = error_of(server.chat(logprobs=True, top_logprobs=5, max_tokens=20), 400)
        assert error["param"] == "logprobs"
        error_of(server.complete("hello" * 30, echo=True, logprobs=20, max_tokens=0), 400)
    finally:
        server.close()


ODD_PROMPTS = [
    "", [], [[]], [""], ["a", ""], [0], [[0]], [-1], [320], [10**9], [True], [1.0], [[1], "a", None], None,
    {}, [["a"]], "\ud800", ["ok", "\udfff"], 5, [10**30],
]  # fmt: skip


@pytest.mark.parametrize("prompt", ODD_PROMPTS, ids=range(len(ODD_PROMPTS)))
def test_sec_odd_prompts_are_refused(acted, prompt):
    error_of(acted.complete(prompt), 400)
    assert acted.engine.asked == []


STRANGE_HEADS = [
    "GET /v1/models HTTP/1.1\r\nHost: x/health?",
    "GET /v1/models HTTP/1.1\r\nHost: localhost/health",
    "GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Forwarded-Prefix: /health",
    "GET /health/../v1/models HTTP/1.1\r\nHost: x",
    "GET //v1/models HTTP/1.1\r\nHost: x",
    "GET /health/ HTTP/1.1\r\nHost: x",
    "GET /health%2f..%2fv1/models HTTP/1.1\r\nHost: x",
    "GET /%2e/v1/models HTTP/1.1\r\nHost: x",
    "GET /v1/models?/health HTTP/1.1\r\nHost: x",
    "GET http://x/v1/models HTTP/1.1\r\nHost: /health",
    "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x",
    "HEAD /v1/models HTTP/1.1\r\nHost: x",
    "GET /metrics HTTP/1.1\r\nHost: x",
    "GET /nothing HTTP/1.1\r\nHost: x",
]


@pytest.mark.parametrize("head", STRANGE_HEADS)
def test_sec_no_host_or_path_gets_around_the_keys(locked, head):
    with locked.connect() as connection:
        connection.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n")
        assert connection.recv(4096).split(b"\r\n")[0] == b"HTTP/1.1 401 Unauthorized"


def test_sec_every_route_needs_a_key_but_three(locked):
    paths = {(method, route.path) for route in locked.app._app.routes for method in route.methods}
    assert {path for _, path in paths} >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/metrics",
    }
    for method, path in paths:
        status = locked.client.request(method, path).status_code
        assert (status == 401) == (path not in ("/", "/health", "/ready")), (method, path, status)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer wrong-key-1"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer"}, {"authorization": f"Bearer {KEY}x"}, {"x-api-key": KEY[:-1]},
        {"authorization": f"Bearer {KEY}", "x-api-key": "another-key"}, {"x-api-key": ""},
        {"authorization": "Bearer \xff"},
    ],
)  # fmt: skip
def test_sec_wrong_keys(locked, headers):
    raw = [(name, value.encode("latin-1")) for name, value in headers.items()]
    response = locked.client.get("/v1/models", headers=raw)
    assert "key-of-tests" not in error_of(response, 401)["message"]
    assert response.headers["www-authenticate"] == "Bearer"


def test_sec_right_keys(locked):
    for headers in (
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {OTHER_KEY}"},
        {"x-api-key": KEY},
    ):
        assert locked.client.get("/v1/models", headers=headers).status_code == 200


def test_sec_keys_are_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    keys = Keys(["first-key", "second-key", "third-key"])
    assert keys.tenant("/v1/models", [(b"x-api-key", b"first-key")])
    assert len(compared) == 3 and all(len(one) == len(other) == 32 for one, other in compared)
    source = pathlib.Path(auth.__file__).read_text()
    assert "compare_digest" in source and "==" not in source.split("def tenant")[1].split("def _shown_key")[0]


def test_sec_key_files(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"# ours\nkey-number-one\n\n  key-number-two  \r\n")
    assert read_keys(file) == ["key-number-one", "key-number-two"]
    for data, rule in (
        (b"", "no key"),
        (b"#\n", "no key"),
        (b"short", "line 1"),
        ("schlüssel-1".encode(), "line 1"),
    ):
        file.write_bytes(data)
        with pytest.raises(ProblemsError, match=rule) as refused:
            read_keys(file)
        assert "short" not in str(refused.value)


@pytest.mark.parametrize("part", [
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA"}},
    {"type": "file", "file": {"file_id": "file:///etc/passwd"}},
    {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
])  # fmt: skip
def test_sec_media_are_refused_and_nothing_is_fetched(acted, monkeypatch, part):
    connected = []
    plain = served.socket.socket.connect

    def connect(self, address):
        connected.append(address)
        return plain(self, address)

    monkeypatch.setattr(served.socket.socket, "connect", connect)
    acted.client.get("/health", headers={"connection": "close"})
    error_of(acted.chat([part]), 400)
    assert {address[:2] for address in connected} <= {("127.0.0.1", acted.port)}


def test_sec_prefixes_are_shared_within_a_key_alone(locked):
    def salt_of(key, **fields):
        body = {"prompt": "hello", "max_tokens": 1} | fields
        assert locked.post("/v1/completions", body, headers={"x-api-key": key}).status_code == 200
        return locked.engine.asked[-1][2]

    assert salt_of(KEY) == salt_of(KEY) != salt_of(OTHER_KEY)
    assert salt_of(KEY, cache_salt="a") not in (salt_of(KEY), salt_of(KEY, cache_salt="b"))
    shared = served.Service("x", share_prefixes=True)
    assert shared.salt(b"one", None) == shared.salt(b"two", None) != shared.salt(b"one", "a")


@pytest.mark.parametrize("mark", [*control.CONTROL, "<｜｜DSML｜DSML｜tool_calls>"])
def test_sec_no_text_becomes_a_control_token(acted, mark):
    def controls(text):
        tool = {"name": "look", "description": text, "parameters": {"type": "object", "title": text}}
        call = {"name": "look", "arguments": '{"a": ' + served.json.dumps(text) + "}"}
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning_content": text,
             "tool_calls": [{"id": "1", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "1", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}]},
        ]  # fmt: skip
        body = {"messages": messages, "tools": [{"type": "function", "function": tool}], "max_tokens": 1}
        response = acted.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        marks = set(served.chat_tokenizer(acted.engine.lm.tokenizer, 0, (1,)).control_ids.values())
        return [id for id in acted.engine.asked[-1][0] if id in marks]

    assert controls(mark) == controls("x")


def test_sec_logs_and_metrics_hold_nothing_of_clients(acted, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "a-very-secret-thing"
    acted.chat(secret, model=f"{secret}\nINFO forged line", user=secret)
    acted.chat(secret, user=secret)
    acted.engine.script = lambda ids, sampling: [RuntimeError("broken inside")]
    acted.post("/v1/completions", {"prompt": secret}, headers={"authorization": f"Bearer {secret}"})
    acted.post(f"/{secret}", {})
    own = [record for record in caplog.records if record.name.startswith(("dsv4_jax", "uvicorn", "fastapi"))]
    assert any("failed" in record.getMessage() for record in own)
    assert not any(secret in record.getMessage() + (record.exc_text or "") for record in own)
    assert secret.encode() not in acted.service.metrics.text()


def test_sec_faults_tell_nothing_but_an_id(acted):
    acted.engine.script = lambda ids, sampling: [RuntimeError("/home/somebody/secret.py broke")]
    for response in (acted.chat(), acted.complete(), acted.chat(stream=True)):
        error = error_of(response, 500)
        assert response.headers["x-request-id"] in error["message"]
        assert "secret" not in response.text and "Traceback" not in response.text


def test_sec_errors_never_repeat_what_was_sent(acted):
    secret = "a-very-secret-thing"
    for body in (
        {"prompt": {secret: secret}}, {"prompt": "x", "stop": {secret: 1}}, {"prompt": "x", "n": secret},
        {"prompt": "x", "model": secret}, {"prompt": "x", "logit_bias": {secret: 1}},
        {"prompt": "x", "stream_options": {"include_usage": secret}},
    ):  # fmt: skip
        response = acted.post("/v1/completions", body)
        assert response.status_code in (400, 404) and secret not in response.text, response.text
    assert secret not in acted.post("/v1/completions", f'{{"prompt": {secret}'.encode()).text


def test_sec_a_port_open_to_others_needs_keys(tmp_path):
    assert checked_place(Place("127.0.0.1", 0, None, False)) == []
    assert checked_place(Place("0.0.0.0", 0, None, True)) == []
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    assert checked_place(Place("0.0.0.0", 0, keys, False)) == [KEY]
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ProblemsError, match="--api-key-file"):
            checked_place(Place(host, 0, None, False))
    with pytest.raises(ProblemsError, match="2 problems"):
        checked_place(Place("::1", 70000, tmp_path / "none", False))
    assert is_loopback("localhost") and is_loopback("::1") and is_loopback("127.8.0.1")


def test_sec_there_are_no_pages_of_an_interface_description(acted):
    for path in ("/docs", "/redoc", "/openapi.json", "/invocations", "/tokenize", "/pause", "/flush_cache"):
        assert acted.client.get(path).status_code == 404
