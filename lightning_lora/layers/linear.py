"""Linear layers: ``nn.Linear`` with its subclasses, and the ``Conv1D`` of transformers' GPT-2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from lightning_lora.layers.adapter import KNOWN_BY_NAME, KNOWN_BY_STRUCTURE, base_weight, register_adapter
from lightning_lora.layers.lora_layer import LoRALayer, Mode, reads_weight
from lightning_lora.layers.low_rank import LowRankAdapter
from lightning_lora.layers.readers import reads_own_weight
from lightning_lora.layers.starts import seeded
from lightning_lora.names import OTHERS
from lightning_lora.ops.linear import lora_add, lora_linear, lora_update
from lightning_lora.sharding import unwrapped


class LinearAdapter(LowRankAdapter):
    """``y += scaling * dropout(x) @ A.T @ B.T`` beside any ``nn.Linear``."""

    kind = "linear"
    replaces = staticmethod(nn.Linear.forward)  # torch's own: a forward patched later is called
    takes_bias = True
    vllm_takes = True

    @classmethod
    @override
    def in_all_linear(cls, module: nn.Module) -> bool:
        return True

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        layer = cast(nn.Linear, module)
        return layer.out_features, layer.in_features

    @classmethod
    @override
    def sliced_parameter(cls, module: nn.Module) -> str | None:
        return "weight"

    @classmethod
    @override
    def needs_weight(cls, module: nn.Module) -> bool:
        # A subclass may compute anything with its weight; one with a quantized weight applies it as it is.
        own = _own_forward(module)
        return own is not None and base_weight(module).is_floating_point() and reads_own_weight(own)

    @classmethod
    @override
    @torch.no_grad()
    def adds_to_output(cls, module: nn.Module) -> bool:
        is_foreign = not isinstance(module, nn.Linear)  # a class that was registered with this adapter
        if _own_forward(module) is None and not (is_foreign and _can_be_tried(module, cls)):
            return True
        weight, before = base_weight(module), (module.training, getattr(module, "lora_mode", None))
        row = torch.randn(1, weight.shape[-1], generator=seeded(0)).to(weight)
        # Every output changes by another amount, so that a forward which mixes them is seen.
        rows = 1.0 + torch.rand(len(weight), 1, generator=seeded(1)).to(weight)
        change = (weight.std() + 1.0) * rows @ row.sign()
        try:
            module.eval()  # dropout would differ from call to call
            if isinstance(module, LoRALayer):
                module.lora_mode = "disabled"
            without, with_change = (functional_call(module, {"weight": w}, (row,)) for w in (weight, weight + change))
            return torch.allclose(with_change - without, row @ change.T, rtol=0.05)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return is_foreign  # it takes or returns something other than rows: whoever registered it knows
        finally:
            module.train(before[0])
            if isinstance(module, LoRALayer):
                module.lora_mode = cast(Mode, before[1])

    @override
    def prepare(self, module: nn.Module, parameter: str) -> None:
        if self.spec.rows:
            vars(self)["replaces"] = None  # the layer computes the other rows

    @override
    def forward(self, inputs: Tensor, output: Tensor | None, layer: Any, is_ours: bool = False) -> Tensor:
        if output is not None:
            return super().forward(inputs, output, layer, is_ours)
        # Read at every call, because FSDP, loading and moving a model replace these tensors.
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        spec = self.spec
        # Most have neither, and need no call.
        A, B = self.factors() if self._buffers or self.is_waiting else (self.A, self.B)
        total = lora_linear(
            inputs,
            layer.weight if weight is None else weight,  # computed, if it is parametrized
            layer.bias if bias is None else bias,
            A,
            B,
            scaling=spec.scaling,
            dropout=spec.dropout if spec.dropout and self.training else 0.0,
        )
        return total if self.is_plain else self.with_extras(total, layer)

    @override
    def tokens_in(self, layer: nn.Module, inputs: Sequence[Any]) -> Tensor | None:
        return _as_sequences(inputs[0])

    @override
    def tokens_out(self, output: Tensor) -> Tensor | None:
        output = _as_sequences(output)
        return output.index_select(-1, self.index) if self.spec.rows else output

    @override
    def added(self, inputs: Tensor, output: Tensor, is_ours: bool) -> Tensor:
        (A, B), options = self.factors(), {"scaling": self.spec.scaling, "dropout": self.dropout_now()}
        return lora_add(output, inputs, A, B, is_ours=is_ours, **options)

    @override
    def update(self, inputs: Tensor, output: Tensor) -> Tensor:
        return lora_update(inputs, *self.factors(), scaling=self.spec.scaling, dropout=self.dropout_now())

    @override
    def recorded_shape(self, layer: nn.Module) -> Sequence[int] | None:
        # This class is the output projection of attention, which PEFT adapts only together with the attention.
        return None if isinstance(layer, NonDynamicallyQuantizableLinear) else self.matrix_shape(layer)

    @classmethod
    @override
    def stand_in(cls, shape: Sequence[int]) -> nn.Module:
        out_features, in_features = shape
        return nn.Linear(in_features, out_features, bias=False)

    @classmethod
    @override
    def peft_obstacle(cls, layer: nn.Module, parameter: str, *, use_dora: bool, lora_bias: bool) -> str | None:
        if not isinstance(layer, nn.Linear):
            return super().peft_obstacle(layer, parameter, use_dora=use_dora, lora_bias=lora_bias)
        if reads_weight(layer, cls) and _own_forward(layer) is not None and not cls.adds_to_output(layer):
            kind = getattr(layer, "base_class", type(layer)).__name__
            return f"PEFT adds the update to the output, and a {kind} does more than apply its weight"
        return _DORA_AND_BIAS if use_dora and lora_bias else None


def _as_sequences(rows: Tensor) -> Tensor:
    """Return ``(..., features)`` with one dimension of sequences and one of tokens."""
    return rows.view(1, 1, -1) if rows.ndim == 1 else rows.reshape(len(rows), -1, rows.shape[-1])


def _own_forward(layer: nn.Module) -> type[nn.Module] | None:
    """Return the class of an ``nn.Linear``, adapted or not, that has a forward of its own, or None."""
    own = getattr(layer, "base_class", type(layer))
    return own if isinstance(layer, nn.Linear) and own.forward is not nn.Linear.forward else None


def _can_be_tried(layer: nn.Module, adapter: type[LinearAdapter]) -> bool:
    """Return whether a layer was registered by other code, and has the weight that ``nn.Linear`` would have."""
    weight, is_ours = layer._parameters.get("weight"), adapter.__module__.startswith("lightning_lora.")
    return not is_ours and weight is not None and tuple(weight.shape) == adapter.matrix_shape(layer)


_DORA_AND_BIAS = "PEFT does not combine lora_bias with DoRA"


class StoredConv1D(nn.Module):
    """A stand-in for transformers' ``Conv1D``, with the two attributes by which such a layer is recognized."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.nx, self.nf = in_features, out_features


class Conv1DAdapter(LinearAdapter):
    """The same for transformers' ``Conv1D``, a linear layer that stores its weight as ``(in, out)``."""

    kind = "conv1d"

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        weight, out_features = getattr(module, "weight", None), getattr(module, "nf", None)
        return isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == out_features

    @classmethod
    @override
    def matrix_of(cls, shape: Sequence[int]) -> tuple[int, int]:
        return shape[-1], shape[-2]

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        return cls.matrix_of(base_weight(module).shape)

    @override
    def recorded_shape(self, layer: Any) -> Sequence[int] | None:
        return (layer.nx, layer.nf) if hasattr(layer, "nx") else None

    @classmethod
    @override
    def stand_in(cls, shape: Sequence[int]) -> nn.Module:
        in_features, out_features = shape
        return StoredConv1D(in_features, out_features)

    @classmethod
    @override
    def peft_obstacle(cls, layer: nn.Module, parameter: str, *, use_dora: bool, lora_bias: bool) -> str | None:
        return _DORA_AND_BIAS if use_dora and lora_bias else None

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    @override
    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.T


class StoredLinear(nn.Module):
    """A stand-in for a linear layer that is no ``nn.Linear``."""


class LinearLikeAdapter(LinearAdapter):
    """The same for any module that proves to compute ``x @ weight.T + bias``, such as PyG's ``Linear``."""

    kind = "linear-like"

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        lora = module._modules.get("lora")
        if isinstance(module, StoredLinear) or (lora is not None and isinstance(unwrapped(lora), cls)):
            return True
        return _may_be_linear(module) and _is_linear(module)

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        return cls.matrix_of(base_weight(module).shape)

    @classmethod
    @override
    def sliced_parameter(cls, module: nn.Module) -> str | None:
        return None

    @override
    def prepare(self, module: nn.Module, parameter: str) -> None:
        self.weight_shape = tuple(base_weight(module).shape)

    @override
    def recorded_shape(self, layer: nn.Module) -> Sequence[int] | None:
        return self.weight_shape

    @classmethod
    @override
    def stand_in(cls, shape: Sequence[int]) -> nn.Module:
        return StoredLinear()


def _may_be_linear(module: nn.Module) -> bool:
    """Return whether a module has the parameters of a linear layer, and nothing else."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.ndim != 2 or weight.dtype not in _PRECISIONS:
        return False
    has_modules = not module._modules.keys() <= {OTHERS}
    has_more = has_modules or module._buffers or not module._parameters.keys() <= {"weight", "bias"}
    return not has_more and "forward" not in vars(module) and (bias is None or bias.shape == weight.shape[:1])


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Try on two rows whether a module's forward is that of ``nn.Linear``, in training and in evaluation.

    A twin with the same parameters computes it, so that nothing of the module changes and none of its hooks runs.
    """
    own, generator = cast(Any, module)._parameters, torch.Generator().manual_seed(0)
    if own["weight"].is_meta or not own["weight"].any():  # these values would prove nothing
        own = {
            key: p if p is None else torch.rand(p.shape, generator=generator, dtype=p.dtype) for key, p in own.items()
        }
    rows = torch.randn(2, own["weight"].shape[1], generator=generator).to(own["weight"])
    expected = F.linear(rows, own["weight"], own.get("bias"))
    rounding = 16 * torch.finfo(rows.dtype).eps * expected.double().norm()
    with torch.random.fork_rng(devices=[]):  # a forward may draw, such as for dropout
        for training in (True, False):
            try:
                twin = type(module).__new__(type(module))
                vars(twin).update(vars(module) | {"_parameters": own, "training": training})
                output = twin.forward(rows)
            except Exception:  # whatever it expects, it is not a row
                return False
            if not isinstance(output, Tensor) or output.shape != expected.shape:
                return False
            if not (output.double() - expected.double()).norm() <= rounding:
                return False
    return True


_PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

register_adapter(nn.Linear, LinearAdapter)
register_adapter(StoredConv1D, Conv1DAdapter)
register_adapter(StoredLinear, LinearLikeAdapter)
KNOWN_BY_NAME["Conv1D"] = Conv1DAdapter
KNOWN_BY_STRUCTURE.append(LinearLikeAdapter)
