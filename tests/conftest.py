"""Settings shared by all tests."""

from __future__ import annotations

from hypothesis import settings

# The first example of a kind loads or builds things, so a deadline would only measure the machine.
settings.register_profile("gemvg", deadline=None)
settings.load_profile("gemvg")
