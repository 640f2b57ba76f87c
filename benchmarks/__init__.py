"""What sampling and a training step cost, ours beside the released formulation on the same weights.

python -m benchmarks.sampling          python -m benchmarks.training_step          (--help tells the options)
"""
