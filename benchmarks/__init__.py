"""The benchmark suite, installed as ``fusedrnn.benchmarks``: ``python -m fusedrnn bench``."""
