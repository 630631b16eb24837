"""The table models are imported by name; laws have no deadline, which on a busy machine says nothing."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
