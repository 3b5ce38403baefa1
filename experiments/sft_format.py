"""Does fine-tuning on chats teach a small model a form of answer, in all its parameters and by LoRA?

    python -m experiments.sft_format [--base-steps 300] [--steps 200] [--out FILE]

A small model is trained on Python's own sources, then on generated chats about the letters of words
("Answer: 5 letters."), once in all its parameters and once by LoRA of rank 8. Words of the questions at the
end were in no chat. Form is what is scored, and beside it whether the number is right, which so small a model
need not learn.
"""

import argparse
import json
import pathlib
import re
import tempfile
import time

import jax
import numpy as np

from dsv4_jax.config import tiny
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import LORA
from dsv4_jax.training.chat_records import QUICKSTART_CHAT, ChatEncoder
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.data import BatchStream
from dsv4_jax.training.lora import Lora, LoraNetwork, lora_state, merged, with_lora
from dsv4_jax.training.optimizer import AdamW, Schedule
from dsv4_jax.training.sources import ChatFiles, StandardLibrary
from dsv4_jax.training.step import Rates, StepSettings, TrainState, initial_state, train_step
from dsv4_jax.training.tokenizer import EOS_ID, TextEncoder, train_tokenizer

CONFIG = tiny(
    4,
    vocab_size=512,
    hidden_size=64,
    attention_kinds=("window", "csa", "hca"),
    router_kinds=("hash", "learned", "learned"),
    num_nextn_predict_layers=0,
    initializer_range=0.05,
)
POLICY = Policy.of("float32")
BATCH_SIZE, SEQ_LEN = 8, 128
FORM = re.compile(r"Answer: (\d+) letters\.")
LORA_SETTINGS = Lora(8, 16.0, ("*/attn/w*", "*/ffn/experts/*", "*/ffn/shared/*", "head"))
HELD_OUT = 200


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


def trained(
    network: Network | LoraNetwork, state: TrainState, stream: BatchStream, steps: int, peak: float, name: str
) -> TrainState:
    """The state after so many steps; routers of a fine-tuned model stay balanced as they were."""
    settings = StepSettings(AdamW(weight_decay=0.0))
    schedule = Schedule(peak, steps)
    speed = np.float32(1e-3 if name == "base" else 0)
    start = time.monotonic()
    for step in range(steps):
        rates = Rates(np.float32(schedule.learning_rate(step)), bias_speed=speed)
        state, report = train_step(network, settings, state, next(stream), rates)
        if step % 25 == 0 or step + 1 == steps:
            seconds = time.monotonic() - start
            print(f"{name} {step}: {float(report.main):.3f} nats, {seconds:.0f} s", flush=True)
    return state


def accuracy(model: LanguageModel, encoder: ChatEncoder, asked: list[str]) -> dict[str, float]:
    """Shares of answers in the right form, and with the right number too."""
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


def study(base_steps: int, steps: int, seed: int) -> dict:
    """The whole experiment, as one JSON object."""
    corpus = gather_corpus(1_000_000)
    order = words(seed)
    held_out, taught = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + 3000]
    texts = [document.text for document in corpus.train]
    texts += [message["content"] for word in taught for message in chat(word)]
    tokenizer = train_tokenizer(texts, CONFIG.vocab_size)
    encoder = ChatEncoder(TextEncoder(tokenizer), QUICKSTART_CHAT)
    network = Network(CONFIG, POLICY)

    def scored(parameters: dict) -> dict[str, float]:
        return accuracy(LanguageModel(CONFIG, POLICY, parameters, tokenizer), encoder, held_out)

    stream = StandardLibrary(1_000_000).open(tokenizer, BATCH_SIZE, SEQ_LEN, seed)
    state = initial_state(initial_parameters(CONFIG, POLICY, seed), AdamW(weight_decay=0.0))
    base = jax.tree.map(np.asarray, trained(network, state, stream, base_steps, 4e-3, "base").params)
    result = {"base": scored(jax.tree.map(jax.numpy.asarray, base))}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "chats.jsonl")
        path.write_text("".join(json.dumps({"messages": chat(word)}) + "\n" for word in taught))
        source = ChatFiles((str(path),))
        for name in ("all parameters", "lora"):
            chats = source.open(tokenizer, BATCH_SIZE, SEQ_LEN, seed)
            start = jax.tree.map(jax.numpy.asarray, base)
            if name == "lora":
                small = with_lora(network, LORA_SETTINGS)
                state = lora_state(small, start, seed, AdamW(weight_decay=0.0))
                num_trained = sum(leaf.size for leaf in jax.tree.leaves(state.trained[LORA]))
                after = merged(small, trained(small, state, chats, steps, 4e-3, name).params)
            else:
                state = initial_state(start, AdamW(weight_decay=0.0))
                num_trained = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
                after = trained(network, state, chats, steps, 2e-3, name).params
            result[name] = {**scored(after), "trained": num_trained}
    return result


def main() -> None:
    """Runs the study and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    result = study(given.base_steps, given.steps, given.seed)
    lines = [
        f"{HELD_OUT} held-out words; {given.base_steps} steps on text, {given.steps} on chats, "
        f"of {BATCH_SIZE} x {SEQ_LEN} tokens, seed {given.seed}.",
        "",
        "| model | answers in form | number right | parameters trained |",
        "|---|---|---|---|",
    ]
    for name, row in result.items():
        lines.append(f"| {name} | {row['form']:.1%} | {row['right']:.1%} | {row.get('trained', '')} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
