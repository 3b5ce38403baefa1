"""Kernels: one family a folder, each an operation with a contract, a reference and faster formulations.

Nothing here imports the rest of the project, reads the environment or asks which device it runs on.
"""
