"""Measurements: speed and quality. Not part of the package; run from the repository, e.g. ``python -m benchmarks.speed``."""
