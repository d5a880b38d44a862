"""What a run is, and what a study asks for: only differences from the defaults, checked before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

import yaml

from regrow.bert.corpus import corpus_fingerprint
from regrow.bert.pretrain import PretrainConfig
from regrow.bert.sizes import size_named
from regrow.bert.tokenizer import TOKENIZER_FORMAT
from regrow.errors import RegrowError
from regrow.methods import Method, method_class
from regrow.nn.options import LayerOption, layer_class
from regrow.nn.replace import DEFAULT
from regrow.optim import sparse_learning_rate
from regrow.registry import converted, refuse_clashes

NO_EFFECT = ("output", "parallel", "workers", "keep_checkpoints", "save_steps", "logging_steps", "report_to")
"""Options that cannot change what is trained: they are no part of a run's identity."""
RECIPE_FORMAT = 1
"""Raised when the default of an option changes, or what an option does."""
Part = TypeVar("Part")
_OF_SPARSITY = ("layer", "density", "distribution", "block_size", "block_steps", "block_warmup")
_OF_UPDATES = ("n_updates", "drop_fraction", "decay", "final_fraction", "stop_updates")
_OF_RATES = ("lr_rule", "lr_scope", "base_width")


@lru_cache
def _method_class(name: str) -> type[Method]:
    return method_class(name)


@lru_cache
def _layer_class(name: str) -> type[LayerOption]:
    return layer_class(name)


@lru_cache
def _known_options(owner: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of each option of a configuration, a method or a layer option."""
    hints = get_type_hints(owner)
    return {of.name: (hints[of.name], of.default) for of in dataclasses.fields(owner)}


@dataclass(frozen=True)
class RunSpec:
    """One run: what differs from the defaults of :class:`~regrow.bert.pretrain.PretrainConfig`, its method and layer.

    Two specifications are equal if they train the same thing, however they say it; :attr:`id` is the same then.

    Args:
        options: names and values as for ``regrow pretrain``, those of the method and the layer option among them.

    Raises:
        RegrowError: an unknown option, or a value that no run can use.

    Example:
        >>> spec = RunSpec({"method": "static", "size": "2/64", "density": 0.1, "n_updates": 40})
        >>> dict(spec.options)  # 0.1 is the default
        {'method': 'static', 'n_updates': 40, 'size': '2/64'}
        >>> spec == RunSpec({"size": "2/64/1", "method": "static"})  # a static pattern never moves, so often or not
        True
    """

    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        method = _method_class(str(self.options.get("method", PretrainConfig.method)))
        layer = _layer_class(str(self.options.get("layer", PretrainConfig.layer)))
        refuse_clashes(PretrainConfig, method, layer)
        known = _known_options(PretrainConfig) | _known_options(method) | _known_options(layer)  # type: ignore[arg-type]
        known.pop("output")  # the runner's business
        options = {}
        for name, value in self.options.items():
            if name not in known:
                parts = f"method {method.name!r}" + (f" and layer {layer.name!r}" if layer.name != DEFAULT else "")
                raise RegrowError(f"unknown option {name!r} of a run with {parts}: see regrow pretrain -h")
            hint, default = known[name]
            value = converted(name, value, hint)
            if value != default:
                options[name] = value
        object.__setattr__(self, "options", MappingProxyType(dict(sorted(options.items()))))
        self.config.check()
        _ = self.method, self.layer

    @cached_property
    def config(self) -> PretrainConfig:
        """The configuration of the run; its ``output`` is the default one."""
        return PretrainConfig(**{k: v for k, v in self.options.items() if k in PretrainConfig.__dataclass_fields__})

    @cached_property
    def method(self) -> Method:
        """The method with its options."""
        return self._part(_method_class(self.config.method))

    @cached_property
    def layer(self) -> LayerOption:
        """What stands in the place of linear layers, with its options."""
        return self._part(_layer_class(self.config.layer))

    def _part(self, cls: type[Part]) -> Part:
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: self.options[name] for name in names if name in self.options})

    @property
    def full(self) -> dict[str, Any]:
        """Every option of configuration and method, ``output`` apart."""
        full = asdict(self.config) | asdict(self.method) | asdict(self.layer)  # type: ignore[call-overload]
        return {name: value for name, value in full.items() if name != "output"}

    @cached_property
    def id(self) -> str:
        """24 hexadecimal digits: blake2b of :meth:`recipe`."""
        text = json.dumps(self.recipe(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def recipe(self) -> dict[str, Any]:
        """Everything that decides what is trained, and nothing else.

        Corpus and tokenizer count by content, so that a run is the same on another machine and another one when its
        corpus has changed. Plain defaults and options without effect are left out, so that an option that a later
        version adds makes no run another one; defaults that depend on other options are spelled out.
        """
        config, size, idle = self.config, size_named(self.config.size), self.without_effect
        recipe: dict[str, Any] = dict(self.options) | {
            "format": RECIPE_FORMAT,
            "size": [size.layers, size.hidden, size.heads],
            "dropout": size.dropout if config.dropout is None else config.dropout,
            "n_updates": config.schedule.n_updates,
            "eval_steps": config.eval_steps or config.steps,
            "data": _corpus_content(config.data),
        }
        if config.tokenizer is None:
            recipe["tokenizer_format"] = TOKENIZER_FORMAT
        else:
            recipe["tokenizer"] = _tokenizer_content(config.tokenizer)
        if config.learning_rate is None:
            recipe["dense_lr"] = size.dense_lr
        return {name: value for name, value in recipe.items() if name not in idle}

    @cached_property
    def without_effect(self) -> frozenset[str]:
        """Options that play no part in this run."""
        config, idle = self.config, [*NO_EFFECT]
        if config.tokenizer is not None:
            idle.append("vocab_size")
        if config.learning_rate is not None:
            idle.append("lr_scale")
        if config.lr_rule != "supar":
            idle += _OF_RATES if config.learning_rate is not None else ("base_width",)
        if config.dense:
            own = [f.name for part in (self.method, self.layer) for f in dataclasses.fields(part)]  # type: ignore[arg-type]
            idle += [*_OF_SPARSITY, *_OF_UPDATES, *_OF_RATES, "method", *own]
        elif not self.method.moves:
            idle += _OF_UPDATES
        return frozenset(idle)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunSpec) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class Study:
    """Runs that together answer a question.

    Args:
        name: of the study.
        claim: what it is to show, in words.
        scale: for how big a machine: cpu, gpu, paper, or a name of your own.
        defaults: options of every run.
        experiments: options that differ. **A list as a value is an axis**: an experiment stands for the product of its
            axes. Two names are short for others: ``seeds: 3`` for ``seed: [0, 1, 2]``, and ``lr_factor: [0.5, 1, 2]``
            for learning rates of so many times what Eq. 3 of the paper gives to that size and density.
        overrides: options that win over both, as the command line gives them.
        figure: where in the paper.

    Example:
        >>> study = Study("sizes", experiments=[{"size": ["2/64", "2/128"], "seeds": 2}], defaults={"method": "static"})
        >>> list(study.labels().values())
        ['size=2/64,seed=0', 'size=2/64,seed=1', 'size=2/128,seed=0', 'size=2/128,seed=1']
    """

    name: str
    claim: str = ""
    scale: str = "custom"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    experiments: Sequence[Mapping[str, Any]] = ({},)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    figure: str = ""

    def runs(self) -> list[RunSpec]:
        """Its runs, each once, in the order in which they are asked for.

        Raises:
            RegrowError: an option of one is unknown or unusable.
        """
        return list(dict.fromkeys(RunSpec(options) for options in self._options()))

    def labels(self) -> dict[str, str]:
        """Id of each run to a name made of what differs within the study, as ``method=static,seed=0``."""
        runs = self.runs()
        shown = [_settings(run) for run in runs]
        order = dict.fromkeys(name for options in self._options() for name in options)
        names = dict.fromkeys([*order, *(name for settings in shown for name in settings)])
        varying = [name for name in names if len({str(s[name]) for s in shown if name in s}) > 1]
        labels = {}
        for run, settings in zip(runs, shown, strict=True):
            parts = [_shown(name, settings[name]) for name in varying if name in settings]
            labels[run.id] = ",".join(filter(None, parts)) or self.name
        return labels

    def only(self, glob: str) -> list[RunSpec]:
        """The runs whose label or id matches.

        Raises:
            RegrowError: none does.
        """
        labels = self.labels()
        found = [run for run in self.runs() if any(fnmatchcase(text, glob) for text in (labels[run.id], run.id))]
        if not found:
            raise RegrowError(
                f"no run of study {self.name!r} matches {glob!r}; their names: regrow study show {self.name}"
            )
        return found

    def with_options(self, **options: Any) -> Study:
        """The same study with these options in every run."""
        return replace(self, overrides={**self.overrides, **options})

    def _options(self) -> Iterator[dict[str, Any]]:
        for experiment in self.experiments:
            for options in expand({**self.defaults, **experiment, **self.overrides}):
                yield _with_rate(options)


def expand(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The product of all values that are lists.

    Example:
        >>> list(expand({"density": [0.1, 0.5], "seeds": 2, "steps": 10}))[:2]
        [{'density': 0.1, 'seed': 0, 'steps': 10}, {'density': 0.1, 'seed': 1, 'steps': 10}]
    """
    axes: dict[str, Sequence[Any]] = {}
    for name, value in options.items():
        if name == "seeds":
            axes["seed"] = value if isinstance(value, list) else range(converted(name, value, int))
        else:
            axes[name] = value if isinstance(value, list) else [value]
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _with_rate(options: dict[str, Any]) -> dict[str, Any]:
    """``lr_factor`` replaced by the learning rate it means."""
    if "lr_factor" not in options:
        return options
    factor = converted("lr_factor", options.pop("lr_factor"), float)
    if options.get("learning_rate") is not None:
        raise RegrowError("give a learning_rate or an lr_factor, not both")
    config = RunSpec(options).config
    density = 1.0 if config.dense else config.density
    rate = factor * sparse_learning_rate(size_named(config.size).dense_lr, density)
    return options | {"learning_rate": float(f"{rate:.4g}")}


def _settings(run: RunSpec) -> dict[str, Any]:
    """What a run says of itself: the full configuration without what plays no part in it."""
    return {name: value for name, value in run.full.items() if name not in run.without_effect}


def _shown(name: str, value: Any) -> str:
    if name == "dense":
        return name if value else ""
    return f"{name}={yaml.safe_dump(value).splitlines()[0]}"


def _corpus_content(source: str) -> str:
    """A fingerprint of a corpus on disk; the name of any other stands for itself."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    return _corpus_fingerprint(source, max(p.stat().st_mtime_ns for p in [path, *path.rglob("*")]))


@lru_cache
def _corpus_fingerprint(source: str, modified: int) -> str:
    return corpus_fingerprint(source)


def _tokenizer_content(source: str) -> str:
    path = Path(source).expanduser()
    for file in (path / "tokenizer.json", path / "vocab.txt", path):
        if file.is_file():
            return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    return source
