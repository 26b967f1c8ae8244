# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks of embeddings on labelled cells and genes, beside simple baselines that decide what they are worth."""
