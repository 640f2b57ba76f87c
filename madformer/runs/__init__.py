"""A run on disk: its folder, its checkpoints, atomic writes, import and export."""
