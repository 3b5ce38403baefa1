"""Stop strings over the borders of pieces: what is shown does not depend on how the text is cut."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv4_jax.serving.chat.stops import StopStrings


def run(stops, pieces):
    finder, shown = StopStrings(stops), ""
    for piece in pieces:
        text, found = finder.add(piece)
        shown += text
        if found is not None:
            return shown, found
    return shown + finder.flush(), None


@pytest.mark.parametrize(
    "stops, pieces, wanted",
    [
        (["END"], ["a E", "N", "D b"], ("a ", "END")),
        (["END"], ["a EN", "E"], ("a ENE", None)),
        (["END"], ["a ENEND"], ("a EN", "END")),
        (["bcd", "c"], ["abcde"], ("ab", "c")),  # the one that is complete first
        (["\n\n"], ["x\n", "y\n", "\n"], ("x\ny", "\n\n")),
        ([], ["x"], ("x", None)),
        (["é"], ["caf", "é!"], ("caf", "é")),
    ],
)
def test_examples(stops, pieces, wanted):
    assert run(stops, pieces) == wanted


@settings(deadline=None)
@given(st.data())
def test_any_cut_gives_the_same(data):
    stops = data.draw(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
    text = data.draw(st.text("abc", max_size=20))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, found = run(stops, pieces)
    assert (shown, found) == run(stops, [text]) == run(stops, list(text))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (shown, found) == (text, None)
    else:
        assert len(shown) + len(found) == min(ends) and text.startswith(shown + found)
