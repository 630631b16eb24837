import sys
from pathlib import Path

RECIPES = Path(__file__).parents[3] / "tools" / "recipes"
sys.path.insert(0, str(RECIPES))  # recipes are programs, not a package: their folder is where they import from
