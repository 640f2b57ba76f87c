"""The Hugging Face hub: what a repository holds, or why it cannot be had."""

from __future__ import annotations

from madformer.importing import first_line

__all__ = ["explain", "list_files"]

_TIMEOUT = 10.0
"""Seconds until a hub that does not answer is given up."""


def list_files(repository: str) -> frozenset[str]:
    """Paths of all files of a model's repository.

    This is the one request that the library does not repeat for half a minute where there is no network.

    Raises:
        Exception: the network's or the hub's; `explain` says what it means.
    """
    from huggingface_hub import HfApi

    return frozenset(file.rfilename for file in HfApi().model_info(repository, timeout=_TIMEOUT).siblings or [])


def explain(error: Exception) -> str:
    """Why a repository cannot be had, in a line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "its owner must grant access first (accept the terms on its page, then `hf auth login`)"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or it is private (`hf auth login`)"
    return first_line(error)
