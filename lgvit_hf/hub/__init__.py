"""Other people's checkpoints, and ours on the Hub."""
