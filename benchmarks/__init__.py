"""What things cost, as ratios of two of them in one run, and how well decisions hold (--help tells the options).

python -m benchmarks.sampling         ours beside the released formulation on the same weights
python -m benchmarks.training_step    the same of training
python -m benchmarks.data             latents beside raw reading, encoding beside the codec
python -m benchmarks.evaluation       sampling beside all else that an evaluation does
python -m benchmarks.decisions        error rate, power and seeds of simulated sweeps
python -m benchmarks.features         metrics of images of known quality
python -m benchmarks.parity           our numbers compared with those of the authors' code, both branches
python -m benchmarks.gpu              training and sampling of the full models on a GPU, for docs/explanation/performance.md
"""
