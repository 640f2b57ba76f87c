"""Sweeps: a few lines of YAML become cells, and each cell becomes ordinary `madformer train` and `madformer evaluate`.

The runs' own folders tell what is done. The Optuna study only says which process does what, so that several drivers can share
the work, and keeps the history.
"""
