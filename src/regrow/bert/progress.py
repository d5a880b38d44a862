"""The progress bar of a training."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.nn import named_sparse_layers

_LOSSES = {"mlm_loss": "mlm", "nsp_loss": "nsp"}
"""Of a training step, where there is more than one."""
_HELD_OUT = {"eval_mlm_loss": "MLM", "eval_nsp_loss": "NSP"}
"""What is worth a line where these are known; of others everything is."""


class ProgressBar(TrainerCallback):
    """One line that lives: steps, losses, tokens a second, density; evaluations are printed above it."""

    def __init__(self, density: float | None) -> None:
        self.density = density
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.density is not None:  # a checkpoint may have brought another one
            sizes = [(x.topology.n_blocks, x.topology.n_positions) for _, x in named_sparse_layers(kwargs["model"])]
            self.density = sum(n for n, _ in sizes) / sum(n for _, n in sizes) if sizes else self.density
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs:
            return
        if "tokens_per_second" in logs:
            fields = {title: f"{logs[name]:.3f}" for name, title in _LOSSES.items() if name in logs}
            fields = fields or {"loss": f"{logs['loss']:.3f}"}
            fields["tok/s"] = f"{logs['tokens_per_second']:,.0f}"
            if self.density is not None:
                fields["density"] = f"{self.density:.3g}"
            if "coverage" in logs:
                fields["coverage"] = f"{logs['coverage']:.3f}"
            self.bar.set_postfix(fields)
        elif any(name.startswith("eval_") for name in logs):
            shown = {name: title for name, title in _HELD_OUT.items() if name in logs} or {
                name: name.removeprefix("eval_") for name in logs if name.startswith("eval_")
            }
            found = ", ".join(f"{title} {logs[name]:.4f}" for name, title in shown.items())
            self.bar.write(f"step {state.global_step}: held-out {found}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal tidy, whatever ended the run."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
