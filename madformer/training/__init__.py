"""Training runs: the LightningModule, its callbacks, and what puts them together."""
