"""Train the tokenizer named `builtin`, and write the file that the package ships.

It is a byte-level BPE, so that it accepts any text and loses nothing. It keeps upper case: text must survive the round trip,
and some of ImageNet's names differ only in case (Cardigan is a corgi, cardigan a garment). It learns from the package's class
names, each once. The file is always the same.

    python scripts/train_tokenizer.py [--out FILE]
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from madformer.config.data import BUILTIN_VOCABULARY
from madformer.data import prompts
from madformer.runs.files import write_text


def train() -> Tokenizer:
    """The tokenizer, trained on ImageNet's and the digits' class names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BUILTIN_VOCABULARY,
        min_frequency=1,  # pairs that occur twice fill only half of the vocabulary
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*prompts.imagenet_classes(), *prompts.DIGIT_NAMES], trainer)
    return tokenizer


def main() -> None:
    """Train, write, and say how long the class names are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shipped = Path(str(resources.files("madformer.data") / prompts.BUILTIN_FILE))
    parser.add_argument("--out", type=Path, default=shipped, help="default: the file in the package")
    out: Path = parser.parse_args().out

    tokenizer = train()
    lengths = [len(tokenizer.encode(name).ids) for name in prompts.imagenet_classes()]
    write_text(out, tokenizer.to_str() + "\n")
    print(f"{out}: {tokenizer.get_vocab_size()} tokens, {out.stat().st_size} bytes")
    print(f"ImageNet's class names: {sum(lengths) / len(lengths):.2f} tokens on average, {max(lengths)} at most")


if __name__ == "__main__":
    main()
