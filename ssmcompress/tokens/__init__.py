"""Token reduction: which tokens of a prompt leave after which blocks, and what those that stay take over."""
