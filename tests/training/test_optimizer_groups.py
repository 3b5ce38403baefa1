"""Which optimiser treats what in a V4 model, its matrices one by one, and the same numbers on a mesh."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv4_jax.config import v4_flash
from dsv4_jax.errors import ProblemsError
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameter_shardings import parameter_shardings
from dsv4_jax.parameters import parameter_at, parameters
from dsv4_jax.training.muon import MUON_ROLES, Muon, matrices_of
from dsv4_jax.training.newton_schulz import orthogonalized
from dsv4_jax.training.optimizer import AdamW, Sgd, split_trainable
from dsv4_jax.training.optimizer_groups import partition, partition_table
from sharding.activations import Placement
from sharding.mesh import AXES
from sharding.rules import TRAIN
from tests.kernels import ahead_of_time
from tests.models import all_kinds

FLOAT32 = Policy.of("float32")
CONFIG = all_kinds(
    attention_kinds=("window", *("csa", "hca") * 4),  # a stack of four repeats
    router_kinds=("hash", *("learned",) * 8),
    num_nextn_predict_layers=1,
)
BARE = Muon(weight_decay=0.0, max_grad_norm=None)


def at(tree, path):
    return functools.reduce(lambda node, key: node[key], path, tree)


def drawn(like, seed=0):
    """Normal numbers of the same shapes, each place its own."""
    leaves, structure = jax.tree.flatten(like)
    rng = np.random.default_rng(seed)
    return structure.unflatten([rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def trained():
    return split_trainable(initial_parameters(CONFIG, FLOAT32, 0))[0]


def once(settings, trained, gradients):
    transform = settings.transform()

    @jax.jit
    def run(trained, gradients):
        return transform.update(gradients, transform.init(trained), trained)[0]

    return jax.device_get(run(trained, gradients))


@pytest.fixture(scope="module")
def updates(trained):
    gradients = drawn(trained)
    return gradients, once(BARE, trained, gradients)


def test_groups_of_the_real_parameter_tree():
    groups = {}
    for each in partition(CONFIG, Muon()):
        groups.setdefault(each.group, set()).add(each.path.rsplit("/")[-1])
    assert groups == {
        "AdamW": {
            "embed", "head", "norm", "attn_norm", "ffn_norm", "q_norm", "kv_norm", "enorm", "hnorm",
            "base", "scale", "attn_sink", "ape",
        },
        "Muon": {
            "fn", "wq_a", "wq_b", "wkv", "wgate", "wo_a", "wo_b", "weight", "weights_proj", "gate_up",
            "down", "e_proj", "h_proj",
        },
        "rule": {"bias", "tid2eid"},
    }  # fmt: skip
    decayed = {each.path.rsplit("/")[-1] for each in partition(CONFIG, Muon()) if each.decayed}
    assert decayed == groups["Muon"] | {"embed", "head"}
    with_norms = {
        each.path.rsplit("/")[-1] for each in partition(CONFIG, Muon(decay_norms=True)) if each.decayed
    }
    assert with_norms - decayed == {name for name in groups["AdamW"] if name.endswith("norm")}
    assert not any(each.decayed for each in partition(CONFIG, Muon(weight_decay=0.0)))
    assert {each.group for each in partition(CONFIG, AdamW())} == {"AdamW", "rule"}
    assert {each.group for each in partition(CONFIG, Sgd())} == {"SGD", "rule"}


def test_matrices_of_flash_are_those_of_its_checkpoint_and_of_the_equations():
    config = v4_flash()
    found = {each.path: each.matrices for each in partition(config, Muon())}
    whole = Muon(by_branch=False, by_group=False, by_map=False)
    unparted = {each.path: each.matrices for each in partition(config, whole)}
    csa = next(path for path in found if path.endswith("attn/indexer/wq_b")).removesuffix("indexer/wq_b")
    root = csa.removesuffix("attn/")
    repeats = parameters(config)[(*(int(k) if k.isdigit() else k for k in csa.split("/")[:-1]), "wkv")].shape[
        0
    ]
    c = config
    expected = {
        "attn/wq_b": (repeats, c.num_attention_heads * c.head_dim, c.q_lora_rank),
        "attn/wo_b": (repeats, c.hidden_size, c.o_groups * c.o_lora_rank),
        "ffn/experts/gate_up": (2 * repeats * c.n_routed_experts, c.moe_intermediate_size, c.hidden_size),
        "ffn/experts/down": (repeats * c.n_routed_experts, c.hidden_size, c.moe_intermediate_size),
        "ffn/gate/weight": (repeats, c.n_routed_experts, c.hidden_size),
    }
    for path, matrices in expected.items():
        assert found[root + path] == unparted[root + path] == (matrices,)
    branch = (2 * repeats, c.head_dim, c.hidden_size)
    group = (repeats * c.o_groups, c.o_lora_rank, c.num_attention_heads // c.o_groups * c.head_dim)
    streams, wide = c.hc_mult, c.hc_mult * c.hidden_size
    assert found[csa + "compressor/wkv"] == found[csa + "compressor/wgate"] == (branch,)
    assert unparted[csa + "compressor/wkv"] == ((repeats, 2 * c.head_dim, c.hidden_size),)
    assert found[csa + "wo_a"] == (group,)
    assert unparted[csa + "wo_a"] == ((repeats, c.o_groups * c.o_lora_rank, group[2]),)
    maps = tuple((repeats, rows, wide) for rows in (streams, streams, streams**2))
    assert found[root + "hc_attn/fn"] == maps
    assert unparted[root + "hc_attn/fn"] == ((repeats, streams * (2 + streams), wide),)
    assert found["hc_head/fn"] == ((1, streams, wide),)


def matrices_alone(path, array):
    """(where in the array, that part, the same as a matrix) of each matrix that the equations have there."""
    *_, block, last = ("", *path)
    lead = 1 if path[0] == "stacks" or "block" in path else 0
    counts = {"wq_b": (lead, 3 if block == "attn" else 2), "wo_a": (lead + 1, 1), "fn": (lead, 1)}
    counts |= {"gate_up": (lead + 1 + (block == "experts"), 1), "down": (lead + (block == "experts"), 1)}
    if block == "compressor":
        counts |= {"wkv": (lead + 1, 1), "wgate": (lead + 1, 1)}
    stack, rows = counts.get(last, (lead, 1))
    for index in np.ndindex(array.shape[:stack]):
        matrix = array[index]
        if last == "fn" and len(matrix) > matrix.shape[1]:
            n = matrix.shape[1]
            cuts = [slice(0, n), slice(n, 2 * n), slice(2 * n, None)]  # pre, post, comb
        else:
            cuts = [slice(None)]
        for cut in cuts:
            part = matrix[cut]
            yield (*index, cut), part, part.reshape(np.prod(part.shape[:rows]), -1)


def test_every_matrix_alone_gives_what_the_stacks_give(updates):
    gradients, got = updates
    alone = jax.jit(lambda matrix: orthogonalized(1.95 * matrix))
    compared = 0
    for each in partition(CONFIG, BARE):
        if each.group != "Muon" or not re.match(r"stacks/1/blocks/0|mtp|hc_head", each.path):
            continue  # a repeated CSA layer, the MTP block and the last collapse have everything
        path = tuple(int(key) if key.isdigit() else key for key in each.path.split("/"))
        for place, shaped, matrix in matrices_alone(path, at(gradients, path)):
            want = 0.18 * np.sqrt(max(matrix.shape)) * np.asarray(alone(matrix)).reshape(shaped.shape)
            np.testing.assert_allclose(at(got, path)[place], want, rtol=0, atol=2e-5, err_msg=each.path)
            np.testing.assert_allclose(np.sqrt(np.mean(want**2)), 0.18, rtol=2e-3)
            compared += 1
    assert compared == sum(
        count
        for each in partition(CONFIG, BARE)
        if re.match(r"stacks/1/blocks/0|mtp|hc_head", each.path)
        for count, _, _ in each.matrices
    )


def test_the_rest_is_adam_and_decay_is_added(trained, updates):
    gradients, got = updates
    np.testing.assert_allclose(got["embed"], np.sign(gradients["embed"]), rtol=1e-5)
    decayed = once(Muon(max_grad_norm=None), trained, gradients)
    for path in (("embed",), ("norm",), ("stacks", 0, "blocks", 0, "attn", "wo_a")):
        decay = 0.0 if path == ("norm",) else 0.1
        np.testing.assert_allclose(at(decayed, path), at(got, path) + decay * at(trained, path), rtol=1e-6)


def test_the_clip_is_of_all_gradients_together(trained, updates):
    gradients, got = updates
    clipped = Muon(weight_decay=0.0).transform()
    state = jax.jit(lambda *arguments: clipped.update(*arguments)[1])(
        gradients, clipped.init(trained), trained
    )
    momentum = [np.square(leaf).sum() for leaf in jax.tree.leaves(state[1].inner_states["Muon"])]
    norms = {
        group: sum(
            np.square(at(gradients, tuple(int(k) if k.isdigit() else k for k in each.path.split("/")))).sum()
            for each in partition(CONFIG, BARE)
            if each.group == group
        )
        for group in ("Muon", "AdamW")
    }
    np.testing.assert_allclose(sum(momentum), norms["Muon"] / sum(norms.values()), rtol=1e-4)


def test_the_table_for_people_says_everything_once():
    text = partition_table(CONFIG, Muon())
    lines = text.splitlines()
    assert lines[0].split() == ["parameter", "shape", "group", "decay", "matrices"]
    assert [line.split()[0] for line in lines[1:-3]] == [
        "/".join(map(str, path)) for path in parameters(CONFIG)
    ]
    (fn,) = [line for line in lines if line.startswith("stacks/1/blocks/0/hc_attn/fn ")]
    assert re.search(r"Muon +yes +4 of 4 x \d+ \+ 4 of 4 x \d+ \+ 4 of 16 x \d+$", fn)
    total = sum(int(re.search(r"([\d,]+) numbers", line)[1].replace(",", "")) for line in lines[-3:])
    assert total == sum(parameter.size for parameter in parameters(CONFIG).values())


def test_settings_are_keys_of_programs_and_refuse_nonsense():
    assert Muon() == Muon() and hash(Muon()) == hash(Muon()) and Muon() != Muon(by_map=False)
    with pytest.raises(ProblemsError, match="momentum=2"):
        Muon(momentum=2)


def test_a_parameter_is_known_by_place_and_shape():
    for path, parameter in parameters(CONFIG).items():
        assert parameter_at(path, parameter.shape) == parameter
    with pytest.raises(ValueError, match=r"embed is \[V D\], not an array of \(3,\)"):
        parameter_at(("embed",), (3,))
    with pytest.raises(ValueError, match="e_proj"):
        parameter_at(("mtp", 0, "e_proj"), (3, 4))  # D twice
    with pytest.raises(KeyError):
        parameter_at(("nothing",), (3,))


MESHES = ["fsdp=8", "expert=8", "data=2,fsdp=2,expert=2", "fsdp=2,expert=2,tensor=2"]


def on_mesh(mesh, settings=BARE):
    """(compiled update, its arguments) on eight devices."""
    spread = LanguageModel.random(CONFIG, FLOAT32, mesh=mesh, rules="train")
    trained, _ = split_trainable(spread.parameters)
    gradients = jax.tree.map(lambda g, leaf: jax.device_put(g, leaf.sharding), drawn(trained), trained)
    transform = settings.transform(spread.network.placement)
    state = transform.init(trained)

    def step(trained, state, gradients):
        return transform.update(gradients, state, trained)

    return jax.jit(step).lower(trained, state, gradients).compile(), (trained, state, gradients)


def split_shapes(trained, config=CONFIG):
    """Shapes of matrices with the mesh axes of their dims, of those that are split."""
    found = set()
    for path, parameter in parameters(config).items():
        if parameter.role in MUON_ROLES:
            reading = matrices_of(parameter, BARE)
            spec = at(trained, path).sharding.spec
            axes = (*spec, *[None] * (len(parameter.shape) - len(spec)))[reading.num_stack :]
            rest = parameter.shape[reading.num_stack + 1 :]
            firsts = reading.sections or parameter.shape[reading.num_stack : reading.num_stack + 1]
            found |= {(first, *rest, axes) for first in firsts if any(axes)}
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_are_one_and_exchange_once_each_way(mesh, updates):
    compiled, arguments = on_mesh(mesh)
    got, state = compiled(*arguments)
    for (path, want), mine in zip(
        jax.tree_util.tree_leaves_with_path(updates[1]), jax.tree.leaves(jax.device_get(got)), strict=True
    ):
        limit = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=limit, err_msg=jax.tree_util.keystr(path))
    text = compiled.as_text()
    counts = {
        name: len(re.findall(rf"= .*\b{name}(?:-start)?\(", text))
        for name in ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
    }
    exchanges = counts.pop("all-to-all")
    assert not any(counts.values()), counts
    assert exchanges == 2 * len(split_shapes(arguments[0]))
    assert bool(exchanges) == ("fsdp" in mesh)


@pytest.mark.slow
def test_a_tpu_exchanges_once_each_way():
    """The compiler for CPUs proves values, not traffic: what a TPU's does, with bfloat16 iterations."""
    config = all_kinds()
    mesh = Mesh(np.array(ahead_of_time.devices("v6e")).reshape(1, 4, 1, 1, 1), AXES)
    placement = Placement(mesh, TRAIN)
    shapes, _ = split_trainable(Network(config, FLOAT32).shapes())
    transform = Muon(weight_decay=0.0, max_grad_norm=None, compute_dtype="bfloat16").transform(placement)
    leaves, structure = jax.tree.flatten(shapes)
    placed = parameter_shardings(config, mesh, TRAIN.parameters, "a test")
    found = jax.tree_util.tree_flatten_with_path(shapes)[0]
    shardings = [placed[tuple(key.key for key in path)] for path, _ in found]

    def update(*gradients):
        gradients = structure.unflatten(gradients)
        return jax.tree.leaves(transform.update(gradients, transform.init(gradients), gradients)[0])

    text = ahead_of_time.compile_on(update, leaves, shardings).as_text()
    names = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
    counts = {name: len(re.findall(rf"= .*\b{name}(?:-start)?\(", text)) for name in names}
    assert re.search(r"= bf16\[.*\ball-to-all", text)
    tree = structure.unflatten(
        [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
            for leaf, s in zip(leaves, shardings, strict=True)
        ]
    )
    assert counts == dict.fromkeys(names, 0) | {"all-to-all": 2 * len(split_shapes(tree, config))}
