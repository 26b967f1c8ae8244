# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Judging released weights by public embeddings of public cells: `tahoex1 verify-release`."""
