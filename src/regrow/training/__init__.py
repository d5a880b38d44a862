"""Training with a moving topology: schedule, updater, transformers callback and trainer."""

from regrow.training import loading as _loading  # registers the loader with transformers
from regrow.training.callback import RegrowCallback
from regrow.training.ddp import gradient_bytes
from regrow.training.density import mean_density
from regrow.training.metrics import UpdateRecord
from regrow.training.schedule import UpdateSchedule
from regrow.training.trainer import SafeTrainer
from regrow.training.updater import TopologyUpdater

__all__ = [
    "RegrowCallback",
    "SafeTrainer",
    "TopologyUpdater",
    "UpdateRecord",
    "UpdateSchedule",
    "gradient_bytes",
    "mean_density",
]

del _loading
