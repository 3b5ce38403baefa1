"""Sizes that `decode_attention` chooses: they fit VMEM, and rows are gathered where that pays."""

import pytest

from pallas_kernels.decode_attention import kernel_sparse_core, sparse_core
from pallas_kernels.decode_attention.tuning import (
    VMEM_LIMIT,
    Geometry,
    choose_blocks,
    gather_pays,
    rows_pay,
)


@pytest.mark.parametrize(("row_bytes", "rows"), [(1024, 64), (2048, 32), (100, 128), (2**20, 16)])
def test_chunks_fit_a_subcore(row_bytes, rows):
    assert kernel_sparse_core.chunk_rows(row_bytes) == rows


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("heads", [64, 128])
def test_chosen_blocks_fit(heads, length):
    sizes = dict(queries=length, heads=heads, width=512, slots=136, itemsize=4)
    for num_entries, num_chosen in ((0, None), (8192, None), (4000, 1024)):
        blocks = choose_blocks(**sizes, num_entries=num_entries, num_chosen=num_chosen)
        masked = num_chosen is not None
        g = Geometry(64, length, heads, 512, 136, num_entries, 4, masked, False, False, blocks)
        assert g.vmem_bytes() <= VMEM_LIMIT
    with pytest.raises(ValueError, match="no legal block fits"):
        choose_blocks(**sizes | {"slots": 2**16}, num_entries=0, num_chosen=None)
    lists = dict(heads=heads, width=512, slots=136, num_chosen=1024, itemsize=2)
    blocks = sparse_core.blocks(**lists)
    assert sparse_core.vmem_bytes(queries=blocks.sequences, **lists, quantized_ring=False) <= VMEM_LIMIT
    with pytest.raises(ValueError, match="no query fits"):
        sparse_core.blocks(**lists | {"num_chosen": 2**15})


def test_gathering_pays_for_long_lists_of_entries():
    one = dict(rows=64, num_chosen=512, itemsize=2)
    assert not gather_pays(queries=1, num_entries=3908, **one)
    assert gather_pays(queries=1, num_entries=3910, **one)
    assert not gather_pays(queries=1, num_entries=3911, **one)  # no pairs
    assert not gather_pays(queries=3, num_entries=6142, **one | {"rows": 192})
    assert gather_pays(queries=3, num_entries=6146, **one | {"rows": 192})


def test_rows_pay_for_long_lists_of_fp8_entries():
    assert not rows_pay(rows=64, num_entries=3584, num_chosen=512)
    assert rows_pay(rows=64, num_entries=3585, num_chosen=512)
    shape = dict(queries=1, heads=64, width=512, slots=136, num_entries=600, num_chosen=512, itemsize=2)
    assert choose_blocks(**shape, in_rows=True).gather
    assert not choose_blocks(**shape, quantized=True).gather
