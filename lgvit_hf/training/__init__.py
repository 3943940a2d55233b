"""Stage one and stage two of highway training, on transformers' Trainer."""
