"""Tied weights: untied layers, and language models with tied head and embedding under every option."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    disabled,
    load_adapter,
    load_adapter_state_dict,
    merge,
    merged,
)
from lightning_lora.adapted_model import AdaptedModel
from tests import toys
from tests.contract import TOLERANCE, assert_same_bits, assert_unchanged, error, raises_and_changes_nothing, snapshot
from tests.layers.test_embedding import Sides, Tied, Words, inputs, is_tied, train_everything
from tests.test_callback import Held

pytestmark = [
    pytest.mark.filterwarnings("ignore:These adapters are not smaller.*", "ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SPEC = {"rank": 4, "alpha": 6.0, "untie_weights": True}
each = pytest.mark.parametrize("named", [["head"], ["embed"], ["embed", "head"], ["head", "mix"]], ids=str)
each_kind = pytest.mark.parametrize("kind", ["embedding", "padded embedding", "scaled embedding"])


def untied(
    named: list[str], kind: str = "embedding", dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module]:
    """Return a tied model with adapters on the named layers, and its tied base."""
    base = Tied(kind).to(dtype)
    model = copy.deepcopy(base)
    attach(model, LoRAConfig(target_modules=named, **SPEC))
    return model, base


def dense(model: nn.Module, base: nn.Module, kind: str = "embedding") -> nn.Module:
    """Return a float64 model without ties that has every update in its weights."""
    twin = Words(kind).double()
    twin.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, adapter in AdaptedModel(model).adapters.items():
            D = 1.5 * adapter.B.double() @ adapter.A.double()
            twin.get_parameter(f"{name}.weight").add_(D.T if name == "embed" else D)
    return twin


@pytest.mark.parametrize("name", ["head", "embed"])
def test_named_tied_layer_is_rejected_unless_untied(name: str):
    model = Tied()
    with raises_and_changes_nothing(model, ValueError, f"'{name}' cannot be adapted: its weight is tied to"):
        attach(model, LoRAConfig(rank=4, target_modules=[name]))


@pytest.mark.parametrize("untie", [False, True])
def test_all_linear_skips_and_reports_tied_layer(untie: bool):
    model = Tied()
    report = str(attach(model, LoRAConfig(rank=4, untie_weights=untie)))
    assert list(AdaptedModel(model).adapters) == ["mix"]
    assert is_tied(model)
    assert "left out: head" in report


@each
@each_kind
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_untied_layer_gets_own_copy(named, kind: str, dtype, rng):
    base, x = Tied(kind).to(dtype), inputs(rng)
    shared, keys, output = base.embed.weight, list(base.state_dict()), base(x)
    report = str(attach(base, LoRAConfig(target_modules=named, **SPEC)))
    stored = dict(base.named_parameters(remove_duplicate=False))
    other = "head.weight" if "embed" in named else "embed.weight"
    assert not is_tied(base)
    assert torch.equal(stored["embed.weight"], stored["head.weight"])
    assert stored[other] is shared or len(set(named) & {"embed", "head"}) == 2
    assert [key for key in base.state_dict() if ".lora." not in key] == keys
    assert torch.equal(base(x), output)
    assert any(name in line for name in named for line in report.splitlines() if "copy" in line)


@each
@each_kind
def test_update_affects_only_adapted_side(named: list[str], kind: str, rng):
    (model, base), x = untied(named, kind), inputs(rng)
    train_everything(model, rng)
    truth, before = dense(model, base, kind), snapshot(model)
    assert error(model(x), truth(x)) <= 1e-10
    assert error(base(x), truth(x)) > 0.1
    with merged(model):
        assert error(model(x), truth(x)) <= 1e-10
    assert_unchanged(model, before)
    merge(model)
    assert error(model(x), truth(x)) <= 1e-10
    assert list(model.state_dict()) == list(base.state_dict())
    for name, weight in model.state_dict().items():
        if name.partition(".")[0] in named and name.endswith("weight"):
            assert error(weight, truth.state_dict()[name]) <= 1e-12
        else:
            assert torch.equal(weight, base.state_dict()[name]), name


@each
def test_weight_decay_changes_only_adapters(named: list[str], rng):
    (model, base), x = untied(named), inputs(rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapter_state_dict(model))
    assert_same_bits({n: t for n, t in model.state_dict().items() if ".lora." not in n}, dict(base.state_dict()))


@each
@each_kind
def test_disable_gives_base_and_detach_restores_tie(named: list[str], kind: str, rng):
    model, x = Tied(kind), inputs(rng)
    before, output = snapshot(model), model(x)
    attach(model, LoRAConfig(target_modules=named, **SPEC))
    train_everything(model, rng)
    with disabled(model):
        assert torch.equal(model(x), output)
    assert not torch.allclose(model(x), output)
    detach(model)
    assert_unchanged(model, before)
    assert is_tied(model)
    assert torch.equal(model(x), output)


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copy_and_reloaded_base_have_own_ties(named, copied, rng):
    (model, base), x = untied(named), inputs(rng)
    fresh = copy.deepcopy(base)
    train_everything(model, rng)
    attach(fresh, LoRAConfig(target_modules=named, **SPEC), seed=9)
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    for twin in (fresh, copied(model)):
        assert torch.equal(twin(x), model(x))
        detach(twin)
        assert is_tied(twin)
        assert torch.equal(twin(x), base(x))
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert not is_tied(model)


@each
def test_weights_loaded_after_attaching_become_base(named: list[str], rng):
    (model, _), loaded, x = untied(named), Tied().double(), inputs(rng)
    model.load_state_dict(loaded.state_dict(), strict=False)
    for change in (lambda model: None, detach):
        change(model)
        assert torch.equal(model(x), loaded(x))


def test_other_layers_stay_tied_and_untied_weights_are_not_copied():
    model = Sides()
    shared = model.embed.weight
    mix = model.mix.weight
    attach(model, LoRAConfig(target_modules=["decoder", "mix"], **SPEC))
    stored = dict(model.named_parameters(remove_duplicate=False))
    assert stored["mix.weight"] is mix
    assert stored["embed.weight"] is stored["bag.weight"] is shared
    assert stored["decoder.weight"] is not shared
    detach(model)
    assert model.decoder.weight is shared


# --- language models


DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
SIZES = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "tie_word_embeddings": True}
BART = {f"{side}_{option}": 2 for side in ("encoder", "decoder") for option in ("layers", "attention_heads")}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("GPT2LMHeadModel", {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, **DROPOUT}),
    "Llama": ("LlamaForCausalLM", {"num_hidden_layers": 1, **LLAMA}),
    "Bart": ("BartForConditionalGeneration", {"d_model": 16, "max_position_embeddings": 8, **BART}),
}
CHOSEN = [3, 17, 29]
TEXT = torch.tensor([[3, 17, 4, 29, 5, 6]])


def language_model(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    kind, sizes = FAMILIES[family]
    return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**SIZES, **sizes)).eval()


@pytest.fixture
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its optional dependencies
        return pytest.importorskip("peft")


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tokens_match_dense_model_and_peft(family: str, peft: Any, rng):
    model = language_model(family)
    reference, theirs = copy.deepcopy(model).double(), copy.deepcopy(model)
    attach(model, LoRAConfig(target_modules=[], trainable_token_indices=CHOSEN))
    train_everything(model, rng)
    [(name, rows)] = adapter_state_dict(model).items()
    assert model.get_submodule(name.removesuffix(".lora.rows")) is model.get_input_embeddings()
    theirs = peft.inject_adapter_in_model(peft.TrainableTokensConfig(token_indices=CHOSEN), theirs)
    [delta] = [p for p in theirs.parameters() if p.requires_grad]
    weight = reference.get_input_embeddings().weight
    assert weight is reference.get_output_embeddings().weight
    with torch.no_grad():
        weight[CHOSEN], _ = rows.double(), delta.copy_(rows)
    outputs = [part(TEXT).logits for part in (model, reference, theirs)]
    assert max(error(outputs[0], other) for other in outputs[1:]) <= 1e-5
    merge(model)
    assert error(model(TEXT).logits, outputs[1]) <= 1e-5
    assert_same_bits(dict(model.state_dict()), {name: t.float() for name, t in reference.state_dict().items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_untied_head_matches_dense_model(family: str, rng):
    model = language_model(family)
    reference, shared = copy.deepcopy(model).double(), model.lm_head.weight
    attach(model, LoRAConfig(target_modules=["lm_head"], **SPEC))
    train_everything(model, rng)
    lora = model.lm_head.lora
    reference.lm_head.weight = nn.Parameter(shared.double() + 1.5 * lora.B.double() @ lora.A.double())
    truth = reference(TEXT).logits
    assert error(model(TEXT).logits, truth) <= 1e-5
    merge(model)
    assert error(model(TEXT).logits, truth) <= 1e-5
    assert model.get_input_embeddings().weight is shared


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("family", ["GPT2", "Bart"])
def test_trained_biases_match_peft(family: str, bias: str, peft: Any):
    layers = {"GPT2": ["c_attn", "c_fc"], "Bart": ["q_proj", "fc1"]}[family]
    ours, base = language_model(family), language_model(family)
    attach(ours, LoRAConfig(rank=2, target_modules=layers, bias=bias))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=layers, bias=bias)).base_model.model
    trained = ({n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs))
    found, expected = ({n.replace(".base_layer", "") for n in names if "lora" not in n} for names in trained)
    assert found == expected


class Speaker(toys.Toy):
    """Learns to repeat every token; its pretrained weights are created with it or loaded in ``setup``."""

    def __init__(self, loads: bool) -> None:
        super().__init__()
        self.loads = loads

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = language_model("GPT2")
            self.pretrained = {name: value + 0.01 for name, value in self.net.state_dict().items()}

    def setup(self, stage: str) -> None:
        if self.loads:
            self.net.load_state_dict(self.pretrained)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0], labels=batch[0]).loss


ATTENTION, FACTORS = "net.transformer.h.0.attn.c_attn", ("lora.A", "lora.B")
OPTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "tokens": ({"target_modules": [], "trainable_token_indices": CHOSEN}, {"net.transformer.wte.lora.rows"}),
    "an untied head": ({"target_modules": ["lm_head"], **SPEC}, {f"net.lm_head.{name}" for name in FACTORS}),
    "a bias on B": ({"lora_bias": True}, {f"{ATTENTION}.{name}" for name in (*FACTORS, "lora.bias")}),
    "biases of adapted layers": ({"bias": "lora_only"}, {f"{ATTENTION}.{name}" for name in (*FACTORS, "bias")}),
}


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_fit_saves_resumes_and_reloads_option(option: str, loads: bool, tmp_path: Path):
    def fit(epochs: int, last: Path | None = None) -> tuple[Speaker, Path]:
        module, held, checkpoint = (
            Speaker(loads),
            Held(),
            ModelCheckpoint(tmp_path / f"{epochs} {last}", save_last=True),
        )
        run = toys.trainer(LoRACallback(**options), held, checkpoint, max_epochs=epochs, max_steps=-1)
        run.fit(module, DataLoader(data, batch_size=4), ckpt_path=last, weights_only=True)
        assert set(held.names[0]) == names
        return module, Path(checkpoint.last_model_path)

    options, names = {"target_modules": ["c_attn"], "rank": 2} | OPTIONS[option][0], OPTIONS[option][1]
    data, loaded = TensorDataset(torch.arange(16 * 6).view(16, 6) % 30), Speaker(loads)
    loaded.setup("fit")
    base, (whole, last), (resumed, _) = toys.snapshot(loaded), fit(2), fit(2, fit(1)[1])
    saved = torch.load(last, weights_only=True)["state_dict"]
    assert set(saved) == names
    assert not any(torch.equal(saved[name], base[name]) for name in names & set(base))
    load_adapter(loaded, last)
    for module in (whole, resumed, loaded):
        assert_same_bits(adapter_state_dict(module), saved)
        detach(module)
        assert_same_bits(toys.snapshot(module), base)
        assert module.net.lm_head.weight is module.net.transformer.wte.weight
