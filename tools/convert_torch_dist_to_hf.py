"""torch_dist to Hugging Face; see ``python tools/convert_torch_dist_to_hf.py --help``."""

import sys

from miles.megatron.convert import main

sys.exit(main(["to-hf", *sys.argv[1:]]))
