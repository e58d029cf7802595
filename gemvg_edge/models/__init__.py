"""The model that ships with the package."""

from pathlib import Path

DEFAULT_BUNDLE = Path(__file__).parent / "tabletop"
