"""Downstream tasks: files of examples, their metrics, and what each asks of the training loop."""
