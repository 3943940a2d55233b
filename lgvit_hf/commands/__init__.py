"""What each command does, a file each: a checkpoint in, files out. `lgvit_hf.cli` calls them."""
