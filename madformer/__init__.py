"""A laboratory for mixed autoregressive/diffusion image generators."""

from importlib.metadata import version

__version__ = version("madformer")
