"""Ring sizes have one home: what asks for them, and what their sizes allow."""

import ast
import pathlib

import pytest

from dsv4_jax.config import tiny
from dsv4_jax.model import cache, geometry
from dsv4_jax.model.geometry import compressor_geometry, window_geometry

MODEL = pathlib.Path(cache.__file__).parent
CONFIG = tiny(4, csa_ratio=4, hca_ratio=6, sliding_window=7)


def calls(name: str) -> set[str]:
    """Files of the model that call a function or method of this name."""
    return {
        path.name
        for path in MODEL.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and name in (getattr(node.func, "id", ""), getattr(node.func, "attr", ""))
    }


def test_who_computes_and_who_asks():
    """Blocks and Surroundings carry the answer: readers and writers of rings do not ask for themselves."""
    assert calls("fits_in_ring") == {"geometry.py", "span.py", "transformer.py"}
    assert calls("compressor_geometry") == calls("window_geometry") == {"cache.py", "transformer.py"}


@pytest.mark.parametrize("max_rewind", [0, 1, 3, 8])
def test_a_ring_holds_what_a_call_looks_back_at(max_rewind):
    csa, hca = (compressor_geometry(CONFIG, kind, max_rewind) for kind in ("csa", "hca"))
    assert csa == geometry.CompressorGeometry(ratio=4, branches=2, slots=8 + max_rewind)
    assert hca == geometry.CompressorGeometry(ratio=6, branches=1, slots=6 + max_rewind)
    for compressor in (csa, hca):
        # The last block's rows, the new one among them, and as many drafts as can be taken back.
        assert compressor.fits_in_ring(1 + max_rewind)
        assert not compressor.fits_in_ring(2 + max_rewind)
    window = window_geometry(CONFIG, max_rewind)
    assert window.slots % geometry.ROWS == 0 and window.slots >= CONFIG.sliding_window - 1 + max_rewind
    assert window.fits_in_ring(window.slots - CONFIG.sliding_window + 1)
    assert not window.fits_in_ring(window.slots - CONFIG.sliding_window + 2)


def test_entries_of_a_capacity():
    csa = compressor_geometry(CONFIG, "csa", 0)
    assert [csa.num_entries(n) for n in (1, 32, 35, 36)] == [8, 8, 8, 16]
