"""Slow, obvious implementations that guard the fast ones."""
