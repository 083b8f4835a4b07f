"""Flat training loops for the tiny base model: ordinary Tinker programs that name nothing of tinker_hpc.

For anything larger use tinker-cookbook, unmodified. These are here because documentation, tests and benchmarks need
loops that are short, seeded, and known to learn.
"""
