"""A laboratory for mixed autoregressive/diffusion image generators."""
