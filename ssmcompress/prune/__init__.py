"""Zeroing weights: scores, masks, SparseGPT, and the walk that turns them into edits."""
