# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A page about cells and their embeddings that a person can hand on."""
