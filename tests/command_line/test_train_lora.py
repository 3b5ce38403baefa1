"""Fine-tuning by `train`: from a folder, on chats, by LoRA and in all parameters; export and resume."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import torch
from transformers import DeepseekV4ForCausalLM

import dsv4_jax
from dsv4_jax.checkpoint import storage
from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.command_line import train
from dsv4_jax.errors import ProblemsError
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.keeping import STATES_FOLDER
from dsv4_jax.training.lora import Lora
from dsv4_jax.training.metrics import read_lines
from dsv4_jax.training.run_config import Stage
from dsv4_jax.training.schedules import LearningRate, LossWeights
from dsv4_jax.training.sources import ChatFiles
from dsv4_jax.training.tokenizer import train_tokenizer
from tests.checkpoint import synthetic
from tests.models import compressed_kinds
from tests.training.tiny_run import config

CONFIG = compressed_kinds(num_nextn_predict_layers=0, n_routed_experts=3, initializer_range=0.1)
LORA = Lora(2, 8.0, ("*/attn/wq_b", "*/attn/wo_a", "*/experts/*", "head"))
CHATS = [
    [{"role": "user", "content": word}, {"role": "assistant", "content": f"{len(word)}!"}]
    for word in ("one", "three", "eleven", "ab")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base in float32 with a tokenizer, and chats."""
    folder = tmp_path_factory.mktemp("tuned")
    tokenizer = train_tokenizer(["one two", *(m["content"] for chat in CHATS for m in chat)], 290)
    model = LanguageModel.random(CONFIG, Policy.of("float32"), seed=4)
    LanguageModel(CONFIG, model.policy, model.parameters, tokenizer).save(folder / "base")
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    lines = [json.dumps({"messages": chat}) for chat in CHATS]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tuned(folder, name, base="base", **changes):
    """A run that starts from a folder."""
    fields = dict(
        model=folder / base,
        source=ChatFiles((str(folder / "chats.jsonl"),)),
        stages=(Stage(6, 32, 2),),
        learning_rate=LearningRate(2e-2, warmup_steps=1, decay_steps=3),
        losses=LossWeights(bias_speed=0.0),
        tokenizer=folder / "tokenizer.json",
        lora=LORA,
    )
    return config(folder / name, **(fields | changes))


@pytest.fixture(scope="module")
def whole(folder):
    """A run by LoRA that nobody disturbed."""
    run = tuned(folder, "whole")
    train.train(run)
    return run


def stored(path):
    """Every tensor of a folder."""
    with open_checkpoint(path) as files:
        return {name: files.read(name) for name in files.tensors}


def test_what_lora_exports_is_the_same_model_for_transformers(folder, whole):
    """Merged: logits of both to 1e-5 of their size, and far from those of the base."""
    ids = np.arange(2, 39, dtype=np.int32)[None] * 7 % 290
    model = dsv4_jax.load(whole.out / "model", dtype="float32")
    ours = np.asarray(model.logits(ids))
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs, told = DeepseekV4ForCausalLM.from_pretrained(
        whole.out / "model", dtype=torch.float32, output_loading_info=True, **eager
    )
    assert not any(told.values()), told
    with torch.no_grad():
        wanted = theirs.eval()(torch.as_tensor(ids).long()).logits.numpy()
    size = np.abs(wanted).max()
    assert np.abs(ours - wanted).max() < 1e-5 * size
    before = np.asarray(dsv4_jax.load(folder / "base", dtype="float32").logits(ids))
    assert np.abs(ours - before).max() > 1e-2 * size
    losses = [each["main"] for each in read_lines(whole.out / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.05


def test_only_the_chosen_matrices_have_changed(folder, whole):
    before, after = stored(folder / "base"), stored(whole.out / "model")
    assert set(before) == set(after)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    parts = ("attn.wq_b.", "attn.wo_a.", ".ffn.experts.", "head.weight")
    assert changed == {
        name for name in before if any(part in name for part in parts) and "hc_head" not in name
        and "indexer" not in name
    }  # fmt: skip


def test_a_saved_state_holds_the_small_matrices_alone(whole):
    states = sum(p.stat().st_size for p in (whole.out / STATES_FOLDER / "6").rglob("*") if p.is_file())
    assert states < 0.6 * sum(p.stat().st_size for p in (whole.out / "model").glob("*.safetensors"))


@pytest.mark.slow
def test_a_run_of_lora_goes_on_bit_for_bit(folder, whole, monkeypatch):
    cut = tuned(folder, "cut")
    step, guarded = [], train.run.__globals__["guarded_step"]

    def stopping(*arguments):
        step.append(1)
        if len(step) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return guarded(*arguments)

    monkeypatch.setitem(train.run.__globals__, "guarded_step", stopping)
    with pytest.raises(SystemExit) as ended:
        train.train(cut)
    assert ended.value.code == train.TERMINATED and len(step) < 6
    train.train(cut, resume=True)
    assert len(step) == 6
    got, want = stored(cut.out / "model"), stored(whole.out / "model")
    assert all(got[name].tobytes() == want[name].tobytes() for name in want)


def test_states_of_another_base_or_rank_are_refused(folder, whole):
    other = LanguageModel.random(CONFIG, Policy.of("float32"), seed=5)
    with pytest.raises(ProblemsError, match="lora.rank is 3 now, and was 2"):
        train.train(dataclasses.replace(whole, lora=dataclasses.replace(LORA, rank=3)), resume=True)
    (folder / "base").rename(folder / "aside")
    try:
        other.save(folder / "base")
        with pytest.raises(ProblemsError, match="its parameters are not those that were there then"):
            train.train(whole, resume=True)
    finally:
        (folder / "base").rename(folder / "other")
        (folder / "aside").rename(folder / "base")


@pytest.mark.parametrize("lora", [LORA, pytest.param(None, marks=pytest.mark.slow)])
def test_from_a_release_in_fp8_and_fp4(folder, lora):
    """LoRA leaves what it does not change in the release's formats; without it all becomes float32."""
    base = f"release {lora is None}"
    synthetic.write_checkpoint(folder / base, CONFIG, storage.PREVIEW)
    run = tuned(folder, f"tuned {lora is None}", base, lora=lora, stages=(Stage(2, 32, 2),))
    train.train(run)
    before, after = stored(folder / base), stored(run.out / "model")
    types = {value.dtype.name for value in after.values()}
    assert ("float8_e4m3fn" in types) == (lora is not None)
    assert all(np.isfinite(each["loss"]) for each in read_lines(run.out / "metrics.jsonl"))
    if lora is not None:
        same = [n for n in before if n in after and before[n].tobytes() == after[n].tobytes()]
        assert "layers.0.attn.wkv.weight" in same and "layers.0.attn.wq_b.weight" not in same
        assert "layers.0.ffn.shared_experts.w1.weight" in same
    model = dsv4_jax.load(run.out / "model", dtype="float32")
    assert np.isfinite(np.asarray(model.logits(np.arange(20, dtype=np.int32)[None]))).all()
    assert all(leaf.size for leaf in jax.tree.leaves(model.parameters))
