"""Plain LoRA: the factors ``A`` and ``B``, and the update ``scaling * B @ A`` in a weight.

``starts.py`` holds the first values of the factors, and ``dora.py`` DoRA's magnitude. The layers' own files say how a
kind of layer adds the update to its output.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nested import as_nested_tensor
from typing_extensions import override

from lightning_lora.layers import dora
from lightning_lora.layers.adapter import Adapter, Block, InBlocks, base_parameter, row_numbers
from lightning_lora.layers.starts import DIFFERENCES, INITIALIZERS, random_start, seeded, zeros
from lightning_lora.ops.eager import add, is_traced
from lightning_lora.sharding import copy_whole, gathered, is_sharded, place_factors, whole


class LowRankAdapter(Adapter):
    """The factors of one layer's update ``scaling * B @ A``.

    Options add to that: ``use_dora`` a magnitude for each row of the sum, ``lora_bias`` a bias of ``B``, and ``rows``
    restricts the update to some rows of the weight.

    Shapes: ``A`` is ``(rank, in)`` and ``B`` is ``(out, rank)``, with ``(out, in)`` from ``matrix_shape``, or fewer
    rows where only some are adapted; ``magnitude`` and ``bias`` are ``(out,)``.

    Source:
        Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """

    trailing_dimensions: int = 0  # of the output, after the one that holds the features
    takes_starts: ClassVar[bool] = True  # the start may be computed from weights or data; embeddings keep theirs
    kernel_shape: tuple[int, ...] = ()  # what the columns of `A` flatten, (channels, *positions), if it is a kernel
    writes_kernel: ClassVar[bool] = False  # these columns are of the outputs, and the rows of `B` of the inputs
    is_plain: bool  # nothing but the factors
    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter
    bias: nn.Parameter
    A0: Tensor  # where the factors started, if `B0 @ A0` is not zero: what is added is the difference
    B0: Tensor
    mask: Tensor  # (rank,): 1 for components in use, which come first, 0 for the others; only where that changes
    kept: int | None = None  # how many are in use; None for all

    # --- the start

    @override
    def build(self, module: nn.Module, parameter: str) -> None:
        spec, weight = self.spec, base_parameter(module, parameter)
        out_features, in_features = self.matrix_shape(module, parameter)
        A, B = self.start(len(self.index) if spec.rows else out_features, in_features)
        if spec.dtype != A.dtype or not weight.is_cpu:
            A, B = A.to(weight.device, spec.dtype), B.to(weight.device, spec.dtype)
        if type(weight) is not nn.Parameter and is_sharded(weight):
            A, B = place_factors(A, B, self.as_matrix(weight))
        # Written into the tables: the checks of nn.Module.__setattr__ would take a third of the time of attach.
        self._parameters["A"], self._parameters["B"] = nn.Parameter(A), nn.Parameter(B)
        vars(self)["is_plain"] = not (spec.use_dora or spec.lora_bias or spec.rows)
        vars(self)["is_waiting"] = self.takes_starts and spec.init not in INITIALIZERS
        if self.takes_starts and spec.init in DIFFERENCES:
            self.register_buffer("A0", A.detach().clone())
            self.register_buffer("B0", B.detach().clone())
        if spec.use_dora:
            with gathered([weight]):
                self._parameters["magnitude"] = nn.Parameter(self.starts(weight)["magnitude"])
        if spec.lora_bias:
            bias = B.new_zeros(B.shape[0])
            self._parameters["bias"] = nn.Parameter(bias.to(self.kept_dtype(bias)))

    def start(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """Return the initial ``A`` and ``B``, on the CPU: the same for the same spec, on any device and rank.

        By default ``A`` is random and ``B`` zero. Embeddings override this: their ``A`` is zero and their ``B`` random.
        """
        A = random_start(self.spec.init)(self.spec.rank, in_features, seeded(self.spec.seed))
        return A, zeros(out_features, self.spec.rank)

    @override
    @torch.no_grad()
    def starts(self, weight: Tensor) -> dict[str, Tensor]:
        if not self.spec.use_dora:
            return {}
        norms = dora.norms(self._rows(self.as_matrix(weight)), torch.promote_types(self.A.dtype, torch.float32))
        return {"magnitude": norms.to(self.kept_dtype(norms))}

    def norms_now(self, layer: nn.Module) -> Tensor:
        """Return the norms of the rows of the layer's weight with the update, without a magnitude: ``(out,)``."""
        return self.row_norms(self._rows(self.as_matrix(base_parameter(layer, self.parameter))))

    @override
    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.spec.use_dora:
            raise RuntimeError("use_dora starts from the norms of the weights: attach after the weights are loaded.")
        A, B = self.start(self.B.shape[-2], self.A.shape[-1])
        self.put_start(A, B)
        if "mask" in self._buffers:
            self.keep(self.spec.rank)
        if self.spec.lora_bias:
            self.bias.zero_()
        if self.spec.rows:
            self.index.copy_(row_numbers(self.spec.rows))

    @torch.no_grad()
    def put_start(self, A: Tensor, B: Tensor) -> None:
        """Set the factors that training starts from, given whole; the model computes the same as without them."""
        copy_whole(self.A, A)
        copy_whole(self.B, B)
        if self.is_difference:
            copy_whole(self.A0, A)
            copy_whole(self.B0, B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of what is added: ``A`` and ``B``, or those of ``B @ A - B0 @ A0``, of twice the rank.

        Raises:
            RuntimeError: They wait for their start, and this pass is for training.
        """
        if self.is_waiting:
            self.refuse_to_train()
        if "A0" in self._buffers:
            return difference(self.A, self.B, self.A0, self.B0)
        return (self.A, self.B) if self.kept is None else components(self.A, self.B, self.kept)

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """Return the same, gathered where sharding divides them; then every process must call this."""
        A, B = whole(self.A), whole(self.B)
        if self.is_difference:
            return difference(A, B, whole(self.A0), whole(self.B0))
        return (A, B) if self.kept is None else components(A, B, self.kept)

    # --- the rank

    @property
    def rank(self) -> int:
        """The rank that is in use."""
        return self.spec.rank if self.kept is None else self.kept

    @property
    def in_use(self) -> Tensor:
        """A flag for each component of the factors."""
        return self.mask != 0

    @torch.no_grad()
    def keep(self, count: int) -> None:
        """Use the first components of the factors, and leave the others out; no shape changes."""
        if "mask" not in self._buffers:  # numbers, because averages of modules cannot take flags
            self.register_buffer("mask", torch.ones(self.spec.rank, device=self.A.device))
        self.mask.copy_(torch.arange(self.spec.rank, device=self.mask.device) < count)
        self._follow_mask()

    def forget_mask(self) -> None:
        """Use all components, and have no mask any more."""
        del self.mask
        self._follow_mask()

    def _follow_mask(self) -> None:
        mask = self._buffers.get("mask")
        kept = None if mask is None or mask.is_meta else int(mask.count_nonzero())
        vars(self)["kept"] = None if kept == self.spec.rank else kept

    @override
    def have_values(self) -> None:
        super().have_values()
        self._follow_mask()

    def refuse_to_train(self) -> None:
        """Raise if a pass is for training, while this waits for its start."""
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"init={self.spec.init!r} is computed before training, and it has not been. Call "
                "lightning_lora.calibrate(model, batches) after attach, or load an adapter; LoRACallback does both."
            )

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}mask" in state_dict and "mask" not in self._buffers:
            self.keep(self.spec.rank)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}A" in state_dict:  # not those of the base alone
            self.have_values()

    def zero_factor(self) -> nn.Parameter:
        """Return the factor that starts at zero, so that the model starts unchanged."""
        return self.B

    @override
    def has_effect(self, weight: Tensor) -> bool:
        if self.is_difference:
            return bool(torch.any(self.A != self.A0)) or bool(torch.any(self.B != self.B0))
        return bool(torch.any(self.zero_factor() != 0))

    def fits(self, layer: nn.Module) -> bool:
        """Return whether the factors still have the shape of the layer's weight; True where sharding hides shapes."""
        weight = layer._parameters.get(self.parameter)
        if weight is None or weight.ndim < 2 or self.A.ndim < 2:
            return True
        is_packed = not weight.is_floating_point()
        shape = self.matrix_shape(layer, self.parameter) if is_packed else self.matrix_of(weight.shape)
        return self.A.shape[-1] == shape[1] and (bool(self.spec.rows) or self.B.shape[-2] == shape[0])

    # --- what calibration sees

    def tokens_in(self, layer: nn.Module, inputs: Sequence[Any]) -> Tensor | None:  # noqa: ARG002 - some cannot
        """Return a call's inputs as ``(sequences, tokens, in)``: what the weight is multiplied with, token by token.

        None if the arguments of the layer do not tell.
        """
        return None

    def tokens_out(self, output: Tensor) -> Tensor | None:  # noqa: ARG002 - most are seen in the weight alone
        """Return a call's output, or its gradient, as ``(sequences, tokens, out)``; None if it is not that of tokens.

        They are those of ``tokens_in``.
        """
        return None

    # --- beside the layer

    @abstractmethod
    def update(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return what ``scaling * B @ A`` adds to the layer's ``output`` for ``inputs``."""

    @override
    def forward(self, inputs: Tensor, output: Tensor, layer: nn.Module, is_ours: bool = False) -> Tensor:
        if not self.spec.rows:
            return self.with_extras(self.added(inputs, output, is_ours), layer)
        if is_list(output):
            return piece_by_piece(lambda x, y: self(x, y, layer), inputs, output)
        part = self.with_extras(self.added(inputs, output.index_select(-1, self.index), not is_traced()), layer)
        if is_ours and not output._is_view():
            return output.index_copy_(-1, self.index, part)
        return output.index_copy(-1, self.index, part)

    def added(self, inputs: Tensor, output: Tensor, is_ours: bool) -> Tensor:
        """Return the layer's ``output`` with the update, made in its memory if that ``is_ours``."""
        return add(output, self.update(inputs, output), is_ours)

    def with_extras(self, total: Tensor, layer: nn.Module) -> Tensor:
        """Return a sum of output and update, which may be changed, with DoRA and the bias of ``B`` applied."""
        if not self.is_plain and is_list(total):
            return piece_by_piece(lambda y: self.with_extras(y, layer), total)
        if self.spec.use_dora:
            norms = self.norms_now(layer)
            bias = layer._parameters.get("bias")
            own = None if bias is None else self._along_features(self._rows(bias))
            total = dora.rescaled(total, self._along_features(self.magnitude / norms), own)
        if self.spec.lora_bias:
            total = add(total, self._along_features(self.spec.scaling * self.bias), not is_traced())
        return total

    def _along_features(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * self.trailing_dimensions)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(0, self.index) if self.spec.rows else tensor

    def dropout_now(self) -> float:
        """Return the probability of dropping an element in the current mode."""
        # torch.compile makes a graph for each mode that is asked for, so ask only if it matters.
        return self.spec.dropout if self.spec.dropout and self.training else 0.0

    def dropped(self, inputs: Tensor) -> Tensor:
        """Return the adapter's input after dropout; the frozen layer's own input is never touched."""
        return F.dropout(inputs, self.spec.dropout, self.training) if self.spec.dropout else inputs

    # --- in the weight

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as the layer stores it, read as ``(out, in)``."""
        return weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Return an ``(out, in)`` matrix in the layout in which the layer stores its weight."""
        return matrix

    @override
    def combined(self, weight: Tensor) -> Tensor:
        matrix = self.as_matrix(weight)
        dtype = torch.promote_types(torch.promote_types(self.A.dtype, torch.float32), matrix.dtype)
        matrix = matrix.to(dtype)
        part, (A, B) = self._rows(matrix), self._factors_in_float()
        total = _sum(part, A.to(dtype), B.to(dtype), self.spec.scaling)
        if self.spec.use_dora:
            total = total * (whole(self.magnitude) / self.row_norms(part)).unsqueeze(1)
        # Not index_copy: its backward keeps what was copied, for the shape.
        return self.as_stored(matrix.index_put((self.index,), total) if self.spec.rows else total)

    @override
    def in_blocks(self, weight: Tensor) -> InBlocks | None:
        if is_sharded(weight):
            return None
        matrix, (A, B) = self.as_matrix(weight), self._factors_in_float()
        if matrix.data_ptr() != weight.data_ptr():
            return None  # a copy
        ratio = None
        if self.spec.use_dora:
            index = self.index if self.spec.rows else None
            ratio = (whole(self.magnitude) / self.row_norms(matrix, index)).unsqueeze(1)
        dtype = torch.promote_types(A.dtype, matrix.dtype)
        return InBlocks(matrix, dtype, partial(self._add_to, A, B, ratio), in_one_pass=self.is_plain)

    def _add_to(self, A: Tensor, B: Tensor, ratio: Tensor | None, total: Tensor, block: Block) -> None:
        """Apply ``combined`` to a block of the weight, in place."""
        if A.dtype is not total.dtype:
            A, B = A.to(total.dtype), B.to(total.dtype)
        if not self.spec.rows:
            A, B = block.of_factors(A, B)
            total.addmm_(B, A, alpha=self.spec.scaling)
            if ratio is not None:
                total.mul_(block.rows_of(ratio))
            return
        places, at = self.rows_in(block)
        A = block.of_factors(A, B)[0] if block.by_columns else A
        part = total.index_select(0, at).addmm_(B[places], A, alpha=self.spec.scaling)
        total.index_copy_(0, at, part if ratio is None else part.mul_(ratio[places]))

    @override
    def delta_weight(self, weight: Tensor) -> Tensor:
        if self.spec.use_dora:
            return super().delta_weight(weight)
        A, B = self._factors_in_float()
        delta = self.spec.scaling * (B @ A)
        if self.spec.rows:
            delta = torch.zeros_like(self.as_matrix(weight), dtype=delta.dtype).index_copy(0, self.index, delta)
        return self.as_stored(delta)

    @override
    def bias_delta(self) -> Tensor | None:
        return self.spec.scaling * whole(self.bias) if self.spec.lora_bias else None

    def row_norms(self, matrix: Tensor, index: Tensor | None = None) -> Tensor:
        """Return DoRA's ``n``, the norms of the rows of ``matrix + scaling * B @ A``; see ``dora.norms_of_sum``."""
        return dora.norms_of_sum(matrix, *self._factors_in_float(), self.spec.scaling, index)

    def _factors_in_float(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        A, B = self.whole_factors()
        return A.to(dtype), B.to(dtype)


def is_list(tensor: Tensor) -> bool:
    """Return whether a tensor is nested in the older layout, torch.strided, which knows few operations."""
    return tensor.is_nested and tensor.layout is torch.strided


def piece_by_piece(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return what a function makes of such tensors' pieces, which know all operations."""
    pieces = zip(*(tensor.unbind() for tensor in tensors), strict=True)
    return as_nested_tensor([function(*each) for each in pieces])


def as_computed(A: Tensor, B: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors in the precision of a layer's inputs; under autocast the operators cast by themselves."""
    if A.dtype == inputs.dtype or torch.is_autocast_enabled(inputs.device.type):
        return A, B
    return A.to(inputs.dtype), B.to(inputs.dtype)


def components(A: Tensor, B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return views of the factors' first components."""
    return A.narrow(-2, 0, count), B.narrow(-1, 0, count)


def difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of ``B @ A - B0 @ A0``, of twice the rank.

    At the start their product is exactly zero, in contrast to that of ``[B, -B0]`` and ``[A; A0]``, whose sums are
    rounded.
    """
    return torch.cat([A - A0, A0.to(A.dtype)], -2), torch.cat([B, B - B0], -1)


def _sum(matrix: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return ``matrix + scaling * B @ A``, of a stack for each of its matrices, laid out in memory as the matrix."""
    add = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    if matrix.stride(-2) < matrix.stride(-1):
        # A transpose. With another layout, torch would choose other kernels, and results differ in the last bits.
        return add(matrix.mT, A.mT, B.mT, alpha=scaling).mT
    return add(matrix, B, A, alpha=scaling)
