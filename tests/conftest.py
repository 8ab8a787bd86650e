"""Settings that every test shares."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Machines differ in speed, and a timing never decides a test.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
