"""``python -m miles.router``."""

import sys

from miles.router.cli import main

sys.exit(main())
