"""The import arrows and the things that stay out, read from the syntax trees of all sources."""

import ast
import dataclasses
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RUNTIME = ("dsv4_jax", "sharding", "pallas_kernels")

# package -> the packages of ours it may import
PACKAGE_ARROWS = {
    "experiments": {"experiments", "dsv4_jax", "sharding", "pallas_kernels"},
    "dsv4_jax": {"dsv4_jax", "sharding", "pallas_kernels"},
    "sharding": {"sharding", "pallas_kernels"},
    "pallas_kernels": {"pallas_kernels"},
}

# Rooms of dsv4_jax: longest matching module prefix -> room. Anything else is on top.
ROOMS = {
    "dsv4_jax.errors": "errors",
    "dsv4_jax.reading": "reading",
    "dsv4_jax.config": "config",
    "dsv4_jax.boxes": "parameters",
    "dsv4_jax.parameters": "parameters",
    "dsv4_jax.parameter_shardings": "parameters",
    "dsv4_jax.placing": "parameters",
    "dsv4_jax.refusing": "parameters",
    "dsv4_jax.numerics": "numerics",
    "dsv4_jax.model": "model",
    "dsv4_jax.inference": "inference",
    "dsv4_jax.training": "training",
    "dsv4_jax.checkpoint": "checkpoint",
    "dsv4_jax.arguments": "language_model",
    "dsv4_jax.language_model": "language_model",
    "dsv4_jax.loading": "language_model",
    "dsv4_jax.expert_slots": "language_model",
    "dsv4_jax.serving": "serving",
    "dsv4_jax.inspection": "inspection",
    "dsv4_jax.planning": "planning",
    "dsv4_jax.command_line": "command_line",
    "dsv4_jax.__main__": "command_line",
}
_BELOW_MODEL = {"errors", "config", "parameters", "numerics"}
ROOM_ARROWS = {
    "errors": set(),
    "reading": {"errors"},
    "config": {"errors", "reading"},
    "parameters": {"errors", "config"},
    "numerics": {"errors", "config"},
    "model": _BELOW_MODEL,
    "inference": {*_BELOW_MODEL, "model"},
    "training": {*_BELOW_MODEL, "model", "reading"},
    "checkpoint": {*_BELOW_MODEL, "reading"},
    "language_model": {*_BELOW_MODEL, "model", "inference", "checkpoint"},
    "serving": {*_BELOW_MODEL, "model", "inference", "checkpoint", "language_model", "reading", "training"},
    "inspection": {*_BELOW_MODEL, "model", "checkpoint"},
    "planning": {*_BELOW_MODEL, "model", "checkpoint", "inference", "inspection", "training", "serving"},
    "command_line": {*ROOMS.values()},
    "top": {"training", "language_model", *_BELOW_MODEL},  # the public names
}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "misc", "new", "fast"}
FORBIDDEN_IMPORTS = {
    "torch",
    "transformers",
    "safetensors",
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "jinja2",
    "yaml",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
NO_ENVIRONMENT = ("dsv4_jax.model", "dsv4_jax.numerics", "dsv4_jax.inference", "pallas_kernels")
NO_ENVIRONMENT_READS = {
    "os.environ",
    "os.getenv",
    "os.environb",
    "jax.default_backend",
    "jax.devices",
    "jax.local_devices",
}
IMPORT_OF_DISTRIBUTION = {"orbax-checkpoint": "orbax"}
NEEDS_EXTRA_SERVE = ("dsv4_jax.serving.http", "dsv4_jax.command_line.serve")
MAX_LINES = 450
ONLY_BY_HAND = {  # has never run on a chip: users import the entry themselves
    "pallas_kernels.decode_attention.sparse_core",
    "pallas_kernels.decode_attention.kernel_sparse_core",
    "pallas_kernels.decode_attention.kernel_tpu_fetched",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """One module of ours."""

    module: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def imports(self) -> set[str]:
        """Every module that is imported anywhere in the file, inside functions too."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                start = node.module or ""
                if node.level:
                    parts = self.module.split(".")[: -node.level]
                    start = ".".join([*parts, *([node.module] if node.module else [])])
                # `from package import module` may name a module or a member; both are checked.
                found |= {start} | {f"{start}.{alias.name}" for alias in node.names}
        return found


def sources() -> list[Source]:
    """All modules of the four packages."""
    found = []
    for package in PACKAGE_ARROWS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Source(module, path.read_text()))
    return found


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def room(module: str) -> str:
    """The room of a module of dsv4_jax."""
    fitting = [prefix for prefix in ROOMS if within(module, prefix)]
    return ROOMS[max(fitting, key=len)] if fitting else "top"


def arrow_violations(source: Source, modules: set[str]) -> list[str]:
    """Imports that point the wrong way; `modules` are all modules of ours."""
    package = source.module.split(".")[0]
    wrong = []
    for name in sorted(source.imports()):
        target = name.split(".")[0]
        if target in {*PACKAGE_ARROWS, "tests"} and target not in PACKAGE_ARROWS[package]:
            wrong.append(f"{source.module} imports {name}")
        if package == target == "dsv4_jax" and name in modules and name != "dsv4_jax":
            here, there = room(source.module), room(name)
            if here != there and there not in ROOM_ARROWS[here]:
                wrong.append(f"{source.module} ({here}) imports {name} ({there})")
    return wrong


def content_violations(source: Source) -> list[str]:
    """Things that no runtime module may contain."""
    wrong = [
        f"{source.module} imports {name}"
        for name in sorted(source.imports())
        if name.split(".")[0] in FORBIDDEN_IMPORTS
    ]
    closed = any(within(source.module, prefix) for prefix in NO_ENVIRONMENT)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                wrong.append(f"{source.module}:{node.lineno} calls {node.func.id}")
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code"):
                    wrong.append(f"{source.module}:{node.lineno} passes {keyword.arg}")
        if closed and isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if f"{node.value.id}.{node.attr}" in NO_ENVIRONMENT_READS:
                wrong.append(f"{source.module}:{node.lineno} reads {node.value.id}.{node.attr}")
        if closed and isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in NO_ENVIRONMENT_READS:
                    wrong.append(f"{source.module}:{node.lineno} reads {node.module}.{alias.name}")
    return wrong


SOURCES = sources()
MODULES = {source.module for source in SOURCES}
RUNTIME_SOURCES = [source for source in SOURCES if source.module.split(".")[0] in RUNTIME]


def test_there_is_something_to_check():
    assert {"dsv4_jax.config", "dsv4_jax.command_line.main", "dsv4_jax.config.io"} <= MODULES


def test_import_arrows():
    assert [wrong for source in SOURCES for wrong in arrow_violations(source, MODULES)] == []


def test_nothing_forbidden_at_run_time():
    assert [wrong for source in RUNTIME_SOURCES for wrong in content_violations(source)] == []


def test_nothing_loads_what_has_never_run_on_a_chip():
    """No import of the system or of a family does, not even inside a function."""
    assert ONLY_BY_HAND <= MODULES
    loading = {
        source.module
        for source in RUNTIME_SOURCES
        if source.module not in ONLY_BY_HAND and source.imports() & ONLY_BY_HAND
    }
    assert loading == set()


def test_module_names_say_what_is_inside():
    wrong = [
        module
        for module in MODULES
        if any(part in FORBIDDEN_NAMES or re.fullmatch(r"v\d+", part) for part in module.split("."))
    ]
    assert wrong == []


def test_files_are_short():
    lengths = {source.module: source.text.count("\n") for source in SOURCES}
    assert {module: count for module, count in lengths.items() if count > MAX_LINES} == {}


def test_every_runtime_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = set()
    for requirement in project["dependencies"] + project["optional-dependencies"]["parquet"]:
        name = re.match(r"[\w-]+", requirement)[0]
        declared.add(IMPORT_OF_DISTRIBUTION.get(name, name))
    server = {re.match(r"[\w-]+", each)[0] for each in project["optional-dependencies"]["serve"]}
    ours = {*PACKAGE_ARROWS}
    for source in RUNTIME_SOURCES:
        foreign = {name.split(".")[0] for name in source.imports()}
        foreign -= set(sys.stdlib_module_names) | ours
        extra = server if source.module.startswith(NEEDS_EXTRA_SERVE) else set()
        assert foreign <= declared | extra | {"jaxlib", "__future__"}, source.module


def test_pytest_settings_are_in_one_file():
    for name in ("pytest.ini", "tox.ini", ".pytest.ini"):
        assert not (ROOT / name).exists()
    assert "pytest" not in (ROOT / "setup.cfg").read_text()


# The checks themselves, on sources that break each rule.

WRONG_ARROWS = [
    ("pallas_kernels.sinkhorn.op", "import dsv4_jax.config"),
    ("pallas_kernels.sinkhorn.op", "from sharding import mesh"),
    ("sharding.mesh", "def f():\n    from dsv4_jax.model import norm"),
    ("dsv4_jax.model.norm", "import experiments.bench_cpu"),
    ("dsv4_jax.model.norm", "from tests.parity import oracle"),
    ("dsv4_jax.model.norm", "from dsv4_jax.checkpoint import load"),
    ("dsv4_jax.model.norm", "from ..checkpoint import load"),
    ("dsv4_jax.model.norm", "from dsv4_jax import checkpoint"),
    ("dsv4_jax.numerics.policy", "from dsv4_jax.model import norm"),
    ("dsv4_jax.config", "from dsv4_jax.checkpoint import load"),
    ("dsv4_jax.training.step", "from dsv4_jax.checkpoint import load"),
    ("dsv4_jax.checkpoint.load", "from dsv4_jax.command_line import main"),
    ("dsv4_jax.language_model", "from dsv4_jax.command_line import main"),
]


@pytest.mark.parametrize(("module", "text"), WRONG_ARROWS)
def test_a_wrong_arrow_is_found(module, text):
    known = {
        "dsv4_jax.checkpoint",
        "dsv4_jax.checkpoint.load",
        "dsv4_jax.command_line.main",
        "dsv4_jax.model.norm",
    }
    assert arrow_violations(Source(module, text), known)


def test_right_arrows_are_not_reported():
    known = {"dsv4_jax", "dsv4_jax.numerics.policy", "dsv4_jax.checkpoint.load"}
    for module, text in [
        ("dsv4_jax.model.norm", "from dsv4_jax.numerics import policy\nimport jax, sharding.mesh"),
        ("dsv4_jax.command_line.quickstart", "from dsv4_jax.checkpoint import load"),
        ("sharding.mesh", "import pallas_kernels.chips"),
        ("experiments.run", "import dsv4_jax, sharding, pallas_kernels"),
    ]:
        assert arrow_violations(Source(module, text), known) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("dsv4_jax.command_line.main", "import torch.nn"),
        ("dsv4_jax.command_line.main", "def f():\n    from pickle import loads"),
        ("dsv4_jax.command_line.main", "from jinja2 import Template"),
        ("dsv4_jax.command_line.main", "eval('1')"),
        ("dsv4_jax.command_line.main", "exec(text)"),
        ("dsv4_jax.command_line.main", "numpy.load(path, allow_pickle=True)"),
        ("dsv4_jax.model.norm", "import os\nos.environ['X']"),
        ("dsv4_jax.numerics.policy", "from os import environ"),
        ("pallas_kernels.chips", "import os\nos.getenv('X')"),
        ("pallas_kernels.chips", "import jax\njax.default_backend()"),
    ],
)
def test_forbidden_content_is_found(module, text):
    assert content_violations(Source(module, text))


def test_environment_may_be_read_on_top():
    assert (
        content_violations(Source("dsv4_jax.command_line.main", "import os\nos.environ\nre.compile('x')"))
        == []
    )
