"""A run on the disk: its folder, its checkpoints, files that are whole or not there."""
