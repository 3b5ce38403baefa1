"""The deliberate faults fit the tree as it is, once each, however its lines are broken."""

import ast
import functools
import re
import textwrap

import pytest

from experiments.kernel_faults import ROOT, Fault, read_faults

FAULTS = read_faults()
FAMILIES = tuple(dict.fromkeys(fault.family for fault in FAULTS))


def text_of(fault):
    return (ROOT / "pallas_kernels" / fault.family / fault.file).read_text()


@functools.cache
def formatted_anew(text):
    """The same program: one line a statement, other parentheses, comments only before top-level functions."""
    return re.sub("^(?=def )", "# a comment\n\n", ast.unparse(ast.parse(text)), flags=re.MULTILINE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fault_applies_however_the_file_is_formatted(family):
    faults = [fault for fault in FAULTS if fault.family == family]
    assert len(faults) >= 3
    assert len({fault.name for fault in faults}) == len(faults)
    for fault in faults:
        text = text_of(fault)
        faulty = fault.applied(text)
        assert faulty != ast.unparse(ast.parse(text)), fault
        other = formatted_anew(text)
        assert "# a comment" in other and other not in (text, ast.unparse(ast.parse(text)))
        assert fault.applied(other) == faulty, fault
    assert (ROOT / f"tests/kernels/test_{family}.py").exists()


SOURCE = textwrap.dedent(
    """
    def outer(x, y=1 + 2):
        a = x + 1
        b = x + 1

        @when(x == 0)
        def _():
            copy(a, b).wait()

        @loop(x + 2)
        def inner(i):
            for c in range(i):
                copy(c, a).wait()
                use(c)
            return (i, 0)

        return inner(a)

    class Tile:
        def scale(self):
            return self.scales[0]
    """
)


def faulty(function, old, new):
    return Fault("family", "name", "op.py", function, old, new).applied(SOURCE)


@pytest.mark.parametrize(
    ("function", "old", "new", "line"),
    [
        ("outer", "copy( a,b ).wait()", "copy(a, b)", "        copy(a, b)\n"),  # in a function called `_`
        ("outer", "x == 0", "x >= 0", "    @when(x >= 0)\n"),  # decorators are of the function around
        ("outer", "x + 2", "x", "    @loop(x)\n"),
        ("", "1 + 2", "3", "def outer(x, y=3):\n"),  # and defaults
        ("outer.inner", "(i, 0)", "(0, 0)", "        return (0, 0)\n"),
        ("outer.inner", "copy(c, a).wait()", "pass", "            pass\n"),  # a statement for an expression
        ("outer.inner", "copy(c, a).wait()\nuse(c)", "del c", "            del c\n"),
        ("outer", "a = x + 1", "a = x\nprint(a)", "    a = x\n    print(a)\n    b = x + 1\n"),
        ("Tile.scale", "self.scales[0]", "None", "        return None\n"),
    ],
)
def test_a_piece_is_replaced(function, old, new, line):
    got, before = f"{faulty(function, old, new)}\n", f"{ast.unparse(ast.parse(SOURCE))}\n"
    assert line in got and line not in before
    assert len(set(got.splitlines()) ^ set(before.splitlines())) <= 4


@pytest.mark.parametrize(
    ("function", "old", "message"),
    [
        ("outer", "x + 1", "2 times in op.py, outer, not once: 'x . 1'"),
        ("outer", "(i, 0)", "0 times in op.py, outer, not once"),  # in an inner function
        ("", "self.scales[0]", "0 times in op.py, module, not once"),
        ("outer.inner", "x + 2", "0 times"),  # its decorator
        ("other", "x", "other: other is defined 0 times, not once"),
    ],
)
def test_a_piece_must_be_there_once(function, old, message):
    with pytest.raises(ValueError, match=message):
        faulty(function, old, "None")


def test_a_fault_is_applied_and_undone(tmp_path):
    folder = tmp_path / "pallas_kernels" / "family"
    folder.mkdir(parents=True)
    (folder / "op.py").write_text(SOURCE)
    undo = Fault("family", "name", "op.py", "outer", "x == 0", "x == 1").apply(tmp_path)
    assert (folder / "op.py").read_text() == faulty("outer", "x == 0", "x == 1")
    undo()
    assert (folder / "op.py").read_text() == SOURCE
