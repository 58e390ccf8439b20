"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# No time limit for one example, for the machine may pause; and the same examples in every run.
settings.register_profile("signalbox", deadline=None, derandomize=True)
settings.load_profile("signalbox")
