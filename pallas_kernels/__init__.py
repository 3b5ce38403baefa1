"""Kernels, one family a folder: contract, plain reference, fast formulations. They import nothing of ours."""
