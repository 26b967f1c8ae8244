# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Indexes of embeddings on disk, in which the cells that are nearest to others are found."""
