"""What a highway gains: tables of exit logits, metrics, costs and wall-clock."""
