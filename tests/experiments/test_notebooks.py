"""The notebooks run from top to bottom, on an untrained model with a layer of each kind."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.tokenizer import train_tokenizer
from tests.conftest import QUICK, exists
from tests.models import all_kinds

FIGURES = {"first_steps": 5, "plan_a_slice": 5}

NOTEBOOKS = Path(__file__).parents[2] / "experiments" / "notebooks"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook") / "model"
    model = LanguageModel.random(all_kinds(vocab_size=300), Policy.of("float32"))
    sources = [path.read_text() for path in sorted(Path(__file__).parents[1].glob("*.py"))]
    model.tokenizer = train_tokenizer(sources, model.config.vocab_size)
    model.save(folder)
    return folder


# The notebook client still asks for an event loop in a way that newer Pythons discourage.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, checkpoint, tmp_path, monkeypatch):
    # As in other tests; the notebook's kernel is a process of its own.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    known = {name: value for name, value in QUICK.items() if exists(name, value)}
    flags = [f"--{name}={str(value).lower()}" for name, value in known.items()]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source += f"\nCHECKPOINT = {str(checkpoint)!r}\nNEW_TOKENS = 3\n"
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(figures) == FIGURES[path.stem]


def test_committed_notebooks_hold_no_outputs():
    for path in NOTEBOOKS.glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert not any(cell.get("outputs") for cell in cells), path
