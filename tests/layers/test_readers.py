"""Layers whose weight other code reads: found in the source, whatever form that takes, and then adapted right."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, attach, detach, lora_layers, merge
from lightning_lora.layers import WeightLoRALayer, weight_readers
from tests.contract import assert_unchanged, snapshot, train_all
from tests.layers import helper_functions

E = 6


class Parent(nn.Module):
    """A model with a layer that its forward passes by; subclasses do so in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.plain = nn.Linear(E, E), nn.Linear(E, E)
        self.many = nn.ModuleList([nn.Linear(E, E), nn.Linear(E, E)])
        self.inner = nn.ModuleDict({"deep": nn.Linear(E, E)})


class Direct(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(F.linear(x, self.proj.weight, self.proj.bias))


class InMethod(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.project(x))

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.proj.weight)


class InProperty(Parent):
    @property
    def kernel(self) -> Tensor:
        return self.proj.weight.tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x @ self.kernel)


class InBaseClass(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class ByAlias(Parent):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.proj
        weight, bias = layer.weight, layer.bias
        return self.plain(F.linear(x, weight, bias))


class InLoop(Parent):
    def forward(self, x: Tensor) -> Tensor:
        for _, layer in enumerate(self.many):
            x = F.linear(x, layer.weight)
        return self.plain(x)


class BySubscript(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(F.linear(F.linear(x, self.many[0].weight), self.many[1].weight))


class ByName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(F.linear(x, getattr(self, "proj").weight))  # noqa: B009 - as models do it


class InComprehension(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(torch.stack([F.linear(x, layer.weight) for layer in self.many]).sum(0))


class OfContainer(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(F.linear(x, self.inner["deep"].weight))


class InClosure(Parent):
    def forward(self, x: Tensor) -> Tensor:
        def run(y: Tensor) -> Tensor:
            return F.linear(y, self.proj.weight)

        return self.plain(run(x))


def _apply(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight)


class InFunction(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(_apply(x, self.proj))


class InFunctionOfOtherFile(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(helper_functions.applied(x, self.proj))


class OfSlice(Parent):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.many[::-1]:
            x = F.linear(x, layer.weight)
        return self.plain(x)


class OfSum(Parent):
    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.many) + [self.proj]:  # noqa: RUF005 - as models do it
            x = F.linear(x, layer.weight)
        return self.plain(x)


class WeightByName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(F.linear(x, getattr(self.proj, "weight")))  # noqa: B009 - as models do it


class Decoder(nn.Module):
    def forward(self, x: Tensor, embedding: nn.Module) -> Tensor:
        return x @ embedding.weight.T


class InOtherModule(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.decoder(x, embedding=self.proj))


class Converting(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(F.linear(x.type(torch.float64), self.proj.weight.type(torch.float64)).float())


class Mixer(nn.Module):
    """As Gemma 3n's: no forward, but methods that others call."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Linear(E, E)

    def correct(self, x: Tensor) -> Tensor:
        return self.clamped(x)

    def clamped(self, x: Tensor) -> Tensor:
        return F.linear(x, self.coefficients.weight.clamp(-9, 9))


class InMethodOfOther(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.mixer.correct(x))


class InTrainingOnly(Parent):
    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.proj.weight.clamp(-9, 9), self.proj.bias) if self.training else self.proj(x)
        return self.plain(x)


class Unpacked(Parent):
    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.many
        return self.plain(F.linear(F.linear(x, first.weight), rest[0].weight))


class ByWalrus(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(F.linear(x, (layer := self.proj).weight, layer.bias))


class OfChildren(Parent):
    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.many.named_children():
            x = F.linear(x, layer.weight)
        return self.plain(x)


class BySubmodule(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.plain(F.linear(x, self.get_submodule("inner.deep").weight))


class OfPlainList(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.tied = [self.proj]

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(F.linear(x, self.tied[0].weight))


class Invertible(nn.Linear):
    """A layer with a method of its own, beside the forward that it inherits."""

    def scale(self) -> Tensor:
        return self.weight.square().sum()


class InMethodOfTheLayer(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.proj = Invertible(E, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.proj(x)) * self.proj.scale()


class Divided(nn.Linear):
    """A layer whose own forward calls its methods, which no other class does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.halves(x)

    def halves(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Twice(nn.Linear):
    """Calls the forward of its base class by name."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


READERS = {
    Unpacked: {"many.0", "many.1"},
    ByWalrus: {"proj"},
    OfChildren: {"many.0", "many.1"},
    BySubmodule: {"inner.deep"},
    OfPlainList: {"proj"},
    InMethodOfTheLayer: {"proj"},
    Direct: {"proj"},
    InMethod: {"proj"},
    InProperty: {"proj"},
    InBaseClass: {"proj"},
    ByAlias: {"proj"},
    InLoop: {"many.0", "many.1"},
    BySubscript: {"many.0", "many.1"},
    ByName: {"proj"},
    InComprehension: {"many.0", "many.1"},
    OfContainer: {"inner.deep"},
    InClosure: {"proj"},
    InFunction: {"proj"},
    InFunctionOfOtherFile: {"proj"},
    OfSlice: {"many.0", "many.1"},
    OfSum: {"many.0", "many.1", "proj"},
    WeightByName: {"proj"},
    InOtherModule: {"proj"},
    InTrainingOnly: {"proj"},
    Converting: {"proj"},
    InMethodOfOther: {"mixer.coefficients"},
}


def _found(model: nn.Module) -> set[str]:
    readers = weight_readers(list(model.modules()))
    return {name for name, part in model.named_modules() if id(part) in readers}


@pytest.mark.parametrize("reader", READERS)
def test_layer_whose_weight_the_parent_reads_is_found(reader: type[Parent]):
    model = reader()
    assert _found(model) == READERS[reader]
    parent = {InMethodOfOther: "Mixer", InMethodOfTheLayer: "Invertible"}.get(reader, reader.__name__)
    assert set(weight_readers(list(model.modules())).values()) == {parent}


@pytest.mark.parametrize("reader", READERS)
def test_layer_whose_weight_the_parent_reads_trains_and_merges(reader: type[Parent], rng):
    model, x = reader(), torch.randn(3, E, generator=rng)
    base = model(x)
    attach(model, LoRAConfig(rank=2))
    assert torch.equal(model(x), base)
    train_all(model, rng)
    model(x).sum().backward()
    for name in READERS[reader]:
        assert lora_layers(model)[name].lora.B.grad.abs().sum() > 0
    trained = model(x)
    assert not torch.allclose(trained, base, atol=1e-3)
    assert torch.allclose(model.eval()(x), trained, atol=1e-6)
    merge(model)
    assert torch.allclose(model(x), trained, atol=1e-5)


def test_a_layer_whose_own_forward_alone_reads_its_weight_is_left_as_it_is():
    assert not _found(nn.ModuleDict({"layer": Divided(E, E), "other": Twice(E, E)}))


class Asks(Parent):
    """Asks about the weight, changes it and compares it, but never computes with it."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.proj.weight, Tensor)
        assert self.proj.weight is not None
        assert self.proj.weight.type() == "torch.FloatTensor"
        x = x.to(self.proj.weight.dtype).to(self.proj.weight.device)[..., : self.proj.weight.shape[1]]
        return self.plain(self.proj(x))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.proj.weight)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.proj.weight])


def test_asking_about_a_weight_is_not_reading_it():
    model = Asks()
    assert not _found(model)
    attach(model, LoRAConfig(rank=2))
    assert not any(isinstance(layer, WeightLoRALayer) for layer in lora_layers(model).values())
    assert model.proj.weight is model.proj._parameters["weight"]


class CallsAndReads(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.plain(self.proj(x)), self.proj.weight)


def test_code_that_fx_has_generated_is_read(rng):
    model, x = torch.fx.symbolic_trace(CallsAndReads()), torch.randn(3, E, generator=rng)
    assert model.forward.__module__ is None
    assert _found(model) == {"proj"}
    attach(model, LoRAConfig(rank=2))
    assert lora_layers(model).keys() == {"proj", "plain"}
    train_all(model, rng)
    trained = model(x)
    merge(model)
    assert torch.allclose(model(x), trained, atol=1e-5)


def test_torch_modules_that_read_their_layers_are_found():
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2), nn.TransformerDecoderLayer(8, 2)])
    found = {name for name in _found(model) if "norm" not in name}
    assert {"0.linear1", "0.linear2", "0.self_attn.out_proj", "1.multihead_attn.out_proj"} <= found
    assert "1.linear1" not in found


# --- subclasses of nn.Linear with another forward


class Router(nn.Linear):
    """As Llama 4's: scores and logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits.sigmoid(), logits


class BlockDiagonal(nn.Linear):
    """As DeepSeek V4's: every group of features has some of the rows."""

    def forward(self, x: Tensor) -> Tensor:
        groups = self.weight.view(2, -1, self.in_features)
        return torch.einsum("bgi,goi->bgo", x.view(len(x), 2, -1), groups).flatten(1)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 3 * self.weight, self.bias)


class Normalized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class Flipped(nn.Linear):
    """Another order of the outputs, which an update beside it would not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


class Counted(nn.Linear):
    """A plain linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Pair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.plain = inner, nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(self.plain(x).repeat(1, 2) if isinstance(self.inner, BlockDiagonal) else self.plain(x))
        return out[0] * out[1] if isinstance(out, tuple) else out


@pytest.mark.parametrize("layer", [Router, BlockDiagonal, Scaled, Normalized, Flipped, Counted])
def test_linear_subclass_computes_with_the_sum_of_weight_and_update(layer: type[nn.Linear], rng):
    model, x = Pair(layer(E, E)), torch.randn(3, E, generator=rng)
    base = model(x)
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    inner = lora_layers(model)["inner"]
    reference = Pair(layer(E, E))
    reference.load_state_dict({key: value for key, value in model.state_dict().items() if ".lora." not in key})
    for name, part in lora_layers(model).items():
        getattr(reference, name).weight.data += part.lora.spec.scaling * part.lora.B.data @ part.lora.A.data
    assert torch.allclose(model(x), reference(x), atol=1e-5)
    assert not torch.allclose(model(x), base, atol=1e-3)
    model(x).sum().backward()
    assert inner.lora.B.grad.abs().sum() > 0
    merge(model)
    assert torch.allclose(model(x), reference(x), atol=1e-5)


def test_dropout_adapts_beside_a_forward_that_a_trial_shows_to_be_plain(rng):
    model = Pair(Counted(E, E))
    attach(model, LoRAConfig(rank=2, dropout=0.5))
    assert not isinstance(lora_layers(model)["inner"], WeightLoRALayer)
    train_all(model, rng)
    x = torch.randn(3, E, generator=rng)
    assert not torch.equal(model(x), model(x))
    trained = model.eval()(x)
    merge(model)
    assert torch.allclose(model(x), trained, atol=1e-5)


@pytest.mark.parametrize("layer", [Router, BlockDiagonal, Scaled, Normalized, Flipped])
def test_dropout_leaves_out_a_forward_that_it_cannot_go_beside(layer: type[nn.Linear]):
    model = Pair(layer(E, E))
    report = attach(model, LoRAConfig(rank=2, dropout=0.5))
    assert set(lora_layers(model)) == {"plain"}
    assert "needs dropout=0" in report.left_out["inner"]
    detach(model)
    with pytest.raises(ValueError, match=r"'inner' cannot be adapted.*needs dropout=0"):
        attach(model, LoRAConfig(rank=2, dropout=0.5, target_modules=["inner"]))


class Packed(nn.Linear):
    """As a quantized layer's: the weight is packed, and its kernel reads something else."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.packed = self.weight.detach().clone()

    def forward(self, x: Tensor) -> Any:
        return x @ self.packed.T


class PackedPair(Packed):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


def test_forward_that_never_reads_its_weight_gets_the_update_beside_it(rng):
    model, x = Packed(E, E), torch.randn(3, E, generator=rng)
    base = model(x)
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    assert torch.allclose(model(x), base + x @ model.delta_weight().T, atol=1e-5)
    with pytest.raises(RuntimeError, match="does more than apply its weight"):
        merge(model)


def test_forward_that_returns_no_tensor_is_named_at_its_first_use(rng):
    model = PackedPair(E, E)
    attach(model, LoRAConfig(rank=2))
    with pytest.raises(TypeError, match=r"PackedPair returns a tuple.*exclude_modules"):
        model(torch.randn(3, E, generator=rng))


# --- classes with another memory layout


T = TypeVar("T")


class AbstractLinear(ABC, nn.Linear):
    pass


class GenericLinear(Generic[T], nn.Linear):
    pass


class SlottedLinear(nn.Linear):
    __slots__ = ("extra",)


class AbstractRecurrent(ABC, nn.RNNBase):
    pass


class AbstractLSTM(AbstractRecurrent, nn.LSTM):
    """As pytorch-forecasting's."""


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class AbstractNorm(ABC, nn.BatchNorm1d):
    pass


@pytest.mark.parametrize("layer", [AbstractLinear, GenericLinear, SlottedLinear, AbstractLSTM])
def test_class_with_another_layout_trains_merges_and_detaches(layer: Callable[..., nn.Module], rng):
    model, x = First(layer(E, E)), torch.randn(3, 2, E, generator=rng)
    before, base = snapshot(model), model(x)
    attach(model, LoRAConfig(rank=2, target_modules=["inner"]))
    assert isinstance(model.inner, layer)  # type: ignore[arg-type]
    train_all(model, rng)
    trained = model(x)
    assert not torch.allclose(trained, base, atol=1e-3)
    detach(model)
    assert_unchanged(model, before)
    assert torch.equal(model(x), base)


def test_norm_with_another_layout_is_held(rng):
    model = nn.Sequential(nn.Linear(E, E), AbstractNorm(E))
    attach(model, LoRAConfig(rank=2, target_modules=["0"]))
    model.train()(torch.randn(3, E, generator=rng))
    assert torch.equal(model[1].running_mean, torch.zeros(E))
    detach(model)
    assert type(model[1]) is AbstractNorm


class TiedByHand(nn.Module):
    """A language model whose output layer is written as a product with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x) @ self.tokens.weight.T


@pytest.mark.parametrize("options", [{"target_modules": ["tokens"]}, {"trainable_token_indices": {"tokens": [1, 4]}}])
def test_embedding_that_the_parent_also_multiplies_with_is_adapted_in_both_places(options: dict[str, Any], rng):
    model, x = TiedByHand(), torch.tensor([[1, 2, 4]])
    attach(model, LoRAConfig(rank=2, **{"target_modules": [], **options}))
    for parameter in model.tokens.lora.parameters():
        parameter.data.normal_(generator=rng)
    trained, weight = model(x), model.tokens.weight
    assert torch.allclose(trained, F.embedding(x, weight) @ weight.T, atol=1e-6)
    merge(model)
    assert torch.allclose(model(x), trained, atol=1e-6)
