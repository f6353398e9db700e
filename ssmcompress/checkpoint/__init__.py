"""Checkpoints: found, loaded without running anything, written whole or not at all, and loaded again to be sure."""
