"""`dsv4 plan`: its tables, its JSON, and its refusals, all from shapes."""

import json

import pytest

from dsv4_jax.command_line import main as cli
from dsv4_jax.planning import compiled, described


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
        (("--slice", "v6e:4x8", "--optimizer", "adamw"), "--optimizer adamw: only training has one"),
        (("--slice", "v6e:4x8", "--draft", "dspark"), "--draft dspark: this model has no DSpark head"),
        (("--slice", "v6e:4x8", "--draft", "mtp", "--work", "prefill"), "only decode drafts, not prefill"),
        (("--slice", "v6e:4x8", "--draft", "mtp", "--tokens-a-pass", "3"), "a step computes 2 tokens a row"),
        (("--slice", "v6e:4x8", "--tokens-a-pass", "0.5"), "a step appends at least 1 token"),
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


def test_a_draft_costs_memory_and_time_and_gives_tokens(capsys):
    def planned(*more):
        wanted = ("flash", "--slice", "v6e:4x8", "--mesh", "expert=16,tensor=2", "--json", *more)
        code, out, _ = plan(capsys, *wanted)
        assert code == 0
        return json.loads(out)

    bare, drafting = planned(), planned("--draft", "mtp", "--tokens-a-pass", "1.8")
    assert drafting["job"]["draft"] == "mtp" and drafting["job"]["tokens_of_a_row"] == 2
    assert drafting["held_bytes"]["weights"] > bare["held_bytes"]["weights"]
    assert drafting["held_bytes"]["state"] > bare["held_bytes"]["state"]
    assert drafting["step_seconds"][0] > bare["step_seconds"][0]
    # 1.8 tokens of a row in a step that is not 1.8 times as long.
    assert drafting["tokens_a_second_a_chip"][1] > bare["tokens_a_second_a_chip"][1]
    assert drafting["tokens_a_second_a_chip"][1] * drafting["step_seconds"][0] == pytest.approx(1.8 * 64 / 32)


def test_adamw_keeps_two_moments_of_everything(capsys):
    def optimizer(name):
        wanted = ("--slice", "v5p:4x8x8", "--mesh", "fsdp=8,expert=32", "--work", "train", "--batch", "256")
        _, out, _ = plan(capsys, "flash", *wanted, "--json", "--optimizer", name)
        plain = json.loads(out)
        assert plain["job"]["optimizer"] == name
        return plain["held_bytes"]["optimizer"] / plain["held_bytes"]["weights"], "Newton-Schulz" in plain[
            "flops"
        ]

    assert optimizer("adamw") == (pytest.approx(2, rel=0.01), False)
    share, orthogonalises = optimizer("muon")
    assert 1 < share < 1.2 and orthogonalises


GIB = 2**30
FOUND = compiled.Compiled(
    libtpu="9.9", lower_seconds=1.5, compile_seconds=62.25,
    arguments={"weights": 7 * GIB, "cache": GIB}, argument_bytes=9 * GIB, output_bytes=GIB, alias_bytes=GIB,
    temporary_bytes=GIB // 2, peak_bytes=9 * GIB, flops=5e9, kernel_calls=83, xla_seconds=0.0125,
    whole={"weights['head']": GIB},
    moved=(
        compiled.Collective("all-gather", "expert", GIB // 4, 2, "bf16[8]", "linear"),
        compiled.Collective("all-reduce", "expert+tensor", GIB, 1, "f32[8]", "experts"),
    ),
)  # fmt: skip


@pytest.fixture
def a_compiler(monkeypatch):
    """One that says the same of every job."""
    monkeypatch.setattr(described, "devices", lambda place: ())
    monkeypatch.setattr(compiled, "compiled", lambda job: FOUND)


def test_compiled_figures_stand_beside_formulas(capsys, a_compiler, tmp_path):
    wanted = ("flash", "--slice", "v6e:4x8", "--mesh", "expert=16,tensor=2", "--compile")
    code, out, err = plan(capsys, *wanted, "--plot", str(tmp_path))
    assert code == 0 and "compiling decode for v6e:4x8, mesh expert=16,tensor=2" in err
    assert "compiled by libtpu 9.9" in out and "nothing was measured or compiled" not in out
    for row in (
        "cache and state, GiB │ 0.449 │ 1.000",
        "all arguments, with padding, GiB │ 7.838 │ 9.000",
        "temporaries (formula: estimate), GiB │ 0.003 │ 0.500",
        "│ 9.500",  # arguments and temporaries: the results take the place of arguments
        "XLA's own operations, estimated, ms │ │ 12.500",
        "to compile, s │ │ 62.2",
    ):
        assert row in out, row
    assert "held whole by every device: weights['head'], 1.000 GiB" in out
    assert {path.stem for path in tmp_path.iterdir()} == {"hbm", "roofline", "rows", "context"}
    assert str(tmp_path / "hbm.png") in err.replace("\n", "")


def test_json_holds_what_the_compiler_says(capsys, a_compiler):
    wanted = ("--slice", "v6e:4x8", "--mesh", "expert=16,tensor=2", "--compile", "--json")
    plain = json.loads(plan(capsys, "flash", *wanted)[1])
    assert plain["compiled"]["moved_by_axes"] == {"expert+tensor": GIB, "expert": GIB // 2}
    assert plain["compiled"]["held_bytes"] == 9.5 * GIB and "Nothing ran" in plain["basis"]


def test_what_cannot_be_compiled_is_refused_before_anything_long(capsys, monkeypatch):
    monkeypatch.setattr(described.importlib.util, "find_spec", lambda name: None)
    code, out, err = plan(capsys, "flash", "--slice", "v6e:4x8", "--compile")
    assert code == 2 and not out
    assert "the TPU compiler (libtpu) is not installed; pip install 'dsv4_jax[plan]' brings it" in err
