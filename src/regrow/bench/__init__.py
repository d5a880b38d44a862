"""Benchmarks as commands: ratios to dense PyTorch in the same process, with the machine they were taken on."""
