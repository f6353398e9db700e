"""What a checkpoint on disk is worth, written down so that it can be compared."""

from ssmcompress.evaluate.evaluation import evaluate

__all__ = ["evaluate"]
