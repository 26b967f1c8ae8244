# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The original program's checkpoints: reading, writing and verifying them."""
