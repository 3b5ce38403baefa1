"""Pictures of plans: every one is drawn, and what they show is what the plan holds."""

import matplotlib.image
import pytest

from dsv4_jax.config import v4_flash
from dsv4_jax.planning import plots
from dsv4_jax.planning.job import Job
from dsv4_jax.planning.plan import plan
from dsv4_jax.planning.slices import Slice


@pytest.fixture(scope="module")
def made():
    return plan(Job(v4_flash(), Slice("v6e", (4, 8)), "decode", 64, 65536, "expert=16,tensor=2"))


def test_bars_add_up_to_what_is_held(made):
    (parts,) = plots.memory_bars(made).values()
    assert sum(parts.values()) == pytest.approx(made.held.total / 2**30)


def test_no_part_of_a_step_is_above_the_roof(made):
    points = plots.roofline_points(made)
    assert {"experts", "attention and indexer", "the whole step"} <= set(points)
    chip = made.job.slice.chip
    whole = points.pop("the whole step")
    assert sum(flops for flops, _ in points.values()) == pytest.approx(whole[0])
    assert chip.seconds(*whole) >= made.time.floors[made.time.bound] * (1 - 1e-9)


def test_rows_end_where_the_largest_batch_is(made):
    rows = [each.job.batch for each in plots.over_rows(made)]
    assert rows == [2**n for n in range(len(rows))]
    assert rows[-1] <= made.largest_batch < 2 * rows[-1]


def test_lines_of_caches_end_where_the_report_says(made):
    """Report, section 1: of V3.2's bytes 7 %, of a plain cache's 2 %, at a million tokens."""
    lines = {name: sizes[-1] for name, sizes in plots.cache_lines(made.job, [2**20]).items()}
    ours = lines["this model, fp8+mxfp4"]
    assert ours / lines["DeepSeek-V3.2, fp8"] == pytest.approx(0.073, abs=0.003)
    assert ours / lines["GQA, 8 heads of 128, bf16"] == pytest.approx(0.02, abs=0.001)


def test_pictures_are_written(made, tmp_path):
    wanted = ["hbm", "roofline", "rows", "context"]
    assert [path.stem for path in plots.drawn(made, tmp_path / "there")] == wanted
    for name in wanted:
        pixels = matplotlib.image.imread(tmp_path / "there" / f"{name}.png")
        assert pixels.shape == (540, 960, 4) and pixels.std() > 0.05
