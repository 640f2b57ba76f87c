"""A run on the disk: its folder, its checkpoints, atomic writes, import and export."""
