"""Checkpoints between Hugging Face directories and Megatron-Core's ``torch_dist`` format, with a self-check.

``python -m miles.megatron.convert to-torch-dist --hf-checkpoint HF --save TORCH_DIST``
``python -m miles.megatron.convert to-hf --hf-checkpoint HF --load TORCH_DIST --save NEW_HF``

Needs no GPU.  Parameters are read and written one after another; the model is never built.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from miles.core.errors import MilesError
from miles.megatron import cpu


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    options = _options(arguments)
    cpu.install()
    # Late: the adaptation comes before anything of Megatron-Core.
    from miles.megatron.converter import to_hf, to_torch_dist

    try:
        if options.direction == "to-torch-dist":
            count = to_torch_dist(options.hf_checkpoint, options.save)
        else:
            count = to_hf(options.hf_checkpoint, options.load, options.save)
    except MilesError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{options.save}: {count} tensors, read back and equal bit for bit\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="miles.megatron.convert", description=__doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    for name, text in (("to-torch-dist", "from Hugging Face"), ("to-hf", "to Hugging Face")):
        direction = directions.add_parser(name, help=text)
        model = "Hugging Face directory: configuration and tokenizer, and the weights where they are to be converted"
        direction.add_argument("--hf-checkpoint", "--origin-hf-dir", type=Path, required=True, help=model)
        made = "directory to make; must not exist"
        direction.add_argument("--save", "--output-dir", type=Path, required=True, help=made)
    torch_dist = "converted weights, a run directory, or one of its checkpoints (iter_0000007)"
    directions.choices["to-hf"].add_argument("--load", "--input-dir", type=Path, required=True, help=torch_dist)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
