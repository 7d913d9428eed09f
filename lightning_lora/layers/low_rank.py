"""The low-rank update ``scaling * B @ A``, with DoRA's magnitude, a bias or a choice of rows on top."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.adapter import Adapter, Block, InBlocks, at_once, base_parameter, row_numbers
from lightning_lora.layers.initializers import INITIALIZERS, seeded, zeros
from lightning_lora.ops.autocast import without_autocast
from lightning_lora.ops.inplace import add, is_traced
from lightning_lora.sharding import copy_whole, gathered, is_sharded, place_factors, whole


class LowRankAdapter(Adapter):
    """The factors of one layer's update ``scaling * B @ A``.

    With ``use_dora`` each row of the sum is rescaled to a trained norm: ``m * (W + scaling * B @ A) / n``, where ``n``
    is the row's own norm and gets no gradient.

    Shapes: ``A`` is ``(rank, in)`` and ``B`` is ``(out, rank)``, with ``(out, in)`` from ``matrix_shape``, or fewer
    rows where only some are adapted; ``magnitude`` and ``bias`` are ``(out,)``.

    Source:
        Hu et al. 2021, arXiv:2106.09685, eq. 3; Liu et al. 2024, "DoRA", arXiv:2402.09353, eq. 5 and section 4.3.
    """

    trailing_dimensions: int = 0  # of the output, after the one that holds the features
    is_plain: bool  # nothing but the factors
    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter
    bias: nn.Parameter

    @override
    def build(self, module: nn.Module, parameter: str) -> None:
        spec, weight = self.spec, base_parameter(module, parameter)
        out_features, in_features = self.matrix_shape(module, parameter)
        A, B = self.start(len(self.index) if spec.rows else out_features, in_features)
        if spec.dtype != A.dtype or not weight.is_cpu:
            A, B = A.to(weight.device, spec.dtype), B.to(weight.device, spec.dtype)
        if is_sharded(weight):
            A, B = place_factors(A, B, self.as_matrix(weight))
        # Straight into the tables: nn.Module.__setattr__ asks what is known here, for a third of attaching's time.
        self._parameters["A"], self._parameters["B"] = nn.Parameter(A), nn.Parameter(B)
        vars(self)["is_plain"] = not (spec.use_dora or spec.lora_bias or spec.rows)
        if spec.use_dora:
            with gathered([weight]):
                self._parameters["magnitude"] = nn.Parameter(self.starts(weight)["magnitude"])
        if spec.lora_bias:
            bias = B.new_zeros(B.shape[0])
            self._parameters["bias"] = nn.Parameter(bias.to(self.kept_dtype(bias)))

    @override
    @torch.no_grad()
    def starts(self, weight: Tensor) -> dict[str, Tensor]:
        if not self.spec.use_dora:
            return {}
        norms = _roots(self._squares(self._rows(self.as_matrix(weight))))
        return {"magnitude": norms.to(self.kept_dtype(norms))}

    @abstractmethod
    def update(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return what ``scaling * B @ A`` adds to the layer's ``output`` for ``inputs``."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as the layer stores it, read as ``(out, in)``."""
        return weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Return an ``(out, in)`` matrix in the layout in which the layer stores its weight."""
        return matrix

    @override
    def forward(self, inputs: Tensor, output: Tensor, layer: nn.Module, is_ours: bool = False) -> Tensor:
        if not self.spec.rows:
            return self.with_extras(self.added(inputs, output, is_ours), layer)
        part = self.with_extras(self.added(inputs, output.index_select(-1, self.index), not is_traced()), layer)
        if is_ours and not output._is_view():
            return output.index_copy_(-1, self.index, part)
        return output.index_copy(-1, self.index, part)

    def added(self, inputs: Tensor, output: Tensor, is_ours: bool) -> Tensor:
        """Return the layer's ``output`` with the update, made in its memory if that ``is_ours``."""
        return add(output, self.update(inputs, output), is_ours)

    def with_extras(self, total: Tensor, layer: nn.Module) -> Tensor:
        """Return what DoRA and a bias on ``B`` make of a sum of output and update, which nobody else holds."""
        if self.spec.use_dora:
            total = self._rescaled(total, layer)
        if self.spec.lora_bias:
            total = add(total, self._along_features(self.spec.scaling * self.bias), not is_traced())
        return total

    def _rescaled(self, total: Tensor, layer: nn.Module) -> Tensor:
        """Return the sum with every feature rescaled by ``m / n``; the layer's bias is not."""
        matrix = self._rows(self.as_matrix(base_parameter(layer, self.parameter)))
        ratio = self._along_features(self.magnitude / self.row_norms(matrix))
        bias = layer._parameters.get("bias")
        # One tensor of the output's size is kept for backward: the product of input and summed weight.
        if bias is None:
            return (total * ratio).to(total.dtype)
        own = self._along_features(self._rows(bias)).to(total.dtype)
        # As a change of the sum, not rounded: a magnitude at its start leaves the output as it was, bit for bit.
        if is_traced():
            return (total + (ratio - 1.0) * (total - own)).to(total.dtype)
        arguments = total.detach(), total - own.detach(), ratio, own
        return cast(Tensor, _Rescaled.apply(*arguments))  # type: ignore[no-untyped-call]

    def _along_features(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * self.trailing_dimensions)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(0, self.index) if self.spec.rows else tensor

    @torch.no_grad()
    def row_norms(self, matrix: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the norms of the rows of ``matrix + scaling * B @ A`` without forming that sum; no gradient.

        Args:
            matrix: The weight's rows that are adapted; with an ``index``, all of its rows.
            index: Which rows are adapted.
        """
        with without_autocast(matrix.device.type):
            total = torch.cat([*self._squared_norms(matrix, index)])
        return _roots(total)

    def _squares(self, matrix: Tensor) -> Tensor:
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return cast(Tensor, torch.linalg.vector_norm(matrix, dim=1, dtype=dtype)).square()

    def _squared_norms(self, matrix: Tensor, index: Tensor | None) -> Iterator[Tensor]:
        """Yield what ``row_norms`` is the root of, for some rows at a time."""
        A, B = self._factors_in_float()
        gram = A @ A.T
        step = B.shape[0] if is_traced() or is_sharded(matrix) else at_once(matrix) // max(1, matrix.shape[1])
        for start in range(0, B.shape[0], max(1, step)):
            here = slice(start, start + step)
            rows = matrix[here] if index is None else matrix.index_select(0, index[here])
            # In float32: where the update cancels most of a row, bfloat16 would leave nothing but rounding.
            crossed = ((rows.to(A.dtype) @ A.T) * B[here]).sum(1)
            update = ((B[here] @ gram) * B[here]).sum(1)
            yield self._squares(rows) + 2 * self.spec.scaling * crossed + self.spec.scaling**2 * update

    @override
    def combined(self, weight: Tensor) -> Tensor:
        matrix = self.as_matrix(weight)
        dtype = torch.promote_types(torch.promote_types(self.A.dtype, torch.float32), matrix.dtype)
        matrix = matrix.to(dtype)
        part, (A, B) = self._rows(matrix), self._factors_in_float()
        add = torch.addmm if part.ndim == 2 else torch.baddbmm
        total = add(part, B.to(dtype), A.to(dtype), alpha=self.spec.scaling)
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
        """Make of a block of the weight what ``combined`` makes of it, in place."""
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
        delta = self.matrix_delta()
        if self.spec.rows:
            delta = torch.zeros_like(self.as_matrix(weight), dtype=delta.dtype).index_copy(0, self.index, delta)
        return self.as_stored(delta)

    def matrix_delta(self) -> Tensor:
        """Return ``scaling * B @ A``, ``(out, in)``, summed in float32 or better."""
        A, B = self._factors_in_float()
        return self.spec.scaling * (B @ A)

    @override
    def bias_delta(self) -> Tensor | None:
        return self.spec.scaling * whole(self.bias) if self.spec.lora_bias else None

    def _factors_in_float(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return whole(self.A).to(dtype), whole(self.B).to(dtype)

    def zero_factor(self) -> nn.Parameter:
        """Return the factor that starts at zero, so that the model starts unchanged."""
        return self.B

    @override
    def has_effect(self, weight: Tensor) -> bool:
        return bool(torch.any(self.zero_factor() != 0))

    def start(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``B`` as they start, on the CPU: the same for the same spec, on any device and rank."""
        A = INITIALIZERS[self.spec.init](self.spec.rank, in_features, seeded(self.spec.seed))
        return A, zeros(out_features, self.spec.rank)

    @override
    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.spec.use_dora:
            raise RuntimeError("use_dora starts from the norms of the weights: attach when the weights are there.")
        A, B = self.start(self.B.shape[-2], self.A.shape[-1])
        copy_whole(self.A, A)
        copy_whole(self.B, B)
        if self.spec.lora_bias:
            self.bias.zero_()
        if self.spec.rows:
            self.index.copy_(row_numbers(self.spec.rows))

    def dropout_now(self) -> float:
        """Return the probability of dropping an element in the present mode."""
        # Asking for the mode only where it matters spares torch.compile a graph for each.
        return self.spec.dropout if self.spec.dropout and self.training else 0.0

    def dropped(self, inputs: Tensor) -> Tensor:
        """Return the adapter's input after dropout; the frozen layer's own input is never touched."""
        return F.dropout(inputs, self.spec.dropout, self.training) if self.spec.dropout else inputs

    def factors_as(self, dtype: torch.dtype, device_type: str) -> tuple[Tensor, Tensor]:
        """Return the factors in the layer's compute dtype; under autocast the operators cast by themselves."""
        if self.A.dtype == dtype or torch.is_autocast_enabled(device_type):
            return self.A, self.B
        return self.A.to(dtype), self.B.to(dtype)


def _roots(squares: Tensor) -> Tensor:
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()  # a row of zeros has no direction to rescale


class _Rescaled(torch.autograd.Function):
    """``ratio * product + bias`` as ``total + (ratio - 1) * product``, where the product is the total less the bias.

    Gradients go to the product, through which they reach the total and with it the bias: ``ratio`` times the output's,
    since that of a sum of 1 and ``ratio - 1`` would be rounded twice. The bias, which may train, lacks the rest.
    """

    @staticmethod
    @override
    def forward(ctx: Any, total: Tensor, product: Tensor, ratio: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(product, ratio)
        ctx.bias_shape, ctx.bias_dtype = bias.shape, bias.dtype
        return (total + (ratio - 1.0) * product).to(total.dtype)

    @staticmethod
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        product, ratio = ctx.saved_tensors
        scaled, dbias = dy * ratio, None
        if ctx.needs_input_grad[3]:
            dbias = (dy - scaled).sum_to_size(ctx.bias_shape).to(ctx.bias_dtype)
        return None, scaled.to(product.dtype), (dy * product).to(ratio.dtype).sum_to_size(ratio.shape), dbias
