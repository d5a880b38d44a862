"""BERT pre-training on real text."""
