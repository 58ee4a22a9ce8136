"""The parts of `make gpu-check` (tests/benchmarks/gpu_check.py)."""
