"""Grids of runs: a dozen lines of YAML become cells, and cells become ordinary `madformer train` and `madformer evaluate`.

What is done is read from the runs' own folders. The Optuna study beside them only says who does what, so that several drivers
share the work, and tells the story afterwards.
"""
