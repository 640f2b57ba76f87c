"""Benchmarks: costs as ratios measured in one run, and the quality of decisions and metrics (--help lists the options).

python -m benchmarks.sampling         sampling, ours against the released formulation on the same weights
python -m benchmarks.training_step    a training step, the same
python -m benchmarks.data             reading latents against raw reading, encoding against the codec alone
python -m benchmarks.evaluation       sampling against all other work of an evaluation
python -m benchmarks.decisions        error rate, power and seeds of simulated sweeps
python -m benchmarks.features         metrics of images of known quality
python -m benchmarks.parity           our numbers compared with those of the authors' code, both branches
python -m benchmarks.gpu              training and sampling of the full models on a GPU, for docs/explanation/performance.md
"""
