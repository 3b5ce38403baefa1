"""Whatever is typed, whatever the folder holds, wherever it runs: output, or one refusal and exit code 2.

Never a traceback, never a hang. In one process where that is possible; the environments need their own.
"""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from dsv4_jax import config
from dsv4_jax.command_line import main as cli
from dsv4_jax.config import io as config_io

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = config.tiny(4)
SECONDS = 20  # far more than any of these may take, far less than a hang


@contextlib.contextmanager
def within(seconds: int):
    """Ends what waits for ever, also inside a system call."""

    def too_long(*_):
        raise TimeoutError(f"no answer within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ended(capsys, *arguments: str) -> tuple[int, str, str]:
    """Runs a command line; checks what must hold of every ending."""
    with within(SECONDS):
        try:
            code = cli.run(arguments)
        except SystemExit as left:  # the parser of arguments, for wrong usage and --help
            code = left.code
    out, err = capsys.readouterr()
    assert code in (0, 2), (code, err)
    assert "Traceback" not in err and "a fault of this program" not in err, err
    assert "no answer within" not in err, err
    if code == 2:
        assert err.strip() or "usage" in out or "rror" in out, out
    return code, out, err


def write_config(folder: pathlib.Path, **changes: object) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_io.official_config_dict(CONFIG) | changes))
    return folder


def only_config(folder):
    return write_config(folder)


def garbage_weights(folder):
    (write_config(folder) / "model.safetensors").write_bytes(b"\x07" * 100)
    return folder


def garbage_config(folder):
    folder.mkdir()
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    return folder


def list_config(folder):
    folder.mkdir()
    (folder / "config.json").write_text("[1, 2]")
    return folder


def deep_config(folder):
    folder.mkdir()
    (folder / "config.json").write_text("[" * 100_000)
    return folder


def pipe_config(folder):
    folder.mkdir()
    os.mkfifo(folder / "config.json")
    return folder


def endless_config(folder):
    folder.mkdir()
    (folder / "config.json").symlink_to("/dev/zero")
    return folder


def pipe_weights(folder):
    os.mkfifo(write_config(folder) / "model.safetensors")
    return folder


def pipe_tokenizer(folder):
    os.mkfifo(garbage_weights(folder) / "tokenizer.json")
    return folder


def huge_config(folder):
    return write_config(folder, n_routed_experts=3_000_000)


def many_layers(folder):
    return write_config(folder, num_hidden_layers=10**9, compress_ratios=[0] * 4)


def folder_as_config(folder):
    (folder / "config.json").mkdir(parents=True)
    return folder


def cycle(folder):
    folder.symlink_to(folder)
    return folder


def dangling(folder):
    folder.symlink_to("nowhere")
    return folder


def pipe(folder):
    os.mkfifo(folder)
    return folder


def empty(folder):
    folder.mkdir()
    return folder


def a_file(folder):
    folder.write_text("not a folder")
    return folder


def below_a_file(folder):
    folder.write_text("not a folder")
    return folder / "below"


FOLDERS = [
    only_config, garbage_weights, garbage_config, list_config, deep_config, pipe_config, endless_config,
    pipe_weights, pipe_tokenizer, huge_config, many_layers, folder_as_config, cycle, dangling, pipe, empty,
    a_file, below_a_file,
]  # fmt: skip
NAMES = ["", ".", "/dev/zero", "/dev/null", "/proc/self/mem", "a\0b", "x" * 5000, "\udcff", "é/世界",
         "-", "--", "hf://", "hf://a", "hf://a/b", "hf://a/b@../x", "file:///etc/passwd"]  # fmt: skip


def commands_on(checkpoint: str, destination: pathlib.Path) -> list[list[str]]:
    return [
        ["inspect", checkpoint],
        ["verify", checkpoint],
        ["generate", checkpoint, "--ids", "0"],
        ["convert", checkpoint, str(destination)],
    ]


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """These tests keep away from the user's own."""
    from dsv4_jax.command_line import compilation_cache

    def nowhere(*_):
        raise compilation_cache.NoCache("a test")

    monkeypatch.setattr(compilation_cache, "enable", nowhere)


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_folders(capsys, tmp_path, make):
    folder = make(tmp_path / "checkpoint")
    for arguments in commands_on(str(folder), tmp_path / "out"):
        code, _, _ = ended(capsys, *arguments)
        # A configuration alone can be inspected; nothing else here is of any use.
        assert code == 2 or arguments[0] == "inspect", arguments
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_names(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for arguments in commands_on(name, tmp_path / "out"):
        assert ended(capsys, *arguments)[0] == 2, arguments


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "/dev/null", "/proc/nothing/here", "\udcff\0"])
def test_destinations(capsys, tmp_path, name):
    folder = garbage_weights(tmp_path / "checkpoint")
    assert ended(capsys, "convert", str(folder), name)[0] == 2


NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "",
    "abc",
    "0x10",
    "9" * 5000,
    "１",
    "1_0",
    "\udcff",
    "--",
    "1.5",
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: ascii(number)[:12])
@pytest.mark.parametrize(
    "flag", ["--temperature", "--top-p", "--max-new-tokens", "--seed", "--ids", "--minutes", "--context"]
)
def test_numbers(capsys, tmp_path, flag, number):
    """Refused by name before anything else is looked at; what is a number after all meets a missing one."""
    if flag == "--minutes":
        folder = a_file(tmp_path / "out")
        arguments = ["quickstart", "--out", str(folder), flag, number]
    elif flag == "--context":
        arguments = ["inspect", str(write_config(tmp_path / "checkpoint")), flag, number]
    else:
        given = [] if flag == "--ids" else ["--ids", "0"]
        arguments = ["generate", str(tmp_path / "missing"), *given, flag, number]
    code, out, err = ended(capsys, *arguments)
    assert code == 2 or flag == "--context", arguments


@pytest.mark.parametrize(
    ("flag", "number", "named"),
    [
        ("--temperature", "nan", "temperature=nan"),
        ("--temperature", "-1", "temperature=-1"),
        ("--top-p", "0", "top_p=0"),
        ("--top-p", "1.01", "top_p=1.01"),
        ("--max-new-tokens", "-1", "--max-new-tokens=-1"),
        ("--seed", "-1", "seed=-1"),
        ("--seed", str(2**63), f"seed={2**63}"),
        ("--seed", "9" * 20, "seed=99999999999999999999"),
        ("--ids", "-5", "[-5]"),
    ],
)
def test_a_number_out_of_range_is_named_before_the_checkpoint_is_looked_at(capsys, flag, number, named):
    given = [] if flag == "--ids" else ["--ids", "0"]
    code, _, err = ended(capsys, "generate", "nowhere", *given, flag, number)
    assert code == 2 and named in err and "nowhere" not in err


def test_all_problems_of_a_request_are_said_at_once(capsys):
    _, _, err = ended(capsys, "generate", "nowhere", "--seed", "-1", "--top-p", "2", "--temperature", "nan")
    assert "4 problems" in err and all(word in err for word in ("seed", "top_p", "temperature", "prompt"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "a prompt", "another"],
        ["generate", "x", "\udcff"],
        ["generate", "x", "p", "--seed", "1", "--seed"],
        ["generate", "x", "p", "--no-such-flag"],
        ["generate", "--", "--help"],
        ["verify"],
        ["verify", "a", "b"],
        ["doctor", "extra"],
        ["convert", "a"],
        ["convert", "a", "b", "--layout", "gguf"],
        ["convert", "a", "b", "--to", "int4"],
        ["quickstart", "--minutes", "nan", "--seed", "-1"],
        ["quickstart", "--minutes", "-1", "--out", ""],
        ["\udcff"],
        ["x" * 100_000],
        [""],
    ],
    ids=lambda arguments: ascii(" ".join(arguments))[:40],
)
def test_usage(capsys, arguments):
    assert ended(capsys, *arguments)[0] == 2


def test_a_fault_of_the_program_is_called_one(capsys, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise TypeError("oops")

    monkeypatch.setattr(config_io, "read_config_file", broken)
    assert cli.run(["inspect", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "a fault of this program, TypeError: oops" in err and "python -X dev" in err


def test_what_an_encoding_lacks_is_replaced(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    monkeypatch.setitem(cli.SUBCOMMANDS, "doctor", lambda: print("thrée 世"))
    assert cli.run(["doctor"]) == 0
    assert printed.getvalue() == b"thr?e ?\n"


# ---- environments: a process each ---------------------------------------------------------------------


def command(
    *arguments: str, shell: str = '"$@"', before=(), **environment: str | None
) -> subprocess.CompletedProcess:
    """Runs `dsv4` in a shell with its streams as `shell` says; a variable that is None is taken away."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT)} | environment
    given = {name: value for name, value in whole.items() if value is not None}
    line = [
        "bash",
        "-c",
        shell,
        "bash",
        *before,
        sys.executable,
        "-m",
        "dsv4_jax.command_line.main",
        *arguments,
    ]
    done = subprocess.run(line, capture_output=True, env=given, timeout=120, cwd="/")
    done.stderr = done.stderr.decode(errors="replace")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    assert "a fault of this program" not in done.stderr, done.stderr
    return done


ENVIRONMENTS = {
    "ascii": (0, dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C", COLUMNS="80")),
    "no_columns": (0, dict(COLUMNS="1", LINES="1", TERM="dumb")),
    "no_stdin": (0, dict(shell='"$@" <&-')),
    "full_disk": (2, dict(shell='"$@" >/dev/full')),
    "closed_stdout": (2, dict(shell='"$@" >&-')),
    "closed_stderr": (0, dict(shell='"$@" 2>&-')),
    "nobody_reads": (141, dict(shell='"$@" | true; exit "${PIPESTATUS[0]}"')),
    "x64": (0, dict(JAX_ENABLE_X64="1")),
}


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments(name):
    code, settings = ENVIRONMENTS[name]
    done = command("inspect", "flash", **settings)
    assert done.returncode == code, (done.returncode, done.stderr)
    if code == 2:
        assert done.stderr.startswith("dsv4: ") and len(done.stderr.splitlines()) <= 2
    elif code == 0:
        assert b"284" in done.stdout


@pytest.mark.parametrize("platform", ["gpuu", "cuda"])
def test_a_platform_that_is_not_there(platform, tmp_path):
    """One sentence from what would compute; doctor lists it as a problem beside the rest."""
    for arguments in (["generate", "nowhere", "--ids", "0"], ["doctor"]):
        done = command(*arguments, JAX_PLATFORMS=platform, HOME=str(tmp_path))
        assert done.returncode == 2
        assert "JAX cannot use its devices" in done.stderr and platform in done.stderr
        assert bool(done.stdout) == (arguments == ["doctor"])


NOBODY = """
import pwd
def nobody(uid):
    raise KeyError(f"uid not found: {uid}")
pwd.getpwuid = nobody
"""


def test_a_user_without_a_home(tmp_path):
    """A container's user often has no entry in passwd; a module that Python imports as it starts acts so."""
    (tmp_path / "sitecustomize.py").write_text(NOBODY)
    done = command("doctor", PYTHONPATH=f"{tmp_path}:{ROOT}", HOME=None, XDG_CACHE_HOME=None)
    assert done.returncode == 0, done.stderr
    assert b"programs are not kept: there is no home directory" in done.stdout


@pytest.mark.parametrize("home", ["/proc", "/dev/null", "/dev/null/x"])
def test_a_home_that_cannot_be_written(home):
    from dsv4_jax.command_line import compilation_cache

    with pytest.raises(compilation_cache.NoCache, match="cannot be written"):
        undone_enable(pathlib.Path(home) / "compiled")
    assert command("doctor", HOME=home, XDG_CACHE_HOME=None).returncode == 0


def undone_enable(directory):
    """The real `enable`, in a module of its own: the fixture above replaced it."""
    import importlib.util

    from dsv4_jax.command_line import compilation_cache

    spec = importlib.util.find_spec("dsv4_jax.command_line.compilation_cache")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    try:
        return fresh.enable(directory)
    except fresh.NoCache as why:
        raise compilation_cache.NoCache(*why.args) from why


COMPILE = """
import sys, pathlib
from dsv4_jax.command_line import compilation_cache, standard_streams
compilation_cache.MIN_COMPILE_SECONDS = 0
compilation_cache.enable(pathlib.Path(sys.argv[1]))
import jax
with standard_streams.prepared():
    print(int(jax.jit(lambda x: (x * 3 + 1).sum())(jax.numpy.arange(5, dtype="int32"))))
"""


def test_a_damaged_cache_of_programs_costs_time_only(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start():
        line = [sys.executable, "-c", COMPILE, str(tmp_path)]
        return subprocess.Popen(
            line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def check(process):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "35\n") and "Traceback" not in err, err
        return err

    for process in [start(), start()]:  # two at once
        assert check(process) == ""
    entries = [path for path in tmp_path.iterdir() if path.name.endswith("-cache")]
    assert entries
    for number, path in enumerate(entries):
        path.write_bytes(b"" if number % 2 else path.read_bytes()[:50])
    assert all(line.startswith("warning: ") for line in check(start()).splitlines())
