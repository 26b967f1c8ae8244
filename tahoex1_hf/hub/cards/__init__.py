# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: facts about a model in a YAML file, and a template that turns them into the text for the Hub."""
