"""How fast a whole training step is, sparse against dense, and where its time goes: ``regrow bench step``.

Dense is the strongest baseline that PyTorch and transformers give here: transformers' BERT with
``scaled_dot_product_attention``, the vocabulary head on the masked positions only, PyTorch's fused AdamW, and memory
kept by the process (:mod:`regrow.allocator`). The same dense model with this library's fused operations is measured
beside it, to tell what sparsity gives from what fusing gives. All take turns in one process. On a GPU in 16 bits all
run under autocast; with ``compile`` all go through torch.compile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from tqdm.auto import tqdm

from regrow.bench.baseline import measured_machine
from regrow.bench.picture import new_figure
from regrow.bench.place import Place
from regrow.bert.fused import Fusions, Tokens
from regrow.bert.masking import IGNORE
from regrow.bert.model import build_model
from regrow.bert.sizes import bert_config
from regrow.errors import RegrowError
from regrow.nn import density_of, named_sparse_layers
from regrow.nn.linear import check_block_size
from regrow.optim import AdamW
from regrow.topology.distribution import check_density

DENSE, FUSED, SPARSE = "dense", "dense_fused", "sparse"
_TITLES = {DENSE: "dense", FUSED: "dense, fused", SPARSE: "sparse"}

_WARM_UP = 6
"""Until then the heap still grows, above all the dense steps: fresh pages would be measured."""

_CLIP, _OPTIMIZER = "clip", "Optimizer.step"
_PARTS = (  # the first that one of an operation's name's beginnings belongs to
    ("attention half, fused", ("sparse_attention",)),
    ("attention", ("scaled_dot_product", "_scaled_dot_product", "_softmax", "bmm", "attention")),
    ("feed-forward, fused", ("ffn",)),
    ("sparse products", ("spmm", "sddmm")),
    ("vocabulary head", ("_log_softmax", "nll_loss", "_LinearCrossEntropy")),
    ("dense products", ("mm", "addmm")),
    ("dropout and norm", ("native_layer_norm", "native_dropout", "bernoulli", "dropout")),
    ("GELU", ("gelu",)),
    ("embedding", ("embedding", "index_select", "_index_put_impl_", "index_add")),
    ("adds, copies, fills", ("add", "mul", "div", "copy", "fill", "zero", "sum", "cat")),
)


@dataclass(frozen=True)
class StepConfig:
    """What is measured."""

    size: str = "small"
    dense_size: str | None = None
    """Of the dense model, if another: for pairs of equal FLOPs."""
    block_size: int = 16
    density: float = 0.1
    batch_size: int = 32
    max_length: int = 128
    vocab_size: int = 30522
    dropout: float | None = None
    """None: the size's own, as in the paper."""
    fuse: str = "all"
    """Which operations of the sparse model are fused."""
    encoder_only: bool = False
    """Forward and backward of the encoder's layers alone: no embeddings, no heads, no optimizer."""
    rounds: int = 7
    device: str = "cpu"
    dtype: str | None = None
    """None: float32 on a CPU, bf16 under autocast on a GPU."""
    compile: bool = False
    """Every model, also dense, through torch.compile."""

    @property
    def place(self) -> Place:
        return Place.named(self.device, self.dtype)

    def check(self) -> None:
        """Raise :class:`RegrowError` for values that no model can have."""
        check_density(self.density)
        hidden = bert_config(self.size, vocab_size=self.vocab_size, max_length=self.max_length).hidden_size
        check_block_size(hidden, 4 * hidden, self.block_size)
        _ = Fusions.named(self.fuse), self.place
        for name in ("batch_size", "max_length", "vocab_size", "rounds"):
            if getattr(self, name) < 1:
                raise RegrowError(f"{name} must be at least 1, got {getattr(self, name)}")


def bench_step(
    config: StepConfig, *, blocks: Sequence[int] = (), ablate: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Measure a training step, dense and sparse.

    Args:
        blocks: other block sizes, whose sparse step is timed too.
        ablate: also measure the sparse step with each fused operation switched off alone, and with all of them off.

    Returns:
        ``dense_seconds``, ``sparse_seconds``, ``dense_fused_seconds`` (medians), ``speedup`` (dense over sparse),
        ``parts`` (seconds of each part of a step by model, from a profile of a few steps), ``tokens_per_second``,
        ``memory`` (bytes by model: ``state`` is weights, gradients, optimizer and indices; ``activations`` what
        autograd keeps from the forward for the backward pass; ``peak`` the most at any time), ``config``,
        ``baseline``, ``machine``; on a GPU ``busy``, the share of a step's time by model in which kernels run; with
        ``ablate``, ``without`` (seconds of the sparse step by what is off); with ``blocks``, ``by_block`` (seconds of
        the sparse step by block size).

    Raises:
        RegrowError: a value that no model can have.

    Example:
        >>> result = bench_step(StepConfig("1/32", batch_size=1, max_length=16, vocab_size=50, rounds=1))
        >>> result["speedup"] == result["dense_seconds"] / result["sparse_seconds"]
        True
    """
    config.check()
    steps = {name: _Step(config, name) for name in (DENSE, FUSED, SPARSE)}
    variants = {str(b): replace(config, block_size=b) for b in blocks}
    if ablate:
        fused = Fusions.named(config.fuse)
        on = [field.name for field in fields(Fusions) if getattr(fused, field.name)]
        rest = {name: ",".join(other for other in on if other != name) or "none" for name in on} | {"all": "none"}
        variants |= {name: replace(config, fuse=fuse) for name, fuse in rest.items()}
    for variant in variants.values():
        variant.check()
    tasks = steps | {name: _Step(variant, SPARSE) for name, variant in variants.items()}
    watch = (lambda rounds: tqdm(rounds, "measuring", unit="round", leave=False)) if progress else iter
    place = config.place
    medians = place.medians(tasks, rounds=config.rounds, warm_up=_WARM_UP, progress=watch, recorded=False)
    seconds = {name: medians[name] for name in steps}
    profiles = {name: _profile(step, config) for name, step in steps.items()}
    busy = {name: sum(parts.values()) / seconds[name] for name, (parts, _) in profiles.items()}
    return {
        "dense_seconds": seconds[DENSE],
        "sparse_seconds": seconds[SPARSE],
        "dense_fused_seconds": seconds[FUSED],
        "speedup": seconds[DENSE] / seconds[SPARSE],
        "parts": {name: parts for name, (parts, _) in profiles.items()},
        "tokens_per_second": {name: config.batch_size * config.max_length / value for name, value in seconds.items()},
        "memory": {
            name: {"state": step.state_bytes(), "activations": step.activation_bytes(), "peak": profiles[name][1]}
            for name, step in steps.items()
        },
        "density": density_of(layer for _, layer in named_sparse_layers(steps[SPARSE].model)),
        "config": asdict(config),
        "baseline": " ".join((__doc__ or "").partition("\n\n")[2].split()),
        "machine": measured_machine(place),
        **({"busy": busy} if place.is_gpu else {}),
        **({"by_block": {str(b): medians[str(b)] for b in blocks}} if blocks else {}),
        **({"without": {name: medians[name] for name in rest}} if ablate else {}),
    }


class _Step:
    """A training step of one model on one batch."""

    def __init__(self, config: StepConfig, name: str) -> None:
        size = config.size if name == SPARSE or config.dense_size is None else config.dense_size
        bert = bert_config(size, vocab_size=config.vocab_size, max_length=config.max_length, dropout=config.dropout)
        fusions = {DENSE: "none", FUSED: "all", SPARSE: config.fuse}[name]
        torch.manual_seed(0)
        self.model = build_model(
            bert,
            density=config.density if name == SPARSE else None,
            block_size=config.block_size,
            fusions=Fusions.named(fusions),
        ).train()
        self.place = place = config.place
        self.model.to(place.device)
        self.run = torch.compile(self.model) if config.compile else self.model
        self.batch = {name: value.to(place.device) for name, value in _batch(config).items()}
        self.encoder_only = config.encoder_only
        shape = config.batch_size, config.max_length, bert.hidden_size
        self.hidden = torch.randn(shape, device=place.device).requires_grad_()
        self.cotangent = torch.randn(shape, device=place.device)
        make = AdamW if name == SPARSE else torch.optim.AdamW
        self.optimizer = make(self.model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> None:
        self.backward(self.forward())
        if self.encoder_only:
            return
        with record_function(_CLIP):
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def forward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        self.hidden.grad = None
        place = self.place
        with torch.autocast(place.device.type, place.dtype, enabled=place.dtype is not torch.float32):
            return _encode(self.model.bert, self.hidden) if self.encoder_only else self.run(**self.batch).loss

    def backward(self, output: Tensor) -> None:
        output.backward(self.cotangent.to(output.dtype) if self.encoder_only else None)

    def state_bytes(self) -> int:
        kept = [*self.model.state_dict().values(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        kept += [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return sum({x.data_ptr(): x.numel() * x.element_size() for x in kept}.values())

    def activation_bytes(self) -> int:
        """What a forward pass keeps for the backward pass, weights and inputs apart."""
        kept: dict[int, int] = {}
        known = {x.untyped_storage().data_ptr() for x in [*self.model.state_dict().values(), *self.batch.values()]}

        def see(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(see, lambda x: x):
            output = self.forward()
        del output
        return sum(size for place, size in kept.items() if place not in known)


def _batch(config: StepConfig) -> dict[str, Tensor]:
    """Random tokens, full sequences, BERT's 15 % predicted."""
    shape, draw = (config.batch_size, config.max_length), torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, shape, generator=draw)
    chosen = torch.rand(shape, generator=draw).argsort(1)[:, : max(1, round(0.15 * config.max_length))]
    labels = torch.full(shape, IGNORE).scatter(1, chosen, ids.gather(1, chosen))
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "token_type_ids": torch.zeros(shape, dtype=torch.int64),
        "next_sentence_label": torch.randint(2, shape[:1], generator=draw),
    }


def _encode(bert: Any, x: Tensor) -> Tensor:
    if not hasattr(bert, "fusions"):
        return bert.encoder(x).last_hidden_state
    tokens, fusions = Tokens.of(x.shape[:2], None, True, x.device), bert.fusions.on(x.device)
    x = tokens.pack(x)
    for layer in bert.encoder.layer:
        x = layer(x, tokens, fusions)
    return tokens.pad(x)


def _profile(step: _Step, config: StepConfig, rounds: int = 3) -> tuple[dict[str, float], int]:
    """Seconds of each part of a step, on a GPU of its kernels, and the most bytes held at any time of it."""
    step.optimizer.zero_grad(set_to_none=True)
    held = step.state_bytes()
    plan = schedule(wait=0, warmup=rounds, active=rounds)  # the profiler's own memory has to find its place too
    options: dict[str, Any] = {"record_shapes": True, "profile_memory": True}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if step.place.is_gpu else [])]
    before = _start_counting(step.place)
    with profile(activities=activities, schedule=plan, **options) as profiler:
        for number in range(2 * rounds):
            if number:
                profiler.step()
            step()
    parts = dict.fromkeys([name for name, _ in _PARTS] + ["optimizer and clipping", "other"], 0.0)
    for event in profiler.events() or []:
        if event.device_type != DeviceType.CPU:  # kernels are listed too, beside the operations that started them
            continue
        spent = event.self_device_time_total if step.place.is_gpu else event.self_cpu_time_total
        parts[_part_of(event, config.vocab_size)] += spent / 1e6 / rounds
    most = torch.cuda.max_memory_allocated() - before if step.place.is_gpu else _highest(profiler)
    return {name: value for name, value in parts.items() if value}, held + most


def _start_counting(place: Place) -> int:
    """Bytes that a GPU's tensors hold now; from here on it counts anew how high that goes."""
    if not place.is_gpu:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _part_of(event: Any, vocab_size: int) -> str:
    above = event
    while above is not None:
        if above.name.startswith(_OPTIMIZER) or above.name == _CLIP:
            return "optimizer and clipping"
        above = above.cpu_parent
    name = event.name.rpartition("::")[2]
    if name in ("mm", "addmm") and any(vocab_size in shape for shape in event.input_shapes or []):
        return "vocabulary head"
    return next((part for part, beginnings in _PARTS if name.startswith(beginnings)), "other")


def _highest(profiler: Any) -> int:
    """The most bytes that were allocated at any time of a profile, beyond those at its start."""
    level = top = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        top = max(top, level)
    return top


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    parts, memory = result["parts"], result["memory"]

    def line(title: str, values: Iterable[str]) -> str:
        return f"{title:24}" + "".join(f"{value:>14}" for value in values)

    rows = [line("milliseconds a step", _TITLES.values())]
    for part in _all_parts(result):
        rows += [line("  " + part, (f"{parts[name].get(part, 0) * 1e3:.1f}" for name in _TITLES))]
    rows.append(line("step (median)", (f"{result[f'{name}_seconds'] * 1e3:.1f}" for name in _TITLES)))
    rows.append(line("tokens a second", (f"{result['tokens_per_second'][name]:,.0f}" for name in _TITLES)))
    for kind in ("state", "activations", "peak"):
        rows += [line(f"{kind}, MB", (f"{memory[name][kind] / 1e6:,.0f}" for name in _TITLES))]
    rows.append("")
    if "busy" in result:
        rows.append(line("GPU busy, %", (f"{100 * result['busy'][name]:.0f}" for name in _TITLES)))
    rows.append(
        f"dense over sparse {result['speedup']:.2f}x; dense over dense fused "
        f"{result['dense_seconds'] / result['dense_fused_seconds']:.2f}x"
    )
    for b, seconds in result.get("by_block", {}).items():
        rows.append(
            f"sparse at block {b:14} {seconds * 1e3:8.1f} ms, dense over it {result['dense_seconds'] / seconds:.2f}x"
        )
    for name, seconds in result.get("without", {}).items():
        more, speedup = seconds - result["sparse_seconds"], result["dense_seconds"] / seconds
        rows.append(
            f"sparse without {name:10} {seconds * 1e3:8.1f} ms ({more * 1e3:+.1f}), dense over it {speedup:.2f}x"
        )
    return "\n".join(rows)


def plot(result: dict[str, Any], path: Path) -> None:
    """The parts of a step as one bar for each model, to a .png or .svg.

    Raises:
        RegrowError: matplotlib is not installed.
    """
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    left = dict.fromkeys(_TITLES, 0.0)
    for part in _all_parts(result):
        widths = {name: result["parts"][name].get(part, 0.0) * 1e3 for name in _TITLES}
        axes.barh(list(_TITLES.values()), list(widths.values()), left=list(left.values()), label=part)
        left = {name: left[name] + widths[name] for name in _TITLES}
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a training step (profiled)")
    axes.set_title(
        f"{result['config']['size']}, density {result['density']:.2g}, block {result['config']['block_size']}"
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=150)


def _all_parts(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(part for name in _TITLES for part in result["parts"][name]))


def write_json(result: dict[str, Any], path: Path) -> None:
    """The result as a file."""
    path.write_text(json.dumps(result, indent=1) + "\n")
