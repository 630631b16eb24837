"""Hugging Face to torch_dist; see ``python tools/convert_hf_to_torch_dist.py --help``."""

import sys

from miles.megatron.convert import main

sys.exit(main(["to-torch-dist", *sys.argv[1:]]))
