"""Paired measurements against rivals; `python -m benchmarks.run --help`."""
