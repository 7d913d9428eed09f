"""Sums over calibration data: against dense float64 references, and added up over processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_lora.calibration import statistics as module
from lightning_lora.calibration.spectrum import Spectrum, eigenpairs
from lightning_lora.calibration.statistics import MatrixStatistics, Moments, bytes_needed, must_sketch

ALL = ("inputs", "gradients", "cross", "permuted")
SEQUENCES, TOKENS, WIDTH, OUT = 6, 5, 8, 3


def correlated(generator: torch.Generator, shape: tuple[int, int, int] = (SEQUENCES, TOKENS, WIDTH)) -> Tensor:
    """Return tokens that resemble others of their sequence, with a mean and unequal variances."""
    own, common = torch.randn(shape, generator=generator), torch.randn(shape[0], 1, shape[2], generator=generator)
    return (own + common) * torch.linspace(2, 0.5, shape[2]) + 0.3


def moments(*batches: Tensor, masks: list[Tensor] | None = None, **options) -> Moments:
    made = Moments(batches[0].shape[-1], **options)
    for index, rows in enumerate(batches):
        made.add(rows, masks[index] if masks else None)
    return made


def assert_same_sums(found: Moments | MatrixStatistics, expected: Moments | MatrixStatistics) -> None:
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


# --- one side


def test_moments_equal_the_dense_ones(rng):
    rows = correlated(rng)
    found, dense = moments(*rows.split(2)), rows.double().flatten(0, 1)
    assert (found.tokens, found.sequences) == (SEQUENCES * TOKENS, SEQUENCES)
    assert torch.allclose(found.mean(), dense.mean(0))
    assert torch.allclose(found.second_moment(), dense.T @ dense / len(dense))
    assert torch.allclose(found.second_moment(centre=True), dense.T.cov(correction=0))
    assert found.trace() == pytest.approx(float(dense.square().sum()) / len(dense))
    assert found.trace(centre=True) == pytest.approx(float(dense.var(0, correction=0).sum()))


def test_eigenpairs_are_found_where_float32_does_not_converge(rng, monkeypatch):
    rows, decompose = torch.randn(20, WIDTH, generator=rng), torch.linalg.eigh

    def of_float64_only(matrix: Tensor) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("The algorithm failed to converge.")
        return decompose(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", of_float64_only)
    matrix = rows.T @ rows
    values, vectors = eigenpairs(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.equal(values, values.sort(descending=True).values)
    assert torch.allclose(vectors * values @ vectors.T, matrix, atol=1e-4)
    assert torch.allclose(vectors.T @ vectors, torch.eye(WIDTH), atol=1e-5)


@pytest.mark.parametrize("centre", [False, True])
def test_spectrum_is_that_of_the_second_moment(centre: bool, rng):
    found = moments(correlated(rng))
    values, vectors, rest = found.spectrum(centre=centre)
    assert torch.allclose(vectors * values @ vectors.T, found.second_moment(centre=centre))
    assert (values.diff() <= 0).all()
    assert rest == 0


@pytest.mark.parametrize("tokens", [3, WIDTH, 20])
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_sum_of_squared_norms_is_that_of_each_sequence(tokens: int, at_once: int, monkeypatch, rng):
    monkeypatch.setattr(module, "_ENTRIES_AT_ONCE", at_once)
    rows = correlated(rng, (4, tokens, WIDTH))
    truth = sum(float((X.T @ X).square().sum()) for X in rows.double())
    assert float(moments(rows)._counts[3]) == pytest.approx(truth)


@pytest.mark.parametrize("sizes", [[3, 3], [1, 2, 3]])
@pytest.mark.parametrize("options", [{}, {"sketch": 4}, {"halves": True}])
def test_sums_of_several_processes_are_those_of_one(sizes: list[int], options: dict, rng):
    rows = correlated(rng)
    total, *others = [moments(part, **options) for part in rows.split(sizes)]
    for other in others:
        for mine, its in zip(total.tensors(), other.tensors(), strict=True):
            mine += its
    whole = moments(rows, **options)
    if "halves" in options:  # each process counts its own sequences
        whole._odd, total._odd = None, None
    assert_same_sums(total, whole)
    assert total.shrinkage() == pytest.approx(whole.shrinkage(), abs=1e-6)
    assert torch.allclose(total.spectrum().values, whole.spectrum().values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"sketch": 4}, {"halves": True}])
@pytest.mark.parametrize("junk", [1e9, torch.nan, torch.inf])
def test_masked_tokens_are_as_if_absent(options: dict, junk: float, rng):
    rows, mask = correlated(rng), torch.rand(SEQUENCES, TOKENS, generator=rng) < 0.6
    mask[2] = False
    dirty = torch.where(mask.unsqueeze(-1), rows, junk)
    found = moments(dirty, masks=[mask], **options)
    assert_same_sums(found, moments(rows, masks=[mask], **options))
    assert found.tokens == mask.sum()
    assert found.sequences == SEQUENCES - 1
    dense = rows[mask].double()
    assert torch.allclose(found.mean(), dense.mean(0))
    assert found.trace() == pytest.approx(float(dense.square().sum()) / len(dense))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_sums_are_wide_whatever_the_precision_of_the_data(dtype: torch.dtype, rng):
    rows = correlated(rng).to(dtype)
    assert_same_sums(moments(rows), moments(rows.double()))


@pytest.mark.parametrize("width", [1024, 1025])
def test_narrow_sums_are_float64(width: int):
    assert {tensor.dtype for tensor in Moments(width, device="meta").tensors()[1:]} == {
        torch.float64 if width == 1024 else torch.float32
    }


def test_autocast_does_not_round_the_sums(rng):
    rows, g = correlated(rng), correlated(rng, (SEQUENCES, TOKENS, OUT))
    plain, under = (MatrixStatistics(OUT, WIDTH, ALL) for _ in range(2))
    plain.add(rows, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under.add(rows, g)
    assert_same_sums(under, plain)


def test_wide_sums_under_autocast_are_not_rounded(monkeypatch, rng):
    monkeypatch.setattr(module, "EXACT_UP_TO", 0)  # autocast leaves float64 alone
    test_autocast_does_not_round_the_sums(rng)


def test_adding_keeps_no_graph(rng):
    rows = correlated(rng).requires_grad_()
    assert not any(tensor.requires_grad for tensor in moments(rows * 2, halves=True).tensors())


# --- shrinkage


@pytest.mark.parametrize("samples", [5, 40])
def test_shrinkage_of_single_tokens_is_that_of_ledoit_and_wolf(samples: int, rng):
    covariance = pytest.importorskip("sklearn.covariance")
    rows = correlated(rng, (samples, 1, WIDTH))
    _, expected = covariance.ledoit_wolf(rows[:, 0].double().numpy(), assume_centered=True)
    assert 0 < expected < 1
    assert moments(rows).shrinkage() == pytest.approx(expected, rel=1e-9)


def test_shrinkage_of_sequences_equals_the_formula(rng):
    rows, mask = correlated(rng), torch.ones(SEQUENCES, TOKENS, dtype=torch.bool)
    mask[0, 2:] = False
    grams = [X[keep].T @ X[keep] for X, keep in zip(rows.double(), mask, strict=True)]
    lengths = mask.sum(1).double()
    S = sum(grams) / lengths.sum()
    target = S.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    # The variance of S, for sequences that vary independently around length * S.
    variation = sum(gram.square().sum() for gram in grams) - lengths.square().sum() * S.square().sum()
    expected = float(variation / lengths.sum() ** 2 / (S - target).square().sum())
    assert 0 < expected < 1
    assert moments(rows, masks=[mask]).shrinkage() == pytest.approx(expected)


def test_repeating_the_tokens_of_each_sequence_changes_no_shrinkage(rng):
    rows = correlated(rng)
    assert moments(rows.repeat(1, 7, 1)).shrinkage() == pytest.approx(moments(rows).shrinkage())


def test_shrinkage_improves_the_estimate_from_few_sequences(rng):
    scales = torch.linspace(1.5, 0.5, WIDTH)
    common = torch.randn(8, 1, WIDTH, generator=rng) * scales
    found = moments(common + 0.1 * torch.randn(8, 50, WIDTH, generator=rng))
    truth, raw = torch.diag(scales.double() ** 2 + 0.01), found.second_moment()
    rho, level = found.shrinkage(), found.trace() / WIDTH
    shrunk = (1 - rho) * raw + rho * level * torch.eye(WIDTH)
    assert (shrunk - truth).norm() < 0.8 * (raw - truth).norm()


def test_sketch_estimates_the_shrinkage(rng):
    rows = correlated(rng, (20, TOKENS, 40)) * 0.9 ** torch.arange(40)
    exact, sketched = moments(rows).shrinkage(), moments(rows, sketch=30).shrinkage()
    assert 0 < exact < 1
    assert sketched == pytest.approx(exact, rel=0.05)


def test_one_sequence_has_no_shrinkage(rng):
    with pytest.raises(ValueError, match="at least two"):
        moments(correlated(rng)[:1]).shrinkage()


def test_data_without_variation_are_not_shrunk():
    assert moments(torch.ones(4, 2, 3)).shrinkage() == 0
    assert moments(torch.randn(4, 2, 1)).shrinkage() in (0, 1)  # one feature: both mean the same


# --- sketch


@pytest.mark.parametrize("centre", [False, True])
def test_sketch_recovers_the_leading_directions(centre: bool, rng):
    rows = correlated(rng, (30, 10, 100)) * 0.8 ** torch.arange(100)
    exact, found = moments(rows).spectrum(centre=centre), moments(rows, sketch=24).spectrum(centre=centre)
    cosines = torch.linalg.svdvals(exact.vectors[:, :5].T @ found.vectors[:, :5])
    assert cosines.min() > 1 - 1e-6
    assert torch.allclose(found.values[:5], exact.values[:5], rtol=1e-3)


def test_sketch_keeps_the_trace(rng):
    found = moments(correlated(rng, (30, 10, 40)), sketch=10)
    spectrum = found.spectrum()
    assert float(spectrum.values.sum()) + spectrum.others * spectrum.rest == pytest.approx(found.trace())


def test_sketch_of_few_data_has_their_rank():
    rows = torch.zeros(2, 3, 40)
    assert moments(rows, sketch=10).spectrum().rank == 0
    rows[:, 0, 3], rows[:, 1, 5] = 2, 1
    assert moments(rows, sketch=10).spectrum().rank == 2
    assert moments(rows).spectrum().rank == 2


def test_sketch_as_wide_as_the_matrix_is_none(rng):
    rows = correlated(rng)
    assert_same_sums(moments(rows, sketch=WIDTH), moments(rows))


def test_second_moment_of_a_sketch_is_refused(rng):
    with pytest.raises(ValueError, match="sketch"):
        moments(correlated(rng), sketch=3).second_moment()


# --- spectrum


def dense(spectrum: Spectrum) -> Tensor:
    values, V, rest = spectrum
    return V * values @ V.T + rest * (torch.eye(len(V), dtype=V.dtype) - V @ V.T)


@pytest.fixture
def spectrum(rng) -> Spectrum:
    V = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64, generator=rng))[0]
    return Spectrum(torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64), V, 0.25)


@pytest.mark.parametrize("exponent", [-1, -0.5, 0.5, 1])
def test_power_is_that_of_the_matrix(exponent: float, spectrum, rng):
    columns = torch.randn(7, 4, dtype=torch.float64, generator=rng)
    values, vectors = torch.linalg.eigh(dense(spectrum))
    assert torch.allclose(spectrum.power(exponent, columns), vectors * values**exponent @ vectors.T @ columns)


@pytest.mark.parametrize("exponent", [-0.5, 0.5])
def test_power_leaves_null_directions_out(exponent: float, spectrum):
    singular = spectrum._replace(values=torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64), rest=0.0)
    expected = spectrum.vectors[:, :2] * singular.values[:2] ** exponent @ spectrum.vectors[:, :2].T
    assert torch.allclose(singular.power(exponent, torch.eye(7, dtype=torch.float64)), expected)
    assert singular.rank == 2


def test_along_is_the_quadratic_form(spectrum, rng):
    rows = torch.randn(4, 7, dtype=torch.float64, generator=rng)
    assert torch.allclose(spectrum.along(rows), (rows @ dense(spectrum) @ rows.T).diagonal())


def test_shrunk_is_a_mixture_with_the_identity(spectrum):
    expected = 0.7 * dense(spectrum) + 0.3 * 5 * torch.eye(7, dtype=torch.float64)
    assert torch.allclose(dense(spectrum.shrunk(0.3, 5.0)), expected)


# --- halves


def test_halves_are_every_other_sequence(rng):
    rows, mask = correlated(rng), torch.rand(SEQUENCES, TOKENS, generator=rng) < 0.7
    parts = list(zip(rows.split([1, 3, 2]), mask.split([1, 3, 2]), strict=True))
    found = moments(*[part for part, _ in parts], masks=[keep for _, keep in parts], halves=True)
    even, odd = found.halves()
    assert_same_sums(even, moments(rows[::2], masks=[mask[::2]]))
    assert_same_sums(odd, moments(rows[1::2], masks=[mask[1::2]]))


def test_halves_need_two_sequences(rng):
    with pytest.raises(ValueError, match="two sequences"):
        moments(correlated(rng)[:1], halves=True).halves()
    with pytest.raises(ValueError, match="not kept"):
        moments(correlated(rng)).halves()


# --- data that say nothing


@pytest.mark.parametrize(
    "read", [Moments.mean, Moments.trace, Moments.second_moment, Moments.spectrum, Moments.shrinkage]
)
def test_statistics_without_tokens_are_refused(read: Callable[[Moments], object], rng):
    rows = correlated(rng)
    for empty in (Moments(WIDTH), moments(rows, masks=[torch.zeros(SEQUENCES, TOKENS, dtype=torch.bool)])):
        with pytest.raises(ValueError, match="No token was counted"):
            read(empty)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(junk: float, rng):
    rows = correlated(rng)
    rows[1, 2, 3] = junk
    with pytest.raises(ValueError, match="not finite"):
        moments(rows).spectrum()


@pytest.mark.parametrize(
    ("shape", "mask", "match"),
    [
        ((4, WIDTH), None, r"must be \(sequences, tokens, 8\), got \(4, 8\)"),
        ((2, 4, WIDTH + 1), None, r"got \(2, 4, 9\)"),
        ((2, 4, WIDTH), torch.ones(4, 2, dtype=torch.bool), r"mask must be \(2, 4\) and boolean"),
        ((2, 4, WIDTH), torch.ones(2, 4), "torch.float32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], mask: Tensor | None, match: str):
    with pytest.raises(ValueError, match=match):
        Moments(WIDTH).add(torch.ones(shape), mask)


# --- both sides


def test_cross_is_the_gradient_of_the_weight(rng):
    x, g = correlated(rng), correlated(rng, (SEQUENCES, TOKENS, OUT))
    found = MatrixStatistics(OUT, WIDTH, {"cross"})
    for part in range(0, SEQUENCES, 2):
        found.add(x[part : part + 2], g[part : part + 2])
    weight = torch.zeros(OUT, WIDTH, dtype=torch.float64, requires_grad=True)
    ((x.double() @ weight.T) * g).sum().backward()
    assert torch.allclose(found.cross, weight.grad)
    assert found.tokens == SEQUENCES * TOKENS
    assert (found.inputs, found.gradients, found.permuted) == (None, None, None)


def test_statistics_keep_what_is_needed(rng):
    x, g = correlated(rng), correlated(rng, (SEQUENCES, TOKENS, OUT))
    found = MatrixStatistics(OUT, WIDTH, {"inputs", "gradients"})
    found.add(x, g)
    assert_same_sums(found.inputs, moments(x))
    assert_same_sums(found.gradients, moments(g))
    assert (found.cross, found.permuted) == (None, None)


def test_inputs_alone_need_no_gradients(rng):
    x = correlated(rng)
    found = MatrixStatistics(OUT, WIDTH, {"inputs"})
    found.add(x)
    assert_same_sums(found.inputs, moments(x))


def test_permuted_pairs_each_sequence_with_another(rng):
    x, g = correlated(rng).double(), correlated(rng, (SEQUENCES, TOKENS, OUT)).double()
    found = MatrixStatistics(OUT, WIDTH, {"permuted"})
    found.add(x, g)
    expected = sum(g[i].T @ x[i - 1] for i in range(SEQUENCES))
    assert torch.allclose(found.permuted, expected)
    assert found.pairs == SEQUENCES * TOKENS


def test_batches_of_one_are_paired_with_the_one_before(rng):
    lengths = [5, 3, 4]
    x, g = ([correlated(rng, (1, length, width)).double() for length in lengths] for width in (WIDTH, OUT))
    found = MatrixStatistics(OUT, WIDTH, {"permuted"})
    for one, other in zip(x, g, strict=True):
        found.add(one, other)
    expected = g[1][0].T @ x[0][0, :3] + g[2][0, :3].T @ x[1][0]
    assert torch.allclose(found.permuted, expected)
    assert found.pairs == 6


def test_batch_that_waits_for_the_next_may_change_meanwhile(rng):
    x, g = (torch.randn(2, 1, TOKENS, width, generator=rng) for width in (WIDTH, OUT))
    expected = g[1, 0].T @ x[0, 0]
    found = MatrixStatistics(OUT, WIDTH, {"permuted"})
    found.add(x[0], g[0])
    x[0].relu_()  # as a layer that works in place
    found.add(x[1], g[1])
    assert torch.allclose(found.permuted.float(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [SEQUENCES, 1])
def test_masked_tokens_are_absent_from_products(size: int, rng):
    x, g = correlated(rng), correlated(rng, (SEQUENCES, TOKENS, OUT))
    mask = torch.rand(SEQUENCES, TOKENS, generator=rng) < 0.6
    found, expected = (MatrixStatistics(OUT, WIDTH, ALL) for _ in range(2))
    for part in range(0, SEQUENCES, size):
        rows = slice(part, part + size)
        keep = mask[rows].unsqueeze(-1)
        found.add(torch.where(keep, x[rows], torch.nan), torch.where(keep, g[rows], torch.nan), mask[rows])
        expected.add(x[rows] * keep, g[rows] * keep)
    for name in ("cross", "permuted"):
        assert torch.allclose(getattr(found, name), getattr(expected, name))
    assert found.tokens == mask.sum()
    paired = mask & mask.roll(1, 0)
    assert found.pairs == (paired if size > 1 else paired[1:]).sum()


def test_all_sums_of_two_processes_are_those_of_one(rng):
    x, g = correlated(rng), correlated(rng, (SEQUENCES, TOKENS, OUT))
    parts = [MatrixStatistics(OUT, WIDTH, ALL[:3]) for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 2), slice(2, None), slice(None)), strict=True):
        part.add(x[rows], g[rows])
    for mine, its in zip(parts[0].tensors(), parts[1].tensors(), strict=True):
        mine += its
    assert_same_sums(parts[0], parts[2])


@pytest.mark.parametrize(
    ("options", "match"),
    [({"axes": (3,)}, r"axes=\(3,\) do not divide the 8"), ({"axes": (4,), "sketch": 4}, "sketch=4")],
)
def test_axes_that_cannot_be_used_are_refused(options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        MatrixStatistics(OUT, WIDTH, {"inputs"}, **options)


# --- memory


@pytest.mark.parametrize("options", [{}, {"sketch": 4}, {"axes": (4,)}])
@pytest.mark.parametrize("needs", [{"inputs"}, {"cross"}, set(ALL)])
def test_bytes_are_those_of_the_tensors(options: dict, needs: set, rng):
    found = MatrixStatistics(OUT, WIDTH, needs, **options)
    found.add(correlated(rng), correlated(rng, (SEQUENCES, TOKENS, OUT)))
    moments = [part for part in (found.inputs, found.gradients) if part is not None]
    omegas = sum(part._omega.nbytes for part in moments if part.sketch)
    assert found.nbytes == sum(tensor.nbytes for tensor in found.tensors()) + omegas
    if "axes" not in options:
        assert bytes_needed(OUT, WIDTH, needs, **options) == found.nbytes


def test_second_moment_dominates_the_bytes_of_a_wide_input():
    assert bytes_needed(8, 4096, {"inputs"}) == pytest.approx(4096**2 * 4, rel=0.01)
    assert bytes_needed(8, 4096, {"inputs"}, sketch=64) == pytest.approx(2 * 4096 * 64 * 4, rel=0.05)


SHAPES = {"wide": (256, 2048), "b": (512, 512), "a": (512, 512), "narrow": (8, 8)}


def test_the_widest_layers_are_sketched_until_the_rest_fits():
    full = sum(bytes_needed(*shape, {"inputs"}) for shape in SHAPES.values())
    order = ["wide", "a", "b"]
    spent = full
    assert must_sketch(SHAPES, {"inputs"}, columns=16, budget=full) == frozenset()
    for count, name in enumerate(order, start=1):
        chosen = frozenset(order[:count])
        assert must_sketch(SHAPES, {"inputs"}, columns=16, budget=spent - 1) == chosen
        spent += bytes_needed(*SHAPES[name], {"inputs"}, sketch=16) - bytes_needed(*SHAPES[name], {"inputs"})
        assert must_sketch(SHAPES, {"inputs"}, columns=16, budget=spent) == chosen
    with pytest.raises(ValueError, match=f"4 layers need at least {spent:,} bytes.*budget is {spent - 1:,}"):
        must_sketch(SHAPES, {"inputs"}, columns=16, budget=spent - 1)


def test_what_would_take_minutes_to_decompose_is_sketched_whatever_the_budget():
    shapes = {"usual": (4096, 8192), "wide inputs": (16, 8193), "wide outputs": (8193, 16)}
    assert must_sketch(shapes, {"inputs", "gradients"}, columns=16, budget=10**12) == {"wide inputs", "wide outputs"}
