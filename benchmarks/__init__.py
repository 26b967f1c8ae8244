"""Speed of the package beside the speed of the machine, measured in the same run: `python -m benchmarks`."""
