"""Evaluation of a run: samples, metrics and their record, diagnostics, curves in TensorBoard."""
