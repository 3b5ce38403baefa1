"""The reader of the TPU compiler's dumps, on dumps written by hand; HBM traffic; one real compile."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.config import v4_flash, v4_pro
from experiments import tpu_cycles
from experiments.tpu_case import Kernel
from experiments.tpu_cases import cases
from experiments.tpu_schedule import (
    GUARD,
    SLOTS,
    SMALL,
    Bundles,
    DumpError,
    Jump,
    Span,
    analyse,
    find_spans,
    parse_bundles,
    parse_regions,
    parse_slots,
)
from pallas_kernels.chips import CHIPS

# A grid of four steps whose body has a loop of three trips and a `pl.when`.
POST_RA = """
$region0: #{kernel}
  #allocation1 [shape = 'f32[8,128]{1,0}', space=vmem, size = 0x1000, scoped, tag = 'scratch operand']
  #allocation2 [shape = 's32[1]{0}', space=smem, size = 0x200, scoped]
  $region1: #{kernel} parent=0
    loop: start=0, step=1, limit=6
    $region10: #{kernel} parent=1 // loop_pre_header
    $region11: #{kernel} parent=1 // loop_body
      $region2: #{kernel} parent=11 // pred_check
      $region3: #{kernel} parent=11 // pred_check_branch
        %5 = sbr.rel (%p1_p0) target = $region5
      $region4: #{kernel} parent=11 // pred_region
        loop: start=0, step=2, limit=5
        $region20: #{kernel} parent=4 // loop_pre_header
        $region21: #{kernel} parent=4 // loop_body
        $region23: #{kernel} parent=4 // loop_header_branch
          %6 = sbr.rel (!%p2_p0) target = $region21
        $region24: #{kernel} parent=4 // loop_exit
        #allocation3_spill [shape = 'u32[8,128]{1,0}', space=vmem, size = 0x800, scoped]
        $region30: #{kernel} parent=4 // pred_check_branch
          %7 = sbr.rel (%p3_p0) target = $region32
        $region32: #{kernel} parent=4 // pred_fallthru
      $region5: #{kernel} parent=11 // pred_fallthru
    $region12: #{kernel} parent=1 // loop_header_branch
      %8 = sbr.rel (!%p4_p0) target = $region11
"""

DELAY = 1


def schedule(when_bundles=SMALL):
    """The final bundles of POST_RA with one delay slot, by number; what each one is for is on its right."""
    lines = [
        ("", "nop } /* Start region 1 */"),  # 0: once
        ("LB", "%1 = sphi /* iteration index, stage = 0 */ } /* Start region 11 */"),  # 1: six times
        ("", "%5 = sbr.rel (%p1_p0) target = $region5 }"),  # 2: six times
        ("", "} /* End region 3 */"),  # 3, delay slot: six times
        ("", "%9 = dma.hbm_to_vmem /*vmem=*/%s1 /*\nwindow_bounds: (8, 128)\n */ }"),  # 4: each of four steps
        ("LB", "%v1 = vmatmul.mubr.bf16.gmra.mxu0 %v2 } /* Start region 21 */"),  # 5: 4 x 3
        ("", "%6 = sbr.rel (!%p2_p0) target = $region21 }"),  # 6: 4 x 3
        ("", "%v3 = vadd.f32 %v1, %v2 } /* End region 21 :: End region 23 */"),  # 7, delay slot: 4 x 3
        ("", "%7 = sbr.rel (%p3_p0) target = $region32 }"),  # 8: four times
        ("", "} /* End region 30 */"),  # 9, delay slot: four times
        *[("", "%10 = vst [vmem:[#allocation1] sm:$0xff] %v3 }")] * when_bundles,  # as often as `when` says
        ("PF", "nop } /* Start/End empty region 32 */"),  # each of four steps
        ("PF", "nop } /* Start/End empty region 5 */"),  # six times
        ("", "%8 = sbr.rel (!%p4_p0) target = $region11 }"),  # six times
        ("", "} /* End region 11 */"),  # six times
    ]
    text = "= control target key start\nLB: loop body\n= control target key end\n"
    for index, (mark, content) in enumerate(lines):
        text += f"{hex(index) if index else '0':>7} {mark:2} : > {{ {content}\n"
    rows = ["1 1 4 1 1 1 1 1 1 1"] + ["0 0 2 0 0 0 0 0 1 0"] * len(lines)
    return text, "== CAPACITY:\nMXU, XLU\n" + "\n".join(rows)


def analysed(
    when=None, *, bundles=None, slots=None, post_ra=POST_RA, product=1.0, trips=None, when_bundles=SMALL
):
    text, rows = schedule(when_bundles)
    return analyse(
        post_ra,
        bundles or text,
        slots or rows,
        delay_slots=DELAY,
        cycles_of_product={"bf16": product, "": 100.0},
        when=when,
        trips=trips,
    )


ONCE, SIX, STEPS, LOOP = 1, 6, 4, 4 * 3  # how often bundles run
FIXED = ONCE + 3 * SIX + STEPS + 3 * LOOP + 2 * STEPS + STEPS + 3 * SIX


def test_loops_and_conditionals_are_found():
    assert parse_regions(POST_RA) == [
        Jump(5, False),
        Jump(21, True, 3),
        Jump(32, False),
        Jump(11, True, 6),
    ]
    bundles = parse_bundles(schedule()[0])
    assert len(bundles.texts) == 14 + SMALL
    assert bundles.jump == {5: 2, 21: 6, 32: 8, 11: 12 + SMALL}
    assert bundles.start[5] == 11 + SMALL and bundles.start[21] == 5


def test_the_mark_of_a_grid_loop_may_stand_behind_its_first_bundle():
    """A compiler that spills the index of a step in the first bundle names it in a later one."""
    text, _ = schedule()
    mark = "/* iteration index, stage = 0 */ "
    moved = text.replace(mark, "").replace("} /* End region 3 */", mark + "} /* End region 3 */")
    assert moved != text and analysed([0.25], bundles=moved) == analysed([0.25])
    with pytest.raises(DumpError, match="1 numbers given for 2 `when`s"):
        analysed([0.25], bundles=text.replace(mark, ""), when_bundles=2 * SMALL)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_cycles_by_hand(share):
    found = analysed([share])
    assert found.bundles == 14 + SMALL
    assert found.cycles == FIXED + share * STEPS * SMALL
    assert found.weighted == [(SMALL, share)] and found.assumed == []
    assert found == analysed(share)  # one number for all
    assert found.mxu_share == pytest.approx(LOOP / found.cycles)
    assert found.valu_share == pytest.approx(2 / 4)
    assert found.spill_stores == found.cycles
    assert found.vmem_bytes == 0x1800


def test_what_is_not_said_is_counted_in_full_and_reported():
    found = analysed()
    assert found.cycles == analysed([1.0]).cycles
    assert found.assumed == [f"when of {SMALL} bundles counted once"]


def test_small_conditionals_take_no_number():
    found = analysed([], when_bundles=SMALL - 1)
    assert found.cycles == FIXED + STEPS * (SMALL - 1) and found.assumed == []
    assert analysed(0.5, when_bundles=SMALL - 1).cycles == FIXED + 0.5 * STEPS * (SMALL - 1)


def test_block_copies_take_no_number():
    text, _ = schedule()
    copies = text.replace("= vst ", "= dma.vmem_to_hbm /* window_bounds: (8, 128) */")
    found = analysed([], bundles=copies)
    assert found.cycles == FIXED + STEPS * SMALL and found.weighted == []
    by_hand = text.replace("= vst ", "= dma.hbm_to_vmem ")  # a copy that the kernel starts itself is its own
    assert analysed([0.25], bundles=by_hand).cycles == FIXED + 0.25 * STEPS * SMALL


def test_a_loop_takes_at_least_its_products():
    # Three bundles a trip, and a product of 50 cycles in one of them.
    found = analysed([1.0], product=50.0)
    assert found.cycles == FIXED + STEPS * SMALL - 3 * LOOP + 50 * LOOP
    assert found.mxu_share == pytest.approx(50 * LOOP / found.cycles)
    other = analysed([1.0], bundles=schedule()[0].replace("bf16", "f32"))  # the cost of any other dtype
    assert other.cycles == FIXED + STEPS * SMALL - 3 * LOOP + 100 * LOOP


def test_trips_that_only_run_time_knows():
    dynamic = POST_RA.replace("step=2, limit=5", "step=2, limit=%s7")
    assert analysed([1.0], post_ra=dynamic).assumed == ["loop of 3 bundles counted once"]
    found = analysed([1.0], post_ra=dynamic, trips=[2.5])
    assert found.cycles == FIXED + STEPS * SMALL - 3 * LOOP + 3 * STEPS * 2.5
    assert analysed([1.0], post_ra=dynamic, trips=0).cycles == FIXED + STEPS * SMALL - 3 * LOOP
    with pytest.raises(DumpError, match="2 numbers given for 1 `loop`s"):
        analysed([1.0], post_ra=dynamic, trips=[1, 2])


def test_a_jump_over_a_loop_that_may_be_empty_is_no_conditional():
    jump, far = Span(10, 60, "when", None), GUARD + 1
    assert jump.guards(Span(10, 60, "loop", None)) and jump.guards(Span(10 - GUARD, 60 + GUARD, "loop", None))
    assert not jump.guards(Span(10, 60, "loop", 3))  # its trips are known: nothing to guard
    assert not jump.guards(Span(10 + far, 60, "loop", None)) and not jump.guards(
        Span(10, 60 - far, "loop", None)
    )
    assert not Span(1, 3, "when", None).guards(Span(5, 7, "loop", None))  # beside, not over it

    # Two loops, the second behind a jump; `find_spans` sorts out which is which.
    texts = ["nop"] * 60
    bundles = Bundles(texts, {1: 5, 2: 24, 3: 50}, {1: 15, 3: 20, 2: 48})
    jumps = [Jump(1, True, 4), Jump(3, False), Jump(2, True, None)]
    found = find_spans(jumps, bundles, delay_slots=1)
    assert [(s.kind, s.first, s.last, s.runs) for s in found] == [
        ("loop", 5, 16, 4),
        ("guard", 22, 49, 1.0),
        ("loop", 24, 49, None),
    ]


def test_the_jump_of_an_idle_core_is_no_conditional():
    """The first jump leads behind the last bundle, where no region starts."""
    bundles = Bundles(["nop"] * 60, {1: 5}, {9: 2, 1: 15})
    jumps = [Jump(9, False), Jump(1, True, 4)]
    assert [s.kind for s in find_spans(jumps, bundles, delay_slots=1)] == ["loop"]
    with pytest.raises(DumpError):  # only the first one may
        find_spans(jumps, Bundles(["nop"] * 60, {1: 5}, {9: 20, 1: 15}), delay_slots=1)


def test_unexpected_dumps_are_refused():
    text, slots = schedule()
    with pytest.raises(DumpError, match="2 numbers given for 1 `when`s"):
        analysed([1.0, 1.0])
    with pytest.raises(DumpError, match="in the tree"):
        analysed(bundles=text.replace("target = $region32", "target = $region33"))
    with pytest.raises(DumpError, match="two jumps"):
        analysed(bundles=text.replace("target = $region32", "target = $region21"))
    with pytest.raises(DumpError, match="in the schedule"):
        analysed(bundles=text.replace("Start/End empty region 32", ""))
    with pytest.raises(DumpError, match="wrong way"):
        analysed(post_ra=POST_RA.replace("$region21: #{kernel} parent=4 // loop_body", ""))
    with pytest.raises(DumpError, match="follows 4 bundles"):
        parse_bundles(text.replace("    0x4 ", "    0x5 "))
    with pytest.raises(DumpError, match="rows of slots"):
        parse_slots(slots + "\n" + " ".join("0" * len(SLOTS)), 14 + SMALL)


# ---------------------------------------------------------------- HBM traffic


def doubled(x, *, rows_first=True, interpret=False):
    """Twice x + y: x in blocks of a grid of 2 x 3, y the same block along the inner axis, nothing of z."""

    def body(x_ref, pair_refs, out_ref):
        y_ref, _ = pair_refs
        out_ref[...] = 2 * (x_ref[...] + y_ref[...])

    block = pl.BlockSpec((8, 128), lambda i, j: (i, j))
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(2, 3),
        in_specs=[block, (pl.BlockSpec((8, 128), lambda i, j: (i, 0)), pl.BlockSpec(memory_space=pl.ANY))],
        out_specs=block,
        interpret=interpret,
        name="doubled",
    )(x, (x, x))


def test_blocks_move_when_their_index_changes():
    x = jnp.ones((16, 384))
    with tpu_cycles.recorded_calls() as calls:
        got = doubled(x, interpret=True)
    np.testing.assert_array_equal(got, 4 * x)  # recording changes nothing
    (call,) = calls
    assert (call.name, call.grid) == ("doubled", (2, 3))
    assert call.hbm_bytes(()) == (6 + 2 + 0 + 6) * 8 * 128 * 4


def test_index_maps_may_read_prefetched_scalars():
    spec = pl.BlockSpec((None, pl.Element(4), 128), lambda i, first: (0, first[i], 0))
    operand = jax.ShapeDtypeStruct((1, 64, 128), jnp.bfloat16)
    traffic = functools.partial(tpu_cycles.block_traffic, spec, operand, (4,))
    assert traffic((np.array([0, 0, 4, 0]),)) == 3 * 4 * 128 * 2
    assert traffic((np.zeros(4, int),)) == 4 * 128 * 2
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    assert tpu_cycles.block_traffic(scalars, jax.ShapeDtypeStruct((7,), jnp.float32), (4,), ()) == 28


# ---------------------------------------------------------------- cases and table


def test_dense_layers_say_what_their_index_maps_read():
    """The stack of weights has a prefetched number of the repeat, which the traffic of its blocks needs."""
    jax.clear_caches()  # a call that was traced before is not seen again
    case = next(case for case in cases(v4_flash()) if case.name == "block_matmul wq_b 2048")
    program = case.build()
    with tpu_cycles.recorded_calls() as calls:
        jax.eval_shape(program.function, **program.shapes)
    (call,), (kernel,) = calls, program.kernels.values()
    weight = program.shapes["weight"]
    assert call.hbm_bytes(kernel.prefetch) >= weight.size  # every byte of the FP8 weight moves at least once


@pytest.mark.slow
@pytest.mark.parametrize("config", [v4_flash(), v4_pro()], ids=["flash", "pro"])
def test_every_case_can_be_traced(config):
    jax.clear_caches()  # a call that was traced before is not seen again
    every = cases(config)
    assert len({case.name for case in every}) == len(every)
    chip = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    of_chip = jax.sharding.AbstractMesh((), (), abstract_device=chip)  # kernels of the SparseCore ask for it
    for case in every:
        program = case.build()
        with tpu_cycles.recorded_calls() as calls, jax.sharding.use_abstract_mesh(of_chip):
            jax.eval_shape(program.function, **program.shapes)
        traced = {call.name: call for call in calls}
        assert program.kernels.keys() <= traced.keys(), case.name
        assert min(case.cost()) > 0
        assert set(case.target) | set(case.peer) <= set(CHIPS)
        for name, kernel in program.kernels.items():
            shares = kernel.when(traced[name].grid) if kernel.when else 1.0
            shares = [shares] if isinstance(shares, float) else shares
            assert all(0 <= share <= 1 for share in shares), (case.name, name, shares)
            # Index maps take the grid's numbers and what `prefetch` holds, neither more nor less.
            assert traced[name].hbm_bytes(kernel.prefetch) >= 0, (case.name, name)
    assert any(case.target for case in every) == (config == v4_flash())


ROW = {
    "model": "flash", "case": "a", "chip": "v6e", "bundles": 1234, "cycles": 5678.4, "mxu": 0.5, "valu": 0.25,
    "spill_stores": 0.0, "hbm_bytes": 2e6, "vmem_bytes": 2**20, "compute_us": 3.2, "hbm_us": 1.2,
    "bound_us": 3.2, "roofline_us": 1.0, "target_us": 3.5, "peer_us": None, "xla_around_us": None,
    "kernels": {}, "date": "2026-01-01", "jax": "1", "libtpu": "2",
}  # fmt: skip


def test_rows_are_kept_replaced_and_sorted(tmp_path):
    out = tmp_path / "new" / "rows.json"
    order = [("flash", name, "v6e") for name in ("a", "b")]
    failed = {key: ROW[key] for key in ("model", "chip", "date", "jax", "libtpu")}
    failed |= {"case": "b", "error": "DumpError: one | two\nthree"}
    for row in (failed, ROW, ROW | {"bundles": 99}):
        tpu_cycles.keep(out, row, order)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"], row.get("bundles")) for row in rows] == [("a", 99), ("b", None)]
    text = out.with_suffix(".md").read_text()
    assert tpu_cycles.CAVEATS in text and "not a measurement" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in table} == {len(tpu_cycles.COLUMNS) + 1}
    assert "| **3.2** | 1.0 | 3.5 |  | not known |" in table[1]
    assert "failed: DumpError: one / two three" in table[2]


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tpu_cycles.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="libtpu is not installed"):
        tpu_cycles.main(tpu_cycles.Options(out=tmp_path / "x.json"))


def test_an_unknown_case_is_named(tmp_path):
    pytest.importorskip("libtpu")
    with pytest.raises(SystemExit, match="nothing.* is in none of: hyper_connection"):
        tpu_cycles.main(tpu_cycles.Options(only=("nothing",), out=tmp_path / "x.json"))


def test_a_kernel_without_dumps_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="0 dumps post-ra of k.1"):
        tpu_cycles.read_schedule(tmp_path, "k.1", Kernel(), (1,), "v6e")


@pytest.mark.parametrize("chip", ["v6e", "tpu7x"])
def test_a_real_compile(chip):
    """In a process of its own: one step on 64 tokens, whose traffic is known by hand."""
    pytest.importorskip("libtpu")
    case = next(case for case in cases(v4_flash()) if case.name == "compressor CSA 64")
    row = tpu_cycles.measure(case, "flash", chip, timeout_seconds=300)
    assert "error" not in row, row
    (kernel,) = row["kernels"].values()
    assert kernel["assumed"] == []
    # kv and gate, two halos, ape and norm, entries, two rotation tables, `is_first`.
    entries, width = 16, 512
    rows = 2 * 64 * 2 * width * 2 + 2 * 16 * width * 2 + 4 * (4 * 2 * width + width)
    assert row["hbm_bytes"] == rows + entries * (width * 2 + 2 * 128 * 4 + 4)
    assert row["compute_us"] == pytest.approx(1e6 * row["cycles"] / CHIPS[chip].clock_hz)
    assert row["bound_us"] == max(row["compute_us"], row["hbm_us"]) >= row["roofline_us"] / 2
    assert row["peer_us"] > row["bound_us"] and row["target_us"] is None
    # 128 KiB of rows in VMEM twice at least; a step is a few hundred bundles, one cycle each.
    assert 2 * 2**17 < row["vmem_bytes"] < CHIPS[chip].vmem_bytes
    assert row["cycles"] == row["bundles"] and 100 < row["cycles"] < 10_000
    assert row["mxu"] == 0 and 0.1 < row["valu"] <= 1 and math.isfinite(row["spill_stores"])
