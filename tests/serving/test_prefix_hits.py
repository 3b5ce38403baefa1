"""What a prefix hit must be, for blocks of 128 tokens as V4 has them: bit for bit what a cold run computes.

Lengths around the borders of blocks and around 2,048 and 4,096 tokens, prompts that part inside a block,
little room, other tenants, another engine that reads from disk, and files that are torn.
"""

import contextlib
import dataclasses

import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from tests.models import all_kinds

V = 61
BLOCK = 128
# V4's ratios and window, so that its smallest block is 128 tokens.
CONFIG = all_kinds(csa_ratio=4, hca_ratio=128, sliding_window=128, index_topk=16, initializer_range=0.3)
SIZES = EngineSettings(max_length=4224, num_slots=2, num_lanes=2, num_pages=80, num_states=16)
SHORT = dataclasses.replace(SIZES, max_length=640)
ANSWER = Sampling(max_tokens=3, temperature=1.0, seed=3, ignore_eos=True)
LONG = pytest.mark.slow


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.random(CONFIG, Policy.of("float32"))


def prompt(length, seed=0):
    """Prompts of one seed begin alike."""
    return tuple(np.random.default_rng(seed).integers(0, V, 4200)[:length].tolist())


@contextlib.contextmanager
def counting(core):
    """Counts the prompt tokens that lanes compute."""
    computed, append = [0], core._lanes.append

    def counted(chunks):
        computed[0] += sum(chunk.count for chunk in chunks)
        append(chunks)

    core._lanes.append = counted
    try:
        yield computed
    finally:
        core._lanes.append = append


def ask(core, ids, salt=b""):
    """Tokens, the logits after each step bit for bit, and the cached tokens that the first output tells."""
    with counting(core) as computed:
        number = core.add(ids, ANSWER, salt=salt)
        tokens, bits, cached = [], [], 0
        while core.has_work:
            for each, output in core.step():
                assert each == number and output.error is None
                tokens += output.token_ids
                cached = max(cached, output.cached_tokens)
            sequence = core._sequences.get(number)
            if sequence is not None and sequence.stage == "running":
                bits.append(np.asarray(core._slots.logits)[sequence.slot].view(np.int32))
    # What was not cached was computed, and nothing twice.
    assert cached + computed[0] == len(ids)
    core.prefixes.check()
    return tokens, np.stack(bits), cached


def same(one, other):
    assert one[0] == other[0]
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    "length", [127, 128, 129, *(pytest.param(n + d, marks=LONG) for n in (2048, 4096) for d in (-1, 0, 1))]
)
def test_a_hit_is_a_cold_run(lm, length):
    core = EngineCore(lm, SHORT if length < 640 else SIZES)
    ids = prompt(length)
    cold = ask(core, ids)
    ask(core, prompt(300, seed=1))  # an unlike sequence in its lane
    warm = ask(core, ids)
    assert (cold[2], warm[2]) == (0, (length - 1) // BLOCK * BLOCK)
    same(warm, cold)
    # Among others, and from the other lane.
    busy = core.add(prompt(200, seed=2), ANSWER)
    number = core.add(ids, ANSWER)
    together = {busy: [], number: []}
    while core.has_work:
        for each, output in core.step():
            together[each] += output.token_ids
    assert together[number] == cold[0]


@pytest.mark.parametrize(
    "shared, length", [(200, 260), (127, 200), (129, 260), pytest.param(4095, 4150, marks=LONG),
                       pytest.param(2049, 2200, marks=LONG)]
)  # fmt: skip
def test_prompts_that_part_inside_a_block(lm, shared, length):
    core = EngineCore(lm, SHORT if length < 640 else SIZES)
    first = prompt(length)
    others = [(*first[:shared], *((token + more) % V for token in first[shared:])) for more in (1, 2)]
    ask(core, first)
    # The second prompt finds the state where it parts only if one was kept there; the third always does.
    found = [ask(core, other) for other in others]
    assert found[0][2] <= found[1][2] == shared // BLOCK * BLOCK
    for other, warm in zip(others, found, strict=True):
        core.prefixes.clear()
        same(warm, ask(core, other))


@pytest.mark.parametrize("length", [260, pytest.param(2049, marks=LONG)])
def test_under_eviction(lm, length):
    """Room for little more than one of three prompts that come in turn."""
    sizes = SHORT if length < 640 else SIZES
    tight = EngineCore(lm, dataclasses.replace(sizes, num_pages=length // BLOCK + 2, num_states=2))
    bare = EngineCore(lm, dataclasses.replace(sizes, num_pages=0))
    wanted = {seed: None for seed in range(3)}
    for seed in wanted:
        number = bare.add(prompt(length, seed), ANSWER)
        wanted[seed] = [token for _ in iter(lambda: bare.has_work, False) for _, o in bare.step()
                        for token in o.token_ids]  # fmt: skip
        assert number == seed
    found = []
    for seed in (0, 1, 0, 2, 2, 1, 0, 0):
        tokens, _, cached = ask(tight, prompt(length, seed))
        assert tokens == wanted[seed]
        found.append(cached)
    assert tight.prefixes.evictions > 0
    assert found[4] == found[7] == (length - 1) // BLOCK * BLOCK and found[0] == 0


@pytest.mark.parametrize("length", [260, pytest.param(4097, marks=LONG)])
def test_never_across_tenants(lm, length):
    sizes = SHORT if length < 640 else SIZES
    core = EngineCore(lm, dataclasses.replace(sizes, num_pages=100))  # room for what all three ask
    ids = prompt(length)
    answers = [ask(core, ids, salt) for salt in (b"a", b"b", b"", b"a", b"b", b"")]
    whole = (length - 1) // BLOCK * BLOCK
    assert [cached for *_, cached in answers] == [0, 0, 0, whole, whole, whole]
    for answer in answers[1:]:
        same(answer, answers[0])


@pytest.mark.parametrize("length", [385, pytest.param(4097, marks=LONG)])
def test_after_a_restart_and_after_torn_files(lm, tmp_path, length):
    sizes = dataclasses.replace(SHORT if length < 640 else SIZES, disk=tmp_path)
    ids, whole = prompt(length), (length - 1) // BLOCK * BLOCK

    def engine():
        return contextlib.closing(EngineCore(lm, sizes))

    with engine() as core:
        cold = ask(core, ids)
        keys = core.prefixes.keys(ids)
    with engine() as core:
        warm = ask(core, ids)
        assert (cold[2], warm[2]) == (0, whole)
        same(warm, cold)
        assert ask(core, ids, b"other tenant")[2] == 0
    # Torn: the last block is cut short. Nothing but what is before it may be used, and only from a state.
    path = tmp_path / f"{keys[-1].hex()}.block"
    path.write_bytes(path.read_bytes()[:-1])
    with engine() as core:
        torn = ask(core, ids)
        assert torn[2] < whole
        same(torn, cold)
    # It was written again; a state with one bit changed is noticed as well.
    path = tmp_path / f"{keys[-1].hex()}.state"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with engine() as core:
        torn = ask(core, ids)
        assert torn[2] < whole
        same(torn, cold)
    with engine() as core:
        again = ask(core, ids)
        assert again[2] == whole
        same(again, cold)


def test_most_of_a_shared_system_prompt_is_found(lm):
    """300 tokens that every prompt begins with, in blocks of 128: two of them, of all but the first."""
    core = EngineCore(lm, SHORT)
    system, cached = prompt(300), []
    for number in range(40):
        ids = (*system, *prompt(24 - number % 7, seed=100 + number))
        _, _, found = ask(core, ids)
        cached.append(found)
    assert cached == [0, *[256] * 39]
    assert sum(cached) == core.prefixes.hits
    assert sum(cached) / (300 * len(cached)) > 0.8
