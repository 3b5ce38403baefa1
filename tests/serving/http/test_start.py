"""`dsv4 serve` as a process: answers while it loads, is ready when it is, ends as it is told to."""

import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from dsv4_jax.command_line.main import run
from dsv4_jax.command_line.memory_plan import GiB, MemoryPlan, check_plan, free_memory, memory_plan
from dsv4_jax.command_line.serve import Progress
from dsv4_jax.config import io as config_io
from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.settings import EngineSettings
from tests.serving.http import served
from tests.serving.http.served import until

ROOT = pathlib.Path(__file__).parents[3]
CANARY = "open({!r}, 'w').write('executed')\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with code in it that must never run."""
    folder = tmp_path_factory.mktemp("served") / "small"
    lm = served.model_with_text()
    lm.save(folder)
    for name in ("modeling_canary.py", "tokenization_canary.py", "sitecustomize.py"):
        (folder / name).write_text(CANARY.format(str(folder / "ran")))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_canary.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_readme(name):
    """The block of the README behind the mark `<!-- ci:NAME -->`, as these tests run it."""
    (text,) = re.findall(
        rf"<!-- ci:{name} -->\n```\w+\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    return text


def what_the_readme_says(url):
    """Runs the README's shell line and its program against a server; only address and name are others."""

    def run_here(*command, text):
        text = text.replace("http://127.0.0.1:8000", url).replace("quickstart", "small")
        done = subprocess.run([*command, text], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    answer = json.loads(run_here("bash", "-c", text=in_readme("curl")))
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["usage"]["completion_tokens"] > 0
    assert run_here(sys.executable, "-c", text=in_readme("clients")).strip()


class Process:
    """The README's `dsv4 serve` with small sizes, running, and the lines it has said."""

    def __init__(self, folder, *more):
        sizes = ("--max-length", "512", "--slots", "2", "--lanes", "1", "--prefix-blocks", "8", "--port", "0")
        program, *words = shlex.split(in_readme("serve"))
        assert program == ".venv/bin/dsv4" and "quickstart" in words
        words = [str(folder) if word == "quickstart" else word for word in words]
        command = (sys.executable, "-m", "dsv4_jax", *words, *sizes, "--dtype", "float32", *more)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def said(self):
        return "".join(self.lines)

    def url(self):
        until(lambda: "listening" in self.said or self.process.poll() is not None, 120)
        found = re.search(r"http://[\d.]+:\d+", self.said)
        assert found, self.said
        return found[0]

    def end(self, seconds=60):
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code


@pytest.fixture
def started():
    processes = []

    def start(*arguments):
        processes.append(Process(*arguments))
        return processes[-1]

    yield start
    for each in processes:
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()
        each._reader.join(10)
        each.process.stderr.close()


def test_from_the_first_byte_to_the_last(folder, started):
    """Loading, serving, draining: one process, whose start is what it costs."""
    server = started(folder, "--drain-seconds", "1")
    url = server.url()
    assert httpx.get(f"{url}/health").status_code == 200
    early = httpx.get(f"{url}/ready")
    assert (early.status_code, early.json()["status"]) == (503, "loading"), early.text
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    refused = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    until(lambda: httpx.get(f"{url}/ready").status_code == 200, 240)
    assert all(
        word in server.said for word in ("memory plan", "loaded", "warm-up 1/2", "warm-up 2/2", "ready")
    )
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "small"
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["usage"]["completion_tokens"] <= 3
    what_the_readme_says(url)

    endless = {"prompt": "hello", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 16}
    short = {"prompt": "hello", "max_tokens": 2, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=endless, timeout=60) as stream:
        pieces = stream.iter_text()
        text = next(pieces)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").json()["status"] == "draining")
        late = httpx.post(f"{url}/v1/completions", json=short)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        text += "".join(pieces)
    last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "draining" and "[DONE]" not in text
    assert server.end() == 0, server.said
    assert not (folder / "ran").exists()


def test_a_signal_while_loading_is_heard(folder, started):
    waiting = started(folder)
    waiting.url()
    waiting.process.send_signal(signal.SIGTERM)
    assert waiting.end() == 0, waiting.said
    assert "stopped while loading" in waiting.said


def test_what_cannot_be_served_is_said_before_anything_is_loaded(folder, tmp_path, capsys):
    for arguments, rule in (
        (("--host", "0.0.0.0"), "--api-key-file"),
        (("--slots", "0"), "num_slots"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--drain-seconds", "-1"), "--drain-seconds"),
        (("--api-key-file", str(tmp_path / "none")), "--api-key-file"),
    ):
        assert run(["serve", str(folder), *arguments]) == 2
        assert rule in capsys.readouterr().err
    assert run(["serve", str(folder), "--mesh", "expert=x"]) == 2
    assert "expert=x" in capsys.readouterr().err
    assert run(["serve", str(folder), "--mesh", "expert=3"]) == 2
    assert capsys.readouterr().err.count("cannot") >= 1
    assert run(["serve", str(tmp_path)]) == 2


def test_a_failed_start_ends_with_its_reason(folder, tmp_path, started):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    server = started(tmp_path)
    assert server.end(120) == 2, server.said
    assert weights.name in server.said


def test_a_plan_over_a_mesh_is_of_one_device(folder):
    config = config_io.read_config_file(folder).config
    sizes = EngineSettings(num_slots=4, max_length=512)
    one, four = (memory_plan(folder, config, sizes, "float32", "plain", mesh) for mesh in (None, "expert=4"))
    assert one.weights / 4 < four.weights < one.weights, "experts are split, other weights are not all"
    assert four.row * 4 <= one.row * 1.01 and four.prefixes == one.prefixes
    assert free_memory("expert=4") <= free_memory() / 3


def test_progress_of_a_start_is_told(monkeypatch):
    service, said = served.Service("m"), []
    progress = Progress(service, said.append)
    progress.begin("loading the checkpoint")
    progress.read("a", 25, 100)
    assert service.doing == "loading the checkpoint: 25%" and said == ["loading the checkpoint"]
    monkeypatch.setattr("dsv4_jax.command_line.serve.LINE_SECONDS", 0.0)
    progress.read("b", 3 << 29, 3 << 30)
    assert re.fullmatch(
        r"loading the checkpoint: 50%, 1\.50 of 3\.00 GiB, [\d.]+ GiB/s, \d+ s left", said[-1]
    )
    progress.begin("warm-up")
    for number, seconds in enumerate((0.1, 12.34)):
        progress.compiled("decode", None)
        assert service.doing == f"warm-up: decode, program {number + 1}"
        progress.compiled("decode", seconds)
    assert said[-2:] == ["warm-up", "compiled decode in 12.3 s (program 2)"]


DEVICES = "--xla_force_host_platform_device_count=2"


@pytest.mark.slow
def test_answers_over_a_mesh_are_those_of_one_device(folder, started, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", DEVICES)
    found = []
    for more in ((), ("--mesh", "expert=2")):
        server = started(folder, *more)
        url = server.url()
        until(lambda url=url: httpx.get(f"{url}/ready").status_code == 200, 560)
        answers = []
        for fields in ({"temperature": 0}, {"seed": 4}, {"seed": 5, "temperature": 0.5}):
            asked = {"prompt": "hello wörld", "max_tokens": 24, "logprobs": 1, **fields}
            choice = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]
            answers.append(choice["text"])
        scored = {"prompt": "hello wörld", "max_tokens": 0, "echo": True, "logprobs": 1}
        lists = httpx.post(f"{url}/v1/completions", json=scored, timeout=60).json()["choices"][0]["logprobs"]
        found.append((answers, lists["token_logprobs"][1:]))
        assert ("expert=2" in server.said) == bool(more), server.said
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0, server.said
    (alone, scores), (spread, others) = found
    assert spread == alone and others == pytest.approx(scores, abs=1e-4)


def test_a_plan_that_does_not_fit_says_what_would():
    settings = EngineSettings(num_slots=8, num_lanes=2)
    plan = MemoryPlan(weights=10 * GiB, row=GiB, num_rows=11, prefixes=5 * GiB, logits=0)
    check_plan(plan, 40 * GiB, settings)
    check_plan(plan, None, settings)
    for free, hint in ((20, "--slots 6 --prefix-blocks 0"), (12, "--max-length"), (9, "weights alone")):
        with pytest.raises(ProblemsError, match=hint):
            check_plan(plan, free * GiB, settings)


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch, folder, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["serve", str(folder)]) == 2
    assert "pip install 'dsv4_jax[serve]'" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        run(["serve", "--help"])
    assert "dsv4 serve quickstart" in capsys.readouterr().out
