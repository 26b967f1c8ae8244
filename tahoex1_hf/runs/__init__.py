# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""What every training run shares: checkpoints, resuming, reports."""
