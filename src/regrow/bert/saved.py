"""Load a saved model, sparse or dense, from wherever it is: a finished run, a run under way, a folder, a hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from regrow.bert.run import RunDirectory
from regrow.errors import RegrowError
from regrow.nn.layout import TRANSFORM, record_transform

CONFIG_FILE = "config.json"


def model_folder(path: str | Path) -> Path:
    """The folder that holds the model: ``path`` itself, or the newest intact checkpoint of an unfinished run there.

    Raises:
        RegrowError: there is no model.
    """
    path = Path(path)
    if (path / CONFIG_FILE).is_file():
        return path
    checkpoint = RunDirectory(path).last_checkpoint() if path.is_dir() else None
    if checkpoint is None:
        raise RegrowError(
            f"{path} holds no model ({CONFIG_FILE}) and no checkpoint; give the directory of a run or a saved model"
        )
    return checkpoint


def load_saved(path: str | Path, model_class: Any = None, **changes: Any) -> PreTrainedModel:
    """The model saved at ``path``, ready to evaluate; its sparse layers come as :class:`regrow.BlockSparseLinear`.

    Args:
        path: directory of a run or a saved model; or, where no such directory is, a model's name on a hub.
        model_class: one of transformers' (Auto)classes; by default the one that was saved.
        changes: entries of the configuration to override.

    Warns if these are the weights of a training under way whose method uses a transform of them.

    Raises:
        RegrowError: there is no model, its files are damaged, or transformers does not know its class.
    """
    folder = str(path) if is_hub_name(path) else str(model_folder(path))
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if model_class is None:
            model_class = _saved_class(AutoConfig.from_pretrained(folder), folder)
        model = model_class.from_pretrained(folder, use_safetensors=True, **changes).eval()
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, RegrowError):
            raise
        raise RegrowError(f"cannot load the model {folder}: {' '.join(str(error).split())}") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if method := getattr(model.config, TRANSFORM, None):
        warnings.warn(
            f"{folder} is a checkpoint of a training with {method}: taken are its dense weights, of which the method "
            "uses a transform; the finished run will hold that",
            stacklevel=2,
        )
        record_transform(model, None)
    return model


def is_hub_name(path: str | Path) -> bool:
    """Whether it can only be one: as ``user/name``, and nothing on disk."""
    return isinstance(path, str) and not Path(path).exists() and path.count("/") == 1 and path[0] not in "./~"


def _saved_class(config: PretrainedConfig, folder: str) -> Any:
    name = (config.architectures or ["AutoModel"])[0]
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise RegrowError(f"{folder}/{CONFIG_FILE}: transformers has no model class {name!r}")
    return found
