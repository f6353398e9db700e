"""What a model is worth: likelihood of held-out text and memory."""
