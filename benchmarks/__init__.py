"""Measure the speed of the package beside the speed of the machine, in the same run: `python -m benchmarks`."""
