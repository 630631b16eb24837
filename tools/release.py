"""Build every package, install the wheels in a clean environment, import each: `hatch run release:verify`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").is_file())


def build(target: Path) -> list[Path]:
    """Wheels and source distributions of every package, in ``target``; returns the wheels."""
    target.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        subprocess.run(
            [sys.executable, "-m", "build", "--outdir", str(target), str(ROOT / "packages" / package)], check=True
        )
    return sorted(target.glob("*.whl"))


def verify(wheels: list[Path]) -> None:
    """Install the wheels with what they declare (no extras) and import each package."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        # A trainer's wheel declares torch; importing its top package must not need it, so it is left out here.
        light = [wheel for wheel in wheels if not wheel.name.startswith(("miles_fsdp", "miles_megatron"))]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *map(str, light)], check=True)
        heavy = [str(wheel) for wheel in wheels if wheel not in light]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *heavy], check=True)
        for package in PACKAGES:
            module = package.replace("-", ".", 1)
            subprocess.run([python, "-c", f"import {module}; print('{module}', {module}.__version__)"], check=True)
        subprocess.run([f"{folder}/bin/miles", "plugins"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["build", "verify"])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    wheels = build(arguments.output)
    if arguments.command == "verify":
        verify(wheels)


if __name__ == "__main__":
    main()
