"""The DSpark draft head against its specification, written out once more in torch."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch

from dsv4_jax.config import DSpark
from dsv4_jax.inference import steps
from dsv4_jax.inference.sampling import request_keys
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from tests.kernels import hyper_connection_torch as hyper
from tests.model.telling_weights import telling_model
from tests.models import all_kinds
from tests.parity import torch_qat

CONFIG = all_kinds(
    num_nextn_predict_layers=0, sliding_window=6, dspark=DSpark(5, 60, (2, 0, 1), 7), hc_sinkhorn_iters=4
)
LENGTHS = (1, 2, 5, 6, 7, 19)
"""Of prompts: one ring row, shorter than, as long as and longer than the window of 6."""


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return telling_model(CONFIG, 5)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(8)
    return [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in LENGTHS]


def backbone(lm, prompts) -> list[tuple[np.ndarray, int]]:
    """Of each prompt, the streams [L, n, N, D] after each layer, and the greedy next token."""
    tokens = np.zeros((len(prompts), max(LENGTHS)), np.int32)
    for line, prompt in zip(tokens, prompts, strict=True):
        line[: len(prompt)] = prompt
    streams = np.asarray(lm.streams(tokens, LENGTHS))
    logits = np.asarray(lm.logits(tokens, LENGTHS))
    return [(streams[1:, row, :n], int(logits[row, n - 1].argmax())) for row, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def seen(lm, prompts) -> list[tuple[np.ndarray, int]]:
    return backbone(lm, prompts)


def tensors(tree):
    return jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), tree)


def rms(x, weight=None):
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + CONFIG.rms_norm_eps)
    return y if weight is None else y * weight


def rope(x, position: int, sign: int = 1):
    """One position's vectors: pairs of the last Dr channels, theta 10000, no YaRN."""
    x, width = x.clone(), CONFIG.qk_rope_head_dim
    for pair in range(width // 2):
        angle = sign * position * CONFIG.rope_theta ** (-2 * pair / width)
        a, b = x.shape[-1] - width + 2 * pair, x.shape[-1] - width + 2 * pair + 1
        even, odd = x[..., a].clone(), x[..., b].clone()
        x[..., a] = even * math.cos(angle) - odd * math.sin(angle)
        x[..., b] = even * math.sin(angle) + odd * math.cos(angle)
    return x


def experts(x, ffn):
    """Learned routing of one token, and the shared expert."""

    def swiglu(gate_up, down):
        c = CONFIG.swiglu_limit
        gate, up = (gate_up[0] @ x).clamp(max=c), (gate_up[1] @ x).clamp(-c, c)
        return down @ (torch.nn.functional.silu(gate) * up)

    scores = torch.sqrt(torch.nn.functional.softplus(ffn["gate"]["weight"] @ x))
    chosen = torch.topk(scores + ffn["gate"]["bias"], CONFIG.num_experts_per_tok).indices
    weights = scores[chosen] / scores[chosen].sum() * CONFIG.routed_scaling_factor
    routed = [
        w * swiglu(ffn["experts"]["gate_up"][e], ffn["experts"]["down"][e])
        for w, e in zip(weights, chosen, strict=True)
    ]
    return sum(routed) + swiglu(ffn["shared"]["gate_up"], ffn["shared"]["down"])


def sublayer(streams, hc, norm, function):
    """All slots: streams [K, N, D]; the function takes and returns [K, D]."""
    sizes = CONFIG.hc_sinkhorn_iters, CONFIG.hc_eps, CONFIG.rms_norm_eps
    entered = [hyper.pre(x, hc["fn"], hc["base"], hc["scale"], norm, *sizes) for x in streams]
    update = function(torch.stack([each[0] for each in entered]))
    return torch.stack(
        [
            hyper.post(x, y, post, comb)
            for x, y, (_, _, post, comb) in zip(streams, update, entered, strict=True)
        ]
    )


def draft_attention(x, attn, ring, first: int, rounded):
    """Every slot sees all of the ring and all of the block."""
    heads, width = CONFIG.num_attention_heads, CONFIG.head_dim
    own = [rounded(rope(rms(attn["wkv"] @ row, attn["kv_norm"]), first + i)) for i, row in enumerate(x)]
    keys = torch.stack([*ring, *own])
    out = []
    for i, row in enumerate(x):
        q = attn["wq_b"].reshape(heads, width, -1) @ rms(attn["wq_a"] @ row, attn["q_norm"])
        q = rope(rms(q), first + i)
        logits = torch.cat([q @ keys.T * width**-0.5, attn["attn_sink"].reshape(-1, 1)], dim=1)
        o = rope(torch.softmax(logits, dim=1)[:, :-1] @ keys, first + i, sign=-1)
        grouped = torch.einsum("gojd,gjd->go", attn["wo_a"], o.reshape(CONFIG.o_groups, -1, width))
        out.append(torch.einsum("dgo,go->d", attn["wo_b"], grouped))
    return torch.stack(out)


def drafted(parameters, streams, token: int, rounded=lambda entry: entry):
    """ids, corrected logits and confidences after `token`, from the streams [L, n, N, D] after each layer;
    `rounded` is what the cache makes of an entry."""
    head, dspark = tensors(parameters["dspark"]), CONFIG.dspark
    stages = [jax.tree.map(lambda leaf, s=s: leaf[s], head["stages"]) for s in range(3)]
    embed, out = (torch.tensor(np.asarray(parameters[name])) for name in ("embed", "head"))
    captured = torch.cat([torch.tensor(streams[layer]).mean(1) for layer in dspark.target_layer_ids], dim=1)
    main = rms(captured @ head["main_proj"].reshape(CONFIG.hidden_size, -1).T, head["main_norm"])
    n = len(main)
    near = range(max(0, n - CONFIG.sliding_window), n)
    rings = [
        [rounded(rope(rms(stage["attn"]["wkv"] @ main[p], stage["attn"]["kv_norm"]), p)) for p in near]
        for stage in stages
    ]
    ids = [token] + [dspark.noise_token_id] * (dspark.block_size - 1)
    x = embed[ids][:, None].repeat(1, CONFIG.hc_mult, 1)
    for stage, ring in zip(stages, rings, strict=True):
        attend = lambda u, s=stage, ring=ring: draft_attention(u, s["attn"], ring, n, rounded)  # noqa: E731
        x = sublayer(x, stage["hc_attn"], stage["attn_norm"], attend)
        route = lambda u, stage=stage: torch.stack([experts(row, stage["ffn"]) for row in u])  # noqa: E731
        x = sublayer(x, stage["hc_ffn"], stage["ffn_norm"], route)
    collapse = head["hc_head"]
    weights = collapse["fn"], collapse["base"], collapse["scale"], CONFIG.hc_eps, CONFIG.rms_norm_eps
    h = torch.stack([hyper.collapse(row, *weights) for row in x])
    base, previous, found = rms(h, head["norm"]) @ out.T, token, []
    for i in range(dspark.block_size):
        e = head["markov_w1"][previous]
        logits = base[i] + head["markov_w2"] @ e
        previous = int(logits.argmax())
        found.append((previous, logits, head["confidence"][0] @ torch.cat([h[i], e])))
    ids, logits, confidence = zip(*found, strict=True)
    return np.array(ids), torch.stack(logits).numpy(), torch.stack(confidence).numpy()


def worst_difference(lm, prompts, seen, rounded=lambda entry: entry) -> float:
    """Relative to the largest number, of logits and confidences; ids are equal."""
    ids, logits, confidence = (np.asarray(x) for x in lm.draft_block(prompts))
    assert ids.shape == (len(prompts), 5) and logits.shape == (*ids.shape, CONFIG.vocab_size)
    assert confidence.shape == ids.shape and logits.dtype == confidence.dtype == np.float32
    worst = 0.0
    for row, (streams, token) in enumerate(seen):
        want = drafted(lm.parameters, streams, token, rounded)
        np.testing.assert_array_equal(ids[row], want[0])
        for got, expected in ((logits[row], want[1]), (confidence[row], want[2])):
            worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
    return worst


def test_the_head_equals_the_specification(lm, prompts, seen, record_property):
    worst = worst_difference(lm, prompts, seen)
    record_property("worst_relative_difference", worst)
    assert worst < 1e-5


def test_keys_in_fp8_are_rounded_once(lm, prompts):
    """As the specification's QDQ8 with 64 channels to a scale; rotary channels in bfloat16. The bound is
    wider: a number on the border of two may round the other way when its last bit differs."""

    def rounded(entry):
        plain = CONFIG.head_dim - CONFIG.qk_rope_head_dim
        return torch.cat([torch_qat.qdq8(entry[:plain], 64), torch_qat.bf16(entry[plain:])])

    quantised = LanguageModel(CONFIG, Policy.of("float32", cache="fp8+fp8"), lm.parameters)
    seen = backbone(quantised, prompts)
    assert worst_difference(quantised, prompts, seen, rounded) < 1e-4
    with pytest.raises(AssertionError):  # ids, or logits
        assert worst_difference(quantised, prompts, seen) < 5e-4


@pytest.mark.parametrize("change", ["capture", "window", "noise", "stages"])
def test_the_comparison_would_see_a_mistake(lm, prompts, seen, monkeypatch, change):
    """What gives no error in a served model: a wrong layer, a short ring, another id, a stage missed."""
    streams, token = seen[-1]
    logits = np.asarray(lm.draft_block(prompts)[1])[-1]
    parameters, dspark = dict(lm.parameters), CONFIG.dspark
    changes = {
        "capture": {"dspark": dataclasses.replace(dspark, target_layer_ids=(0, 1, 2))},
        "window": {"sliding_window": CONFIG.sliding_window - 1},
        "noise": {"dspark": dataclasses.replace(dspark, noise_token_id=0)},
        "stages": {},
    }[change]
    if change == "stages":
        turned = jax.tree.map(lambda leaf: np.asarray(leaf)[[0, 2, 1]], parameters["dspark"]["stages"])
        parameters["dspark"] = parameters["dspark"] | {"stages": turned}
    monkeypatch.setattr(f"{__name__}.CONFIG", dataclasses.replace(CONFIG, **changes))
    assert np.abs(drafted(parameters, streams, token)[1] - logits).max() > 1e-2


def test_rings_are_the_same_however_tokens_came(lm, prompts):
    """In one call, in pieces, and after tokens that were taken back."""
    prompt = np.zeros((1, 20), np.int32)
    prompt[0, :19] = prompts[-1]
    numbers = np.zeros(1, np.float32), np.ones(1, np.float32)
    drawing = np.array([3], np.int32), request_keys(0, 1), *numbers

    def logits(size: int, wrong: bool = False):
        cache = lm.new_cache(1, 32, dspark=True)
        for start in range(0, 19, size):
            count = min(size, 19 - start)
            if wrong:
                other = (prompt[:, start : start + size] + 1) % CONFIG.vocab_size
                cache = lm.extend(cache, other)[1].rewind(size)
            _, cache = lm.extend(cache, prompt[:, start : start + size], [count])
        assert cache.length.tolist() == [19]
        return np.asarray(steps.draft_block(lm.network, lm.parameters, cache, *drawing)[1])

    pieces = logits(5)
    np.testing.assert_allclose(pieces, logits(20), rtol=0, atol=2e-5 * np.abs(pieces).max())
    np.testing.assert_array_equal(logits(5, wrong=True), pieces)


def test_what_has_no_head_is_refused():
    lm = LanguageModel.random(dataclasses.replace(CONFIG, dspark=None), Policy.of("float32"))
    with pytest.raises(ValueError, match="no DSpark draft head"):
        lm.draft_block([[1, 2]])
    with pytest.raises(ValueError, match="no DSpark draft head"):
        lm.new_cache(1, 8, dspark=True)


@pytest.mark.slow
def test_a_new_model_drafts():
    lm = LanguageModel.random(CONFIG, Policy.of("bfloat16"))
    ids, logits, confidence = lm.draft_block(np.array([[1, 2, 3]], np.int32))
    assert ids.shape == (1, 5) and np.isfinite(np.asarray(logits)).all()
    assert (np.asarray(confidence) != 0).all()
