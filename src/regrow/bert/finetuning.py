"""The Trainer for fine-tuning: a task's loss, and its metrics on held-out examples."""

from __future__ import annotations

from typing import Any

from torch import nn

from regrow.bert.run_trainer import RunTrainer
from regrow.bert.tasks.problem import Problem


class FinetuningTrainer(RunTrainer):
    """Logs the loss that the model computes from its labels, and evaluates ``problem``."""

    def __init__(self, *args: Any, problem: Problem, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.problem = problem

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = model(**inputs)
        if model.training:
            self.count({"loss": output.loss.item()}, int(inputs["attention_mask"].sum()))
        return (output.loss, output) if return_outputs else output.loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.clock_stopped():
            metrics = self.problem.evaluate(self.model, batch_size=self.args.eval_batch_size)
        return self.log_evaluation(metrics)
