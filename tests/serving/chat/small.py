"""A tokenizer of one token a byte and the control tokens of V4, and a model that fits it."""

import functools

import tokenizers

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.chat import control, tokens
from tests.models import compressed_kinds

ADDED = (*control.CONTROL, "<｜▁pad▁｜>")
FIRST_ADDED = 256
IDS = {text: FIRST_ADDED + index for index, text in enumerate(ADDED)}


def tokenizer(added=ADDED) -> tokenizers.Tokenizer:
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({each: i for i, each in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = (control.BOS, control.EOS, "<｜▁pad▁｜>")  # the others are not, as in the released ones
    for text in added:
        token = tokenizers.AddedToken(text, special=text in special, normalized=False)
        (made.add_special_tokens if text in special else made.add_tokens)([token])
    return made


def chat_tokenizer(added=ADDED) -> tokens.ChatTokenizer:
    return tokens.chat_tokenizer(tokenizer(added), IDS[control.BOS], (IDS[control.EOS],))


@functools.cache
def model() -> LanguageModel:
    config = compressed_kinds(bos_token_id=IDS[control.BOS], eos_token_id=IDS[control.EOS])
    made = LanguageModel.random(config, Policy.of("float32"), seed=1)
    made.tokenizer = tokenizer()
    return made
