"""Question answering by extraction (SQuAD v1.1): reading, windows, answers from logits, scores. No training here."""

from regrow.bert.squad.answers import Candidate, best_answers
from regrow.bert.squad.data import Answer, Question, read_squad
from regrow.bert.squad.features import Window, windows
from regrow.bert.squad.metrics import squad_metrics

__all__ = ["Answer", "Candidate", "Question", "Window", "best_answers", "read_squad", "squad_metrics", "windows"]
