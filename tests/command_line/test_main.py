"""The dsv4 command: exit codes, what goes to stdout and to stderr, and every subcommand once."""

import json
import pathlib
import subprocess
import sys
import types

import pytest

from dsv4_jax import config
from dsv4_jax.command_line import main as cli
from dsv4_jax.config import io as config_io
from dsv4_jax.errors import CheckpointError

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = config.tiny(4)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_io.official_config_dict(CONFIG)))
    return path


NO_DRAFT = {"draft": None}


class FakeModel:
    """Echoes what it was asked for; refuses like the real one, when the first piece is drawn."""

    config = CONFIG
    acceptance = None

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def stream_text(self, prompt, max_new_tokens, **sampling):
        self.calls.append({"prompt": prompt, "max_new_tokens": max_new_tokens} | sampling)
        if max_new_tokens > 1000:
            raise ValueError("max_new_tokens=9999 does not fit")
        yield from ("one", " two", " thrée")

    def stream_ids(self, prompt, max_new_tokens, **sampling):
        self.calls.append({"prompt": prompt, "max_new_tokens": max_new_tokens} | sampling)
        yield from (7, 8)


@pytest.fixture
def model(monkeypatch):
    """Replaces loading, and keeps the tests away from the user's compilation cache."""
    from dsv4_jax import loading
    from dsv4_jax.command_line import compilation_cache

    fake = FakeModel()
    fake.loaded = []

    def load(path, dtype, numerics, cache, tokenizer, allow_links, mesh):
        fake.loaded.append((path, dtype, numerics, cache))
        fake.mesh = mesh
        fake.how = {"tokenizer": tokenizer, "allow_links": allow_links}
        return fake

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(compilation_cache, "enable", lambda: fake.calls.append("cache on"))
    return fake


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# help


def test_help_is_quick_because_nothing_heavy_is_imported():
    imported = "[m for m in ('jax', 'flax', 'numpy') if m in sys.modules]"
    script = f"import sys, dsv4_jax.command_line.main; print({imported})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("subcommand", [None, *cli.SUBCOMMANDS])
def test_help_has_examples(capsys, subcommand):
    with pytest.raises(SystemExit) as caught:
        cli.run(["--help"] if subcommand is None else [subcommand, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: dsv4" in shown
    if subcommand != "doctor":
        assert f"dsv4 {subcommand or 'quickstart'}" in shown.partition("examples:")[2]


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["frobnicate"],
        ["generate"],
        ["generate", "x", "--max-new-tokens", "many"],
        ["generate", "x", "--dtype", "int8"],
        ["generate", "x", "--cache", "fp8"],
        ["convert", "only_one"],
        ["inspect", "a", "--no-such-flag"],
    ],
)
def test_wrong_usage_is_code_2(capsys, wrong):
    with pytest.raises(SystemExit) as caught:
        cli.run(wrong)
    assert caught.value.code == 2


# generate


def test_help_names_every_cache_format_with_its_bytes(capsys):
    """As allocated: one entry (Dh = 512, Dr = 64) and one indexer key (Di = 128)."""
    import jax
    import jax.numpy as jnp

    from dsv4_jax.numerics import cache_formats

    with pytest.raises(SystemExit):
        cli.run(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for chosen in cache_formats.CACHE_FORMATS:
        stored = jax.eval_shape(
            lambda entry, key, chosen=chosen: (
                cache_formats.store_entries(entry, chosen, 64),
                cache_formats.store_keys(key, chosen),
            ),
            *(jax.ShapeDtypeStruct((1, width), jnp.bfloat16) for width in (512, 128)),
        )
        entry, key = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(part)) for part in stored)
        assert f"{chosen} {entry} + {key}" in shown
    assert f"--cache {{{','.join(cache_formats.CACHE_FORMATS)}}}" in shown


def test_text_is_streamed_to_stdout(capsys, model):
    code, out, err = run(capsys, "generate", "some/dir", "Once")
    assert (code, out, err) == (0, "one two thrée\n", "")
    assert model.loaded == [(pathlib.Path("some/dir"), "bfloat16", "reference", "plain")]
    assert model.calls == [
        "cache on",
        {"prompt": "Once", "max_new_tokens": 128, "temperature": 1.0, "top_p": 1.0, "seed": 0} | NO_DRAFT,
    ]


def test_ids_and_every_option(capsys, model):
    options = (
        "--ids 5 6 --max-new-tokens 9 --temperature 0 --top-p 0.5 --seed 3 --dtype float32 --numerics qat"
    )
    options += " --cache fp8+mxfp4"
    code, out, _ = run(capsys, "generate", "some/dir", *options.split(), "--no-compilation-cache")
    assert (code, out) == (0, "7 8\n")  # the stop token is not shown
    assert model.loaded == [(pathlib.Path("some/dir"), "float32", "qat", "fp8+mxfp4")]
    assert model.calls == [
        {"prompt": [5, 6], "max_new_tokens": 9, "temperature": 0.0, "top_p": 0.5, "seed": 3} | NO_DRAFT
    ]


def test_json_records(capsys, model):
    code, out, _ = run(capsys, "generate", "some/dir", "Once", "--json")
    record = json.loads(out)
    assert code == 0 and record["text"] == "one two thrée" and record["prompt"] == "Once"
    assert record["sampling"]["max_new_tokens"] == 128 and record["seconds"] >= 0
    code, out, _ = run(capsys, "generate", "some/dir", "--ids", "5", "--json")
    assert json.loads(out)["ids"] == [7, 8]


def test_the_word_none_is_a_prompt(capsys, model):
    assert run(capsys, "generate", "some/dir", "None")[0] == 0
    assert model.calls[1]["prompt"] == "None"


@pytest.mark.parametrize("arguments", [[], ["text", "--ids", "1"]])
def test_one_kind_of_prompt(capsys, model, arguments):
    code, out, err = run(capsys, "generate", "some/dir", *arguments)
    assert (code, out) == (2, "")
    assert "give a prompt as text, or as --ids, and not both" in err
    assert model.loaded == []  # refused before the weights are read


def test_what_the_model_refuses_is_code_2(capsys, model):
    code, out, err = run(capsys, "generate", "some/dir", "Once", "--max-new-tokens", "9999")
    assert (code, out) == (2, "")
    assert "max_new_tokens=9999 does not fit" in err and "Traceback" not in err


@pytest.mark.parametrize("before", [(), ("one",)])
def test_logits_that_are_no_numbers_are_code_2(capsys, model, monkeypatch, before):
    def broken(*arguments, **sampling):
        yield from before
        raise FloatingPointError("logits are not finite numbers: row 0, position 5")

    monkeypatch.setattr(model, "stream_text", broken)
    code, out, err = run(capsys, "generate", "some/dir", "Once")
    assert (code, out) == (2, "".join(before))
    assert err.startswith("dsv4: cannot g") and "row 0, position 5" in err and "fault" not in err


def test_ctrl_c_is_code_130(capsys, model, monkeypatch):
    def interrupted(*arguments, **sampling):
        yield "one"
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "stream_text", interrupted)
    code, out, err = run(capsys, "generate", "some/dir", "Once")
    assert (code, out, err) == (130, "one", "dsv4: interrupted\n")


def test_errors_are_printed_without_traceback(capsys, tmp_path):
    code, out, err = run(capsys, "generate", str(tmp_path), "text", "--no-compilation-cache")
    assert (code, out) == (2, "")
    assert err.startswith("dsv4: ") and "config.json" in err and "Traceback" not in err


# inspect


def test_inspect_a_bare_config_file_and_a_directory(capsys, config_file):
    for path in (config_file, config_file.parent):
        code, out, _ = run(capsys, "inspect", str(path))
        assert code == 0 and "total without MTP" in out
    code, out, _ = run(capsys, "inspect", str(config_file), "--json")
    record = json.loads(out)
    assert record["config"]["hidden_size"] == 64
    assert record["parameters"]["total_with_mtp"] > record["parameters"]["total"]


def test_inspect_a_context(capsys, config_file):
    code, out, _ = run(capsys, "inspect", str(config_file), "--context", "65536")
    assert code == 0 and "A context of 65,536 tokens" in out and "DeepSeek-V3.2" in out
    code, out, _ = run(capsys, "inspect", str(config_file), "--context", "3000", "--json")
    assert code == 0 and json.loads(out)["context"]["context"] == 3000
    code, _, err = run(capsys, "inspect", str(config_file), "--context", "0")
    assert code == 2 and "context=0 must be an integer in 1" in err


def test_inspect_shows_all_config_problems(capsys, config_file):
    raw = json.loads(config_file.read_text()) | {"hidden_size": True, "o_groups": 3}
    del raw["rope_scaling"]
    config_file.write_text(json.dumps(raw))
    code, out, err = run(capsys, "inspect", str(config_file))
    assert (code, out) == (2, "")
    assert "3 problems" in err and "YaRN" in err and "o_groups=3" in err


def test_inspect_shows_a_draft_head(capsys, config_file):
    raw = json.loads(config_file.read_text()) | {"dspark_block_size": 5, "dspark_noise_token_id": 7}
    raw |= {"dspark_markov_rank": 4, "dspark_target_layer_ids": [0, 1]}
    config_file.write_text(json.dumps(raw))
    code, out, _ = run(capsys, "inspect", str(config_file))
    assert code == 0 and "blocks of 5, reads layers 0, 1, Markov rank 4" in out


def test_a_hub_address_without_revision(capsys):
    code, _, err = run(capsys, "inspect", "hf://deepseek-ai/DeepSeek-V4-Flash")
    assert code == 2 and "the revision is missing" in err


def test_inspect_fetches_json_only(capsys, monkeypatch, config_file):
    from dsv4_jax.command_line import hub

    asked = []

    def locate(source, *, weights, announce):
        asked.append((source, weights))
        announce("hf://a/b@0123")
        return config_file.parent

    monkeypatch.setattr(hub, "locate", locate)
    code, _, err = run(capsys, "inspect", "hf://a/b@main")
    assert code == 0 and asked == [("hf://a/b@main", False)] and "hf://a/b@0123" in err


# verify


@pytest.fixture
def verification(monkeypatch):
    """Replaces the checks by a result of the test's choice."""
    from dsv4_jax.checkpoint import verify

    result = types.SimpleNamespace(found=None)

    def verify_checkpoint(directory, progress, allow_links):
        progress("some.tensor", 1, 2)
        return result.found

    monkeypatch.setattr(verify, "verify_checkpoint", verify_checkpoint)
    result.Verification = verify.Verification
    return result


def test_verify_a_sound_checkpoint(capsys, verification):
    verification.found = verification.Verification(
        problems=(), warnings=("odd",), layout="official", num_tensors=3, num_bytes=12345,
        formats={"plain": 2, "fp4": 1},
    )  # fmt: skip
    code, out, err = run(capsys, "verify", "some/dir")
    assert code == 0 and err == ""
    assert out == "warning: odd\nsound: 3 tensors, 12,345 bytes, official names (1 fp4, 2 plain weights)\n"
    code, out, _ = run(capsys, "verify", "some/dir", "--json")
    assert code == 0 and json.loads(out)["sound"] is True


def test_verify_an_unsound_checkpoint(capsys, verification):
    problems = tuple(f"tensor {i} is missing" for i in range(30))
    verification.found = verification.Verification(problems=problems)
    code, out, err = run(capsys, "verify", "some/dir")
    assert code == 2 and out == "unsound: 30 problems\n"
    assert "tensor 19 is missing" in err and "... and 10 more" in err and "tensor 20 " not in err
    code, out, _ = run(capsys, "verify", "some/dir", "--json")
    assert code == 2 and len(json.loads(out)["problems"]) == 30


# convert, doctor, quickstart: the arguments arrive


def test_convert_passes_its_arguments_on(capsys, monkeypatch):
    from dsv4_jax.checkpoint import convert

    seen = {}

    def convert_checkpoint(source, destination, **options):
        seen.update(options, source=source, destination=destination)
        return ["the MTP block is not saved"]

    monkeypatch.setattr(convert, "convert_checkpoint", convert_checkpoint)
    flags = "--layout transformers --to float32 --ignore-draft-head --overwrite --allow-links disk"
    code, out, err = run(capsys, "convert", "from", "to", *flags.split())
    assert (code, out, err) == (0, "", "warning: the MTP block is not saved\n")
    del seen["reading"], seen["writing"]
    assert seen == {
        "source": pathlib.Path("from"),
        "destination": pathlib.Path("to"),
        "layout": "transformers",
        "to": "float32",
        "draft_head": "ignore",
        "overwrite": True,
        "allow_links": pathlib.Path("disk"),
        "placement": None,
    }


def test_convert_refusals_are_code_2(capsys, monkeypatch):
    from dsv4_jax.checkpoint import convert

    def convert_checkpoint(*arguments, **options):
        raise CheckpointError("cannot save to to", ["it is not empty"])

    monkeypatch.setattr(convert, "convert_checkpoint", convert_checkpoint)
    code, _, err = run(capsys, "convert", "from", "to")
    assert code == 2 and "it is not empty" in err


def test_doctor(capsys, monkeypatch):
    from dsv4_jax.command_line import doctor

    code, out, _ = run(capsys, "doctor", "--json")
    record = json.loads(out)
    assert record["default_backend"] and record["devices"] and record["versions"]["jax"] != "missing"
    assert code == (2 if record["problems"] else 0)
    _, out, _ = run(capsys, "doctor")
    for wanted in ("python", "jaxlib", "devices", "kernels", "compiled"):
        assert wanted in out
    monkeypatch.setattr(doctor, "PACKAGES", (*doctor.PACKAGES, "no-such-package-dsv4"))
    code, _, err = run(capsys, "doctor")
    assert code == 2 and "no-such-package-dsv4 is not installed" in err


def test_doctor_knows_what_transports_cost(capsys):
    """Of 256 experts, 6 a token, on 8 devices whose width two share: 4 x 2 tokens of each go to 7 others."""
    on_mesh = ("doctor", "--mesh", "expert=8,tensor=2", "--link", "v6e")
    code, out, _ = run(capsys, *on_mesh, "--tokens", "64", "131072", "--json")
    few, many = json.loads(out)["transports"]
    assert code == 0 and (few["chosen"], many["chosen"]) == ("gather", "all_to_all")
    gather = next(cost for cost in few["costs"] if cost["transport"] == "gather")
    assert gather["sent_bytes"] == 7 * 8 * (4096 * (2 + 4) + 8 * 6)
    _, out, _ = run(capsys, *on_mesh[:3], "--tokens", "64")
    assert "to experts on 8 devices, cpu links: " in out and "ragged: not on this backend" in out
    assert out.count("(chosen)") == 1
    for refused in (("--mesh", "expert=3"), ("--mesh", "experts=3"), ("--mesh", "expert=2", "--tokens", "0")):
        assert cli.run(["doctor", *refused]) == 2
    err = capsys.readouterr().err
    assert "E = 256 cannot be split 3 ways" in err and "--tokens 0: must be" in err


def test_quickstart_passes_its_arguments_on(capsys, monkeypatch, model):
    from dsv4_jax.command_line import quickstart

    seen = {}
    monkeypatch.setattr(quickstart, "quickstart", lambda **options: seen.update(options))
    flags = "--minutes 0.5 --out somewhere --seed 3 --prompt class"
    assert run(capsys, "quickstart", *flags.split())[0] == 0
    assert seen == {
        "minutes": 0.5,
        "out": pathlib.Path("somewhere"),
        "seed": 3,
        "prompt": "class",
    }
    assert model.calls == ["cache on"]


def test_a_closed_pipe_is_quiet(config_file):
    inspect = f"{sys.executable} -m dsv4_jax inspect {config_file} --json"
    script = f"{inspect} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 141) and done.stderr == ""


# presets


@pytest.mark.parametrize(("name", "total"), [("flash", 284_332_240_471), ("pro", 1_572_997_201_763)])
def test_released_models_are_inspected_without_a_file(capsys, tmp_path, monkeypatch, name, total):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "inspect", name, "--json", "--context", "1048576")
    assert (code, err) == (0, "")
    assert json.loads(out)["parameters"]["total"] == total
    assert json.loads(out)["context"]["context"] == 1048576


def test_a_folder_with_the_name_of_a_preset_goes_first(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flash").mkdir()
    (tmp_path / "flash" / "config.json").write_text(json.dumps(config_io.official_config_dict(CONFIG)))
    _, out, _ = run(capsys, "inspect", "flash", "--json")
    assert json.loads(out)["config"]["hidden_size"] == CONFIG.hidden_size
