# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tools that all training runs share: checkpoints, resuming, reports."""
