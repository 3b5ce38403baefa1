"""The number formats of weights, cache entries and index keys: what their bytes mean, and nobody else knows.

    e4m3.py, e2m1.py   elements of eight and of four bits
    e8m0.py            the powers of two that groups of elements share
    sizes.py           how many elements share a scale
    blocks.py          arrays of elements and scales: `Fp8Blocks`, `Fp8Groups`, `Mxfp4`
    on_host.py         the same in numpy, for tensors of files
    weights.py         a parameter of a model that is held in blocks
    entries.py, entry_rows.py, index_keys.py   what a cache keeps
    bits.py            FP8 and bfloat16 numbers as integers

The first three have the value behind every code (`value`), the way back, the forms that loops and kernels use
where those are faster (a test compares them with `value` for every code), and a table for numpy.
"""
