"""Stop texts over the borders of pieces: the same as in the whole text at once."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv4_jax.serving.stop_texts import StopTexts


def run(stops, pieces):
    finder, shown = StopTexts(stops), ""
    for piece in pieces:
        text, found = finder.add(piece)
        shown += text
        if found:
            return shown, True
    return shown + finder.finish(), False


@pytest.mark.parametrize(
    "stops, pieces, wanted",
    [
        (["END"], ["a E", "N", "D b"], ("a ", True)),
        (["END"], ["a EN", "D"], ("a ", True)),
        (["END"], ["a EN", "E"], ("a ENE", False)),
        (["END"], ["a ENEND"], ("a EN", True)),
        (["b", "abc"], ["xab"], ("xa", True)),
        (["\n\n"], ["x\n", "y\n", "\n"], ("x\ny", True)),
        ([], ["x"], ("x", False)),
        (["é"], ["caf", "é!"], ("caf", True)),
    ],
)
def test_examples(stops, pieces, wanted):
    assert run(stops, pieces) == wanted


@settings(deadline=None)
@given(st.data())
def test_one_stop_text_is_found_wherever_the_pieces_end(data):
    stop = data.draw(st.text("ab", min_size=1, max_size=4))
    text = data.draw(st.text("ab", max_size=20))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    at = text.find(stop)
    assert run([stop], pieces) == ((text, False) if at < 0 else (text[:at], True))


@settings(deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.text("abc", max_size=20))
def test_nothing_of_a_stop_text_is_ever_shown(stops, text):
    shown, found = run(stops, list(text))
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert found == any(stop in text for stop in stops)
