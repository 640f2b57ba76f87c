"""The diffusion process: noise schedule and prediction types, samplers, losses."""
