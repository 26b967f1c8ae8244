# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning on cells: their classes, numbers or masked expression."""
