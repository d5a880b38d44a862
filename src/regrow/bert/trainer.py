"""The Trainer for MLM + NSP pre-training: two losses, held-out evaluation."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from regrow.bert.evaluate import evaluate_pretraining
from regrow.bert.global_batch import GlobalBatch
from regrow.bert.run_trainer import RunTrainer
from regrow.bert.stream import PairDataset
from regrow.ranks import rank
from regrow.training.fsdp import parameter_bytes


class PretrainingTrainer(RunTrainer):
    """Logs the masked-word and the next-sentence loss, and evaluates held-out pairs."""

    losses = ("mlm_loss", "nsp_loss")
    evaluates_first = True

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        whole = parameter_bytes(self.model)
        optimizer = super().create_optimizer(model)
        if self.shard_units and rank() == 0:
            tqdm.write(
                f"process 0 keeps {parameter_bytes(self.model):,} of {whole:,} bytes of weights; likewise of gradients "
                "and of each of the optimizer's moments"
            )
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = model(**inputs)
        loss = output.loss
        if model.training:
            batch = GlobalBatch.of(output, inputs)
            loss = batch.loss
            self.count({"mlm_loss": batch.mlm_loss, "nsp_loss": batch.nsp_loss}, batch.tokens)
        return (loss, output) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        dataset = self.eval_dataset
        assert isinstance(dataset, PairDataset)
        with self.clock_stopped():
            metrics = evaluate_pretraining(
                self.accelerator.unwrap_model(self.model),
                dataset,
                collate_fn=dataset.collate,
                batch_size=self.args.eval_batch_size,
            )
        return self.log_evaluation(metrics)
