"""State tuning: a few tensors in state space are learned from examples, and written as an adapter in PEFT's format."""
