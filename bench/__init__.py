"""Benchmarks, side by side with QEMU: ``python -m bench`` or ``python bench/run.py``."""
