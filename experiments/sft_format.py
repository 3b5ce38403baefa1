"""Does fine-tuning on chats teach a small model a form of answer, in all its parameters and by LoRA?

    python -m experiments.sft_format [--base-steps 150] [--steps 150] [--out results/sft_format.json]

By the public command alone, as a user would: `dsv4 train` of this file (a run file, for it has a function
`run`) makes a small model of Python's own sources; `dsv4 train sft` and `dsv4 train lora` then train it on
generated chats about the letters of words ("Answer: 5 letters."), with the presets' own settings. Words of
the questions at the end were in no chat. Form is what is scored, and beside it whether the number is right,
which so small a model need not learn. Where torch and transformers are installed, the logits of each exported
folder are compared with theirs.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

from dsv4_jax.config import tiny
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.loading import load
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.chat_records import QUICKSTART_CHAT, ChatEncoder
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.run_config import Checkpoints, Logging, RunConfig, Stage
from dsv4_jax.training.schedules import LearningRate
from dsv4_jax.training.sources import StandardLibrary
from dsv4_jax.training.tokenizer import EOS_ID, TextEncoder, train_tokenizer
from experiments import study_record

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = tiny(
    4,
    vocab_size=512,
    hidden_size=64,
    attention_kinds=("window", "csa", "hca"),
    router_kinds=("hash", "learned", "learned"),
    num_nextn_predict_layers=0,
    initializer_range=0.05,
)
FORM = re.compile(r"Answer: (\d+) letters\.")
HELD_OUT = 200
TOKENIZER = pathlib.Path("tokenizer.json")
"""Of the folder that the study works in."""


def run() -> RunConfig:
    """The model that is fine-tuned, of text alone; run in a folder with a tokenizer."""
    return RunConfig(
        model=CONFIG,
        policy=Policy.of("float32"),
        source=StandardLibrary(1_000_000),
        stages=(Stage(150, 128, 8),),
        learning_rate=LearningRate(4e-3, warmup_steps=10, decay_steps=100),
        optimizer=AdamW(weight_decay=0.0),
        tokenizer=TOKENIZER,
        out=pathlib.Path("base"),
        checkpoints=Checkpoints(every=100),
        logging=Logging(every=25),
    )


def words(seed: int) -> list[str]:
    """Words of Python's sources, 3 to 12 letters, in an order that depends on the seed."""
    text = " ".join(document.text for document in gather_corpus(2_000_000).train)
    found = sorted(set(re.findall(r"\b[a-z]{3,12}\b", text)))
    return [found[index] for index in np.random.default_rng(seed).permutation(len(found))]


def chat(word: str) -> list[dict]:
    """A question about a word, and its answer."""
    return [
        {"role": "user", "content": f"How many letters has the word {word}?"},
        {"role": "assistant", "content": f"Answer: {len(word)} letters."},
    ]


def accuracy(model: LanguageModel, asked: list[str]) -> dict[str, float]:
    """Shares of answers in the right form, and with the right number too."""
    encoder = ChatEncoder(TextEncoder(model.tokenizer), QUICKSTART_CHAT)
    prompts = [encoder.document(chat(word)[:1]).tokens.tolist() for word in asked]
    written = model.generate(prompts, max_new_tokens=16, stop_token_ids=[EOS_ID])
    form = right = 0
    for word, ids in zip(asked, written.tolist(), strict=True):
        ended = EOS_ID in ids
        answer = model.tokenizer.decode(ids[: ids.index(EOS_ID)] if ended else ids)
        found = FORM.fullmatch(answer) if ended else None
        form += found is not None
        right += found is not None and int(found[1]) == len(word)
    return {"form": form / len(asked), "right": right / len(asked)}


def difference(folder: pathlib.Path, model: LanguageModel) -> float | None:
    """Largest difference of logits between transformers and this package, over the largest logit.

    None where torch and transformers are not installed.
    """
    try:
        import torch
        from transformers import DeepseekV4ForCausalLM
    except ImportError:
        return None
    ids = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 60)).astype(np.int32)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(ids).long()).logits.numpy()
    return float(np.abs(np.asarray(model.logits(ids)) - wanted).max() / np.abs(wanted).max())


def command(folder: pathlib.Path, *options: str) -> float:
    """Runs `dsv4 train` in a folder; returns its seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    print("$ dsv4 train", *options, flush=True)
    subprocess.run(
        [sys.executable, "-m", "dsv4_jax", "train", *options], cwd=folder, env=environment, check=True
    )
    return time.monotonic() - start


def numbers_trained(folder: pathlib.Path, *options: str) -> int:
    """How many numbers a run trains, as its dry run tells of LoRA; all of the model's without it."""
    line = [sys.executable, "-m", "dsv4_jax", "train", *options, "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    told = subprocess.run(
        line, cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"trained: ([\d,]+) numbers", told) or re.search(r"model: ([\d,]+) parameters", told)
    return int(found[1].replace(",", ""))


def study(folder: pathlib.Path, base_steps: int, steps: int, seed: int) -> dict[str, dict]:
    """The whole experiment in an empty folder: model -> what was measured."""
    order = words(seed)
    held_out, taught = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + 3000]
    texts = [document.text for document in gather_corpus(1_000_000).train]
    texts += [message["content"] for word in taught for message in chat(word)]
    (folder / TOKENIZER).write_text(train_tokenizer(texts, CONFIG.vocab_size).to_str())
    lines = "".join(json.dumps({"messages": chat(word)}) + "\n" for word in taught)
    (folder / "chats.jsonl").write_text(lines)
    common = ("--seed", str(seed))
    tuned = ("--base", "base/model", "--chats", "chats.jsonl", "--steps", str(steps), *common)
    runs = {
        "base": (str(pathlib.Path(__file__).resolve()), "--steps", str(base_steps), *common),
        "all parameters": ("sft", *tuned),
        "lora": ("lora", *tuned),
    }
    result = {}
    for name, options in runs.items():
        out = name.split()[0]
        seconds = command(folder, *options, "--out", out)
        model = load(folder / out / "model", dtype="float32")
        result[name] = {
            **accuracy(model, held_out),
            "trained": numbers_trained(folder, *options),
            "difference": difference(folder / out / "model", model),
            "seconds": round(seconds, 1),
        }
        print(name, result[name], flush=True)
    return result


def report(record: dict) -> str:
    """The record for people."""
    rows = [
        (
            name,
            f"{row['form']:.1%}",
            f"{row['right']:.1%}",
            f"{row['trained']:,}",
            "not compared" if row["difference"] is None else f"{row['difference']:.1e}",
        )
        for name, row in record["models"].items()
    ]
    header = ("model", "answers in form", "number right", "parameters trained", "logits from transformers'")
    return (
        f"{HELD_OUT} held-out words; {record['base_steps']} steps on text, {record['steps']} on chats, of 8 x"
        f" 128 tokens, seed {record['seed']}; by `dsv4 train`, `dsv4 train sft` and `dsv4 train lora`.\n\n"
        + study_record.table(header, rows)
    )


def main() -> None:
    """Runs the study and writes its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    record = study_record.stamp("sft_format")
    record |= {"base_steps": given.base_steps, "steps": given.steps, "seed": given.seed}
    with tempfile.TemporaryDirectory() as folder:
        record["models"] = study(pathlib.Path(folder), given.base_steps, given.steps, given.seed)
    print(report(record))
    if given.out is not None:
        study_record.write(given.out, record, report(record))


if __name__ == "__main__":
    main()
