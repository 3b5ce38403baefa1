"""The reader of compiled programs: loops multiply, the dearest branch counts, the unknown is refused."""

import pytest

from dsv4_jax.planning.program_text import ProgramError, costs, parse


def cycles(number: int) -> str:
    return f'backend_config={{"estimated_cycles":"{number}"}}'


PROGRAM = f"""\
HloModule jit_step, is_scheduled=true

%four (p.1: (s32[], f32[8])) -> pred[] {{
  %constant.1 = s32[]{{:T(128)}} constant(4)
  %gte.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  ROOT %lt.1 = pred[]{{:T(512)}} compare(%gte.1, %constant.1), direction=LT
}}

%three (p.1: (s32[], f32[8])) -> pred[] {{
  %constant.2 = s32[] constant(3)
  ROOT %lt.2 = pred[] compare(%gte.2, %constant.2), direction=LT
}}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %copy.1 = f32[8]{{0:T(8)}} copy(%x), metadata={{op_name="jit(step)/ring/copy"}}, {cycles(10)}
  %inner.1 = (s32[], f32[8]) while(%t), condition=%three, body=%body.2
}}

%body.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  ROOT %fusion.2 = (s32[], f32[8]{{0}}) fusion(%x), kind=kLoop, calls=%fused, {cycles(5)}
}}

%small (p: f32[8]) -> f32[8] {{
  %fusion.3 = f32[8]{{0}} fusion(%x), calls=%fused, {cycles(7)}
}}

%large (p: f32[8]) -> f32[8] {{
  %fusion.4 = f32[8]{{0}} fusion(%x), calls=%fused, {cycles(700)}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %kernel = f32[8]{{0}} custom-call(%p), custom_call_target="tpu_custom_call"
  %outer = (s32[], f32[8]) while(%t), condition=%four, body=%body.1
  %choice = f32[8]{{0}} conditional(%i, %p, %p), branch_computations={{%small, %large}}
  ROOT %copy.9 = f32[8]{{0}} copy(%choice), {cycles(1)}
}}
"""


def test_loops_multiply_and_the_dearest_branch_counts():
    found = {cost.instruction.name: (cost.runs, cost.cycles) for cost in costs(PROGRAM)}
    assert found == {"fusion.4": (1, 700), "fusion.2": (12, 60), "copy.1": (4, 40), "copy.9": (1, 1)}


def test_the_scope_is_that_of_the_source():
    _, computations = parse(PROGRAM)
    assert computations["body.1"].instructions[0].scope == "jit(step)/ring/copy"


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ProgramError, match="inner.1"):
        costs(
            PROGRAM.replace("compare(%gte.2, %constant.2), direction=LT", "compare(%gte.2, %n), direction=NE")
        )


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ProgramError, match="ENTRY"):
        costs("HloModule nothing")
