"""Training: the LightningModule, its callbacks, and the function that trains a run."""
