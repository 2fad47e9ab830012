"""Measurements: what a cache type costs and what it loses. Run as modules from the project's root."""
