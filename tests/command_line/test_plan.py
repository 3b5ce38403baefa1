"""`dsv4 plan`: its tables, its JSON, and its refusals, all from shapes."""

import json

import pytest

from dsv4_jax.command_line import main as cli


def plan(capsys, *arguments):
    code = cli.run(["plan", *arguments])
    shown = capsys.readouterr()
    return code, " ".join(shown.out.split()), " ".join(shown.err.split())


def test_the_table_says_what_it_is_based_on_and_which_mesh(capsys):
    code, out, _ = plan(capsys, "flash", "--slice", "v6e:4x8")
    assert code == 0
    assert "nothing was measured or compiled" in out
    assert "mesh expert=32: by default the most expert parallelism that fits" in out
    assert "largest batch at 65536 tokens" in out and "of 31.250" in out


def test_json_holds_the_plan_the_front_and_money(capsys):
    wanted = ("--auto", "--usd-per-chip-hour", "2.7", "--json")
    code, out, _ = plan(capsys, "flash", "--slice", "v6e:4x4", *wanted)
    plain = json.loads(out)
    assert code == 0 and plain["fits"] and plain["job"]["chips"] == 16
    assert plain["money"]["published"] == 0.28
    assert {each["job"]["slice"] for each in plain["front"]} <= {"v6e:2x4", "v6e:4x4"} and plain["front"]


def test_auto_is_not_slower_than_the_default(capsys):
    def middle(*more):
        plain = json.loads(plan(capsys, "flash", "--slice", "v6e:4x4", "--json", *more)[1])
        return plain["step_seconds"][0] * plain["step_seconds"][1]

    assert middle("--auto") < middle()


def test_what_does_not_fit_is_refused_with_what_would(capsys):
    code, out, err = plan(capsys, "flash", "--slice", "v6e:2x2")
    assert code == 2 and not out
    assert "of 31.25: weights" in err
    assert "smallest slice that holds it: v6e:2x4 --mesh" in err
    assert "not even one row fits" in err
    code, _, err = plan(capsys, "flash", "--slice", "v6e:4x8", "--mesh", "expert=32", "--batch", "4096")
    assert code == 2 and "largest batch on this slice and mesh at context 65536: 2944" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--slice", "v6e:4"), "slices of v6e have 2 sides"),
        (("--slice", "v6e:4x8", "--auto", "--mesh", "expert=32"), "--auto: looks for a mesh"),
        (("--slice", "v6e:4x8", "--work", "train", "--context", "9"), "training has --length"),
        (("--slice", "v6e:4x8", "--length", "9"), "only training has it"),
        (("--slice", "v6e:4x8", "--mesh", "expert=16"), "takes 16 devices"),
        (("--slice", "v6e:4x8", "--batch", "0"), "--batch 0: must be at least 1"),
        (("--slice", "v6e:4x8", "--usd-per-chip-hour", "-1"), "must be more than 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(capsys, more, said):
    code, _, err = plan(capsys, "flash", *more)
    assert code == 2 and said in err


@pytest.mark.parametrize("work", ["prefill", "train"])
def test_other_work_is_planned(capsys, work):
    code, out, _ = plan(capsys, "flash", "--slice", "v5p:4x4x4", "--work", work, "--json")
    plain = json.loads(out)
    assert code == 0 and plain["job"]["work"] == work
    assert plain["job"]["tokens_of_a_row"] == {"prefill": 2048, "train": 4096}[work]
