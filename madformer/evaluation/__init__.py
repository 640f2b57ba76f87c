"""How good the samples are, and everything that made the number."""
