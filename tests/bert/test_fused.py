"""The fused encoder against transformers' own code."""

from copy import deepcopy
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from regrow import kernels
from regrow.bert.fused import Fusions, fuse
from regrow.bert.model import BertForPreTraining, build_model
from regrow.errors import RegrowError
from regrow.nn import named_sparse_layers
from regrow.optim import AdamW
from tolerances import HALF

NAMES = [field.name for field in fields(Fusions)]
EACH = [Fusions.named(name) for name in ["all", *NAMES]] + [Fusions.named(",".join(n for n in NAMES if n != "unpad"))]
BATCH, LENGTH, VOCABULARY = 5, 24, 90


def config(dropout: float = 0.0) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )


def model(fusions: str = "none", density: float | None = 0.5, dropout: float = 0.0) -> BertForPreTraining:
    torch.manual_seed(0)
    return build_model(config(dropout), density=density, block_size=8, fusions=Fusions.named(fusions)).train()


def batch(padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=draw)
    mask = torch.ones_like(ids)
    if padded:
        for row, length in enumerate((24, 5, 1, 17, 24)):
            mask[row, length:] = 0
    chosen = (torch.rand(ids.shape, generator=draw) < 0.2) & mask.bool()
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": torch.randint(2, ids.shape, generator=draw) * mask,
        "labels": torch.where(chosen, ids, -100),
        "next_sentence_label": torch.randint(2, (BATCH,), generator=draw),
    }


def loss_and_gradients(network: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    network.zero_grad()
    loss = network(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().item()
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=2e-6 + 2e-5 * largest, msg=name)


@pytest.mark.parametrize("fusions", EACH, ids=lambda f: ",".join(n for n in NAMES if getattr(f, n)))
@pytest.mark.parametrize("density", [0.5, None], ids=["sparse", "dense"])
@pytest.mark.parametrize("padded", [True, False])
def test_every_fusion_computes_what_transformers_does(fusions: Fusions, density: float | None, padded: bool) -> None:
    inputs = batch(padded)
    plain, fused = model(density=density), fuse(model(density=density), fusions)
    assert fused.bert.fusions == fusions and not hasattr(plain.bert, "fusions")
    assert_same(loss_and_gradients(fused, inputs), loss_and_gradients(plain, inputs))


@pytest.mark.parametrize("padded", [True, False])
def test_sparse_attention_halves_are_one_operation(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With heads wide enough, and sequences enough for each thread."""
    wide, inputs, calls, real = config(), batch(padded), [], kernels.sparse_attention
    wide.num_attention_heads = 2
    monkeypatch.setattr(kernels, "sparse_attention", lambda *args: (calls.append(1), real(*args))[1])
    networks = []
    for fusions in ("none", "all"):
        torch.manual_seed(0)
        networks.append(build_model(wide, density=0.5, block_size=8, fusions=Fusions.named(fusions)).train())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        actual = loss_and_gradients(networks[1], inputs)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == wide.num_hidden_layers
    assert_same(actual, loss_and_gradients(networks[0], inputs))


@pytest.mark.parametrize("padded", [True, False])
def test_a_gpu_computes_the_same(padded: bool, device: torch.device) -> None:
    plain, fused = model().to(device), model("all").to(device)
    inputs = {name: value.to(device) for name, value in batch(padded).items()}
    expected = loss_and_gradients(plain, inputs)
    assert_same(loss_and_gradients(fused, inputs), expected)
    with torch.autocast(device.type, torch.bfloat16):
        actual = loss_and_gradients(fused, inputs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype is torch.float32
        assert (actual[name] - value).norm() <= HALF * value.norm() + 1e-6, name


def test_names_and_files_stay() -> None:
    assert list(model("all").state_dict()) == list(model().state_dict())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("fusions", ["all", "attention", "norm,ffn"])
def test_gradient_checkpointing_repeats_the_same_masks(fusions: str) -> None:
    network, inputs = model(fusions, dropout=0.2), batch()
    torch.manual_seed(3)
    expected = loss_and_gradients(network, inputs)
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(3)
    assert_same(loss_and_gradients(network, inputs), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_keeps_less() -> None:
    network, inputs = model("all", dropout=0.2), batch()

    def kept() -> int:
        total = 0

        def see(x: Tensor) -> Tensor:
            nonlocal total
            total += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
            network(**inputs)
        return total

    before = kept()
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert kept() < before / 2


def test_dropout_follows_the_random_state_and_only_while_training() -> None:
    network, inputs = model("all", dropout=0.3), batch()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(network(**inputs).loss.item())
    assert losses[0] == losses[1] != losses[2]
    network.eval()
    plain = model(dropout=0.3).eval()
    torch.testing.assert_close(network(**inputs).loss, plain(**inputs).loss)


def test_dropout_is_as_strong_as_pytorchs() -> None:
    """Over many masks the mean of a loss agrees, to the error of the mean."""
    inputs = batch()
    means, errors = [], []
    for fusions in ("none", "all"):
        network = model(fusions, dropout=0.3)
        torch.manual_seed(0)
        with torch.no_grad():
            losses = torch.tensor([network(**inputs).loss.item() for _ in range(300)])
        means.append(losses.mean().item())
        errors.append(losses.std().item() / 300**0.5)
    assert abs(means[0] - means[1]) < 4 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5


def curve(fusions: str) -> list[float]:
    network = model(fusions)
    optimizer = AdamW(network.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss = network(**batch(seed=step % 3)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_loss_curves_agree_with_every_fusion_on_and_off() -> None:
    plain, fused = curve("none"), curve("all")
    assert plain[-1] < plain[0] - 0.5
    assert fused == pytest.approx(plain, abs=2e-3)


def test_what_the_fused_encoder_has_not_runs_transformers_code() -> None:
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    plain, fused = model().eval().bert, model("all").eval().bert
    states = fused(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(states[-1], plain(**inputs).last_hidden_state)
    embeddings = plain.embeddings.word_embeddings(inputs["input_ids"])
    torch.testing.assert_close(
        fused(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).last_hidden_state,
        plain(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).last_hidden_state,
    )
    as_tuple = fused(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], fused(**inputs).last_hidden_state)


def test_copies_compute_for_themselves() -> None:
    network = model("all")
    twin = deepcopy(network)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert network(**batch()).loss != twin(**batch()).loss


def test_any_bert_can_be_fused() -> None:
    torch.manual_seed(0)
    network = BertForSequenceClassification(config()).eval()
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    expected = network(**inputs).logits
    torch.testing.assert_close(fuse(network)(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_with_hooks_are_still_seen() -> None:
    network, inputs, seen = model("all"), batch(), []
    for name, layer in named_sparse_layers(network):
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    with_hooks = loss_and_gradients(network, inputs)
    assert sorted(seen) == sorted(name for name, _ in named_sparse_layers(network))
    assert_same(with_hooks, loss_and_gradients(model("all"), inputs))


def test_errors() -> None:
    with pytest.raises(RegrowError, match="'norms' is none of them"):
        Fusions.named("norms")
    with pytest.raises(RegrowError, match="no BertModel"):
        fuse(nn.Linear(2, 2))
    decoder = config()
    decoder.is_decoder = True
    with pytest.raises(RegrowError, match="decoder"):
        fuse(BertModel(decoder))
