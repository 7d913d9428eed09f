"""The adapted layer and its adapter: what every kind of layer has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.initializers import INITIALIZERS, seeded, zeros
from lightning_lora.layers.swap import Swapped

Mode = Literal["active", "disabled", "merged"]


class AdapterSpec(NamedTuple):
    """All that decides one adapter, resolved for its layer.

    Args:
        rank: Rank of the update.
        scaling: Factor of ``B @ A``, resolved once; nothing recomputes it later.
        dropout: Probability of dropping an element of the adapter's input while training.
        init: Name of the start of the random factor.
        dtype: Precision of the factors.
        seed: Seed of the layer's start.
    """

    rank: int
    scaling: float
    dropout: float
    init: str
    dtype: torch.dtype
    seed: int


_EMPTY_MODULE = vars(nn.Module())
_TABLES = [name for name, value in _EMPTY_MODULE.items() if isinstance(value, (dict, set))]


class Adapter(nn.Module, ABC):
    """The factors of one layer's update ``scaling * B @ A``, as the layer's child module ``lora``.

    A child of its own lets FSDP give the trainable factors units apart from the frozen weight. Subclasses say how one
    kind of layer uses the factors.

    Shapes: ``A`` is ``(rank, in)`` and ``B`` is ``(out, rank)``, with ``(out, in)`` from ``matrix_shape``.
    """

    drops_input: ClassVar[bool] = True  # `dropout` applies to this kind
    A: nn.Parameter
    B: nn.Parameter
    spec: AdapterSpec

    def __init__(self, module: nn.Module, spec: AdapterSpec, parameter: str = "weight") -> None:
        # What nn.Module.__init__ sets, copied: it sets a dozen tables one by one, for a tenth of attaching's time.
        own = vars(self)
        own.update(_EMPTY_MODULE)
        for name in _TABLES:
            own[name] = own[name].copy()
        own["spec"] = spec
        self.prepare(module, parameter)
        shape, device = self.matrix_shape(module, parameter), base_parameter(module, parameter).device
        A, B = self.start(*shape)
        # Straight into the tables: nn.Module.__setattr__ asks what is known here, for a third of attaching's time.
        if spec.dtype != A.dtype or device != A.device:
            A, B = A.to(device, spec.dtype), B.to(device, spec.dtype)
        self._parameters["A"], self._parameters["B"] = nn.Parameter(A), nn.Parameter(B)

    def prepare(self, module: nn.Module, parameter: str) -> None:
        """Keep what the update needs to know of the module besides the factors."""

    @classmethod
    @abstractmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether this is the adapter for such a module."""

    @classmethod
    @abstractmethod
    def matrix_shape(cls, module: nn.Module, parameter: str = "weight") -> tuple[int, int]:
        """Return ``(out, in)`` of the module's weight, read as a matrix."""

    @classmethod
    def stack(cls, module: nn.Module, parameter: str) -> int:  # noqa: ARG003 - most kinds hold one
        """Return how many matrices the parameter is a stack of; each has factors of its own."""
        return 1

    @classmethod
    def in_all_linear(cls, module: nn.Module) -> bool:  # noqa: ARG003 - most kinds are not
        """Return whether ``target_modules="all-linear"`` means such a module."""
        return False

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:  # noqa: ARG003 - most kinds have one
        """Return the parameters that naming such a module adapts."""
        return ("weight",)

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:  # noqa: ARG003 - most kinds have none
        """Return why such a module cannot be adapted after all, or None."""
        return None

    @classmethod
    def needs_weight(cls, module: nn.Module) -> bool:  # noqa: ARG003 - most kinds do not
        """Return whether the update must be read from such a module's weight, not added to its output."""
        return False

    @abstractmethod
    @override
    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the layer's ``output`` for ``inputs`` plus the adapter's update of it."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Return the update of the base weight, in its shape; float32, or float64 if the factors are."""

    def zero_factor(self) -> nn.Parameter:
        """Return the factor that starts at zero, so that the model starts unchanged."""
        return self.B

    def start(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``B`` as they start, on the CPU: the same for the same spec, on any device and rank."""
        A = INITIALIZERS[self.spec.init](self.spec.rank, in_features, seeded(self.spec.seed))
        return A, zeros(out_features, self.spec.rank)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Go back to the start; called after a module on the meta device has been given memory."""
        A, B = self.start(self.B.shape[-2], self.A.shape[-1])
        self.A.copy_(A)
        self.B.copy_(B)

    def matrix_delta(self) -> Tensor:
        """Return ``scaling * B @ A``, ``(out, in)``, summed in float32 or better."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return self.spec.scaling * (self.B.to(dtype) @ self.A.to(dtype))

    def dropped(self, inputs: Tensor) -> Tensor:
        """Return the adapter's input after dropout; the frozen layer's own input is never touched."""
        return F.dropout(inputs, self.spec.dropout, self.training) if self.spec.dropout else inputs

    def factors_as(self, dtype: torch.dtype, device_type: str) -> tuple[Tensor, Tensor]:
        """Return the factors in the layer's compute dtype; under autocast the operators cast by themselves."""
        if self.A.dtype == dtype or torch.is_autocast_enabled(device_type):
            return self.A, self.B
        return self.A.to(dtype), self.B.to(dtype)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Follow the module to another device, but keep the factors' precision; only float64 is followed."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or moved.dtype == torch.float64:
                return moved
            return tensor.to(device=moved.device, dtype=self.spec.dtype)

        return cast(Adapter, super()._apply(keep_precision, recurse))  # type: ignore[no-untyped-call]

    @override
    def extra_repr(self) -> str:
        return f"rank={self.spec.rank}, scaling={self.spec.scaling:g}, dropout={self.spec.dropout:g}"


class LoRALayer(Swapped):
    """A layer that carries a LoRA update; ``isinstance(module, LoRALayer)`` is how anything finds adapted layers.

    Attributes:
        lora: The adapter, with the factors ``lora.A`` and ``lora.B``.
        lora_mode: ``"active"`` adds the update in ``forward``, ``"disabled"`` leaves it out, ``"merged"`` means that
            the weight holds it for now (inside ``merged()``).
    """

    class_prefix = "LoRA"
    lora: Any  # an Adapter, or for layers of several parameters an AdapterGroup
    lora_mode: Mode = "active"

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(*args, **kwargs)
        if self.lora_mode != "active":
            return output
        inputs = args[0] if args else next(iter(kwargs.values()))
        return cast(Tensor, self.lora(inputs, output))

    def adapters(self) -> dict[str, Adapter]:
        """Return the adapters of this layer by the parameter that each updates."""
        return {"weight": self.lora}

    @property
    def rank(self) -> int:
        """Rank of the update, of a layer with one."""
        return cast(Adapter, self.lora).spec.rank

    @property
    def scaling(self) -> float:
        """Factor of ``B @ A``, of a layer with one update."""
        return cast(Adapter, self.lora).spec.scaling

    def delta_weight(self, parameter: str = "weight") -> Tensor:
        """Return the update this layer adds to a base weight, in the weight's shape.

        Args:
            parameter: Which weight, of a layer with several.

        Returns:
            Tensor of the weight's shape, float32, or float64 if the factors are.

        Source:
            Hu et al. 2021, arXiv:2106.09685, eq. 3.
        """
        with torch.no_grad():
            return self.adapters()[parameter].delta_weight()


def base_parameter(module: nn.Module, name: str) -> Tensor:
    """Return a parameter that an adapter of ``module`` updates, without the update."""
    parameter = module._parameters.get(name)
    return cast(Tensor, getattr(module, name)) if parameter is None else parameter


def base_weight(module: nn.Module) -> Tensor:
    """Return the weight of ``module`` without the update."""
    return base_parameter(module, "weight")
