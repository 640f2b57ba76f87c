"""Training data: image sources, codecs, latents, prompts, and the DataModule that reads them."""
