"""`python -m madformer` is `madformer`."""

from madformer.cli import main

main()
