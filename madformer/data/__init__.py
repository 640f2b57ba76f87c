"""Images and latents that models are trained on and compared with."""
