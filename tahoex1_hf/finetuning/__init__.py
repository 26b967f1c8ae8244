# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning: recipes, labelled cells, splits, methods (LoRA and others), Trainer, adapters, reports."""
