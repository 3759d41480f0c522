"""Attacks: gray-box ones on the target alone, adaptive ones through the defense, and diagnostics of these."""
