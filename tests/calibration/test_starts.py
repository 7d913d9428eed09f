"""Starts from data: against dense float64 references, PEFT and scikit-learn, and what each start promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.calibration import starts as module
from lightning_lora.calibration.starts import NEEDS, Start, corda, covariance, eva, lora_ga
from lightning_lora.calibration.statistics import MatrixStatistics
from lightning_lora.layers.starts import pissa

IN, OUT, RANK = 20, 12, 3
QUIET = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::DeprecationWarning", "ignore::FutureWarning")


def tokens(generator: torch.Generator, sequences: int = 40, length: int = 5, width: int = IN) -> Tensor:
    """Return tokens with a mean, unequal variances in directions of no axis, and a part common to each sequence."""
    own, common = (torch.randn(sequences, size, width, generator=generator) for size in (length, 1))
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return ((own + common) * 0.8 ** torch.arange(width)) @ mixing + 0.1


def gathered(x: Tensor, g: Tensor | None = None, out: int = OUT, **options) -> MatrixStatistics:
    found = MatrixStatistics(out, x.shape[-1], NEEDS["covariance" if g is not None else "eva"], **options)
    found.add(x, g)
    return found


@pytest.fixture
def x(rng) -> Tensor:
    return tokens(rng)


@pytest.fixture
def g(rng) -> Tensor:
    return tokens(rng, width=OUT)


def smallest_cosine(A: Tensor, other: Tensor) -> float:
    """Return the cosine of the largest angle between the spans of the rows."""
    one, two = (torch.linalg.qr(rows.double().T)[0] for rows in (A, other))
    return float(torch.linalg.svdvals(one.T @ two).min())


def assert_same_span(A: Tensor, other: Tensor, angle: float = 1e-3) -> None:
    assert smallest_cosine(A, other) > math.cos(angle)


# --- every start


STARTS: dict[str, Callable[[MatrixStatistics, int], Start]] = {
    "eva": eva,
    "corda": lambda statistics, rank: corda(statistics, weight(), rank, 2.0),
    "corda kpm": lambda statistics, rank: corda(statistics, weight(), rank, 2.0, mode="kpm"),
    "lora_ga": lora_ga,
    "covariance": covariance,
    "covariance of inputs alone": lambda statistics, rank: covariance(statistics, rank, metric_out="none"),
}
every_start = pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)


def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))


@every_start
def test_start_has_the_shapes_of_factors(start, x, g):
    A, B, values, _ = start(gathered(x, g), RANK)
    assert A.shape == (RANK, IN)
    assert B is None or B.shape == (OUT, RANK)
    for factor in (A, B):
        assert factor is None or (factor.dtype == torch.float32 and factor.is_contiguous() and factor.isfinite().all())
    assert len(values) >= RANK
    assert (values.diff() <= 0).all()


@every_start
def test_start_is_repeatable_and_draws_nothing(start, x, g):
    state = torch.get_rng_state()
    first, again = (start(gathered(x, g), RANK) for _ in range(2))
    assert torch.equal(first.A, again.A)
    assert first.B is None or torch.equal(first.B, again.B)
    assert torch.equal(torch.get_rng_state(), state)


@every_start
def test_masked_tokens_have_no_influence(start, x, g, rng):
    mask = torch.rand(x.shape[:2], generator=rng) < 0.7
    found = []
    for junk in (0.0, torch.nan):
        statistics = MatrixStatistics(OUT, IN, NEEDS["covariance"])
        statistics.add(*(torch.where(mask.unsqueeze(-1), rows, junk) for rows in (x, g)), mask)
        found.append(start(statistics, RANK).A)
    assert torch.equal(*found)


@every_start
def test_start_of_summed_statistics_is_that_of_all_data(start, x, g):
    parts = [gathered(*rows) for rows in zip(x.split([10, 7, 23]), g.split([10, 7, 23]), strict=True)]
    for part in parts[1:]:
        for mine, its in zip(parts[0].tensors(), part.tensors(), strict=True):
            mine += its
    assert torch.allclose(start(parts[0], RANK).A, start(gathered(x, g), RANK).A, atol=1e-5)


@every_start
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_start_from_values_that_are_not_finite_is_refused(start, junk: float, x, g):
    x[1, 2, 3] = junk
    with pytest.raises(ValueError, match="not finite"):
        start(gathered(x, g), RANK)


@every_start
def test_start_without_tokens_is_refused(start, x, g):
    statistics = MatrixStatistics(OUT, IN, NEEDS["covariance"])
    for _ in range(2):
        with pytest.raises(ValueError, match="No token was counted"):
            start(statistics, RANK)
        statistics.add(x, g, torch.zeros(x.shape[:2], dtype=torch.bool))


@every_start
def test_start_says_which_statistics_it_needs(start):
    with pytest.raises(ValueError, match=r"needs '(inputs|cross)' among"):
        start(MatrixStatistics(OUT, IN, ()), RANK)


@pytest.mark.parametrize("start", [eva, covariance, STARTS["corda"]])
def test_rank_above_what_the_data_support_is_refused(start, x, g):
    plane = x - x.mean((0, 1))
    plane[..., 2:] = 0
    with pytest.raises(ValueError, match="rank=3 is above the 2 directions that the calibration data support"):
        start(gathered(plane, g), RANK)


def test_corda_to_preserve_takes_the_last_directions_that_the_weight_has(x):
    W = weight().double()
    W[5:] = 0
    found = update(corda(gathered(x), W, 5 - RANK, 2.0), 2.0) + update(
        corda(gathered(x), W, RANK, 2.0, mode="kpm"), 2.0
    )
    assert torch.allclose(found, W, atol=1e-5)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_refuses_a_rank_above_that_of_the_weight(mode, x):
    thin = weight()
    thin[2:] = 0
    with pytest.raises(ValueError, match="above the 2 directions"):
        corda(gathered(x), thin, RANK, 1.0, mode=mode)


def test_lora_ga_refuses_more_directions_than_the_gradient_has(x, g):
    with pytest.raises(ValueError, match="rank=7 needs 14 directions of the gradient, which has 12"):
        lora_ga(gathered(x, g), 7)


# --- eva


def test_eva_is_the_principal_components_of_scikit_learn(x):
    decomposition = pytest.importorskip("sklearn.decomposition")
    expected = decomposition.PCA(RANK).fit(x.flatten(0, 1).double().numpy())
    found = eva(gathered(x), RANK, normalize=False)
    for a, direction in zip(found.A, torch.from_numpy(expected.components_), strict=True):
        assert abs(float(a.double() @ direction)) > math.cos(1e-3)
    assert found.values[:RANK].tolist() == pytest.approx(expected.explained_variance_ratio_.tolist())
    assert (found.B, found.suggested_rank) == (None, None)


def test_eva_rows_are_orthonormal_with_their_largest_entry_positive(x):
    A = eva(gathered(x), RANK, normalize=False).A
    assert torch.allclose(A @ A.T, torch.eye(RANK), atol=1e-6)
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    "start", [eva, partial(covariance, shrinkage=0.0), partial(covariance, shrinkage=0.0, centre=True)]
)
def test_features_have_the_level_of_the_usual_start(start, x, g):
    features = (x + 0.5).flatten(0, 1) @ start(gathered(x + 0.5, g), RANK).A.T
    expected = float((x + 0.5).square().mean()) / 3
    assert features.square().mean(0).tolist() == pytest.approx([expected] * RANK, rel=1e-4)


def test_directions_that_are_only_rounding_do_not_count(rng):
    x = (torch.randn(20, 5, 2, generator=rng) @ torch.randn(2, IN, generator=rng)).float()
    with pytest.raises(ValueError, match="rank=3 is above the 2 directions"):
        eva(gathered(x), RANK)
    with pytest.raises(ValueError, match="rank=3 is above the 2 directions"):
        covariance(gathered(x, tokens(rng, 20, width=OUT)), RANK, metric_out="none", shrinkage=0.0)


def test_eva_of_a_sketch_is_eva(x):
    exact, sketched = (eva(gathered(x, sketch=columns), RANK) for columns in (None, 14))
    assert_same_span(sketched.A, exact.A, angle=0.1)
    assert torch.allclose(sketched.values[:RANK], exact.values[:RANK], rtol=0.03)
    assert sketched.A.norm(dim=1).tolist() == pytest.approx(exact.A.norm(dim=1).tolist(), rel=0.02)


def test_wide_layers_lead_to_the_same_start(x, g, monkeypatch):
    expected = [start(gathered(x, g), RANK) for start in STARTS.values()]
    monkeypatch.setattr("lightning_lora.calibration.statistics.EXACT_UP_TO", 0)
    monkeypatch.setattr(module, "EXACT_UP_TO", 0)
    for start, found in zip(STARTS.values(), expected, strict=True):
        wide = gathered(x, g)
        assert wide.inputs.mean().dtype == torch.float32
        assert_same_span(start(wide, RANK).A, found.A, angle=0.02)


# --- corda


def update(start: Start, scaling: float) -> Tensor:
    return scaling * start.B.double() @ start.A.double()


@QUIET
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_corda_equals_peft(mode, shape: tuple[int, int], rng):
    peft, theirs = pytest.importorskip("peft"), pytest.importorskip("peft.tuners.lora.corda")
    x = tokens(rng, width=shape[1])
    layer = nn.Linear(shape[1], shape[0], bias=False)
    W = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    options = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["0"],
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
    )
    theirs.preprocess_corda(model, options, run_model=lambda: model(x.flatten(0, 1).unsqueeze(0)))
    adapted = peft.get_peft_model(model, options).base_model.model[0]
    expected = 2 * adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    found = corda(gathered(x, out=shape[0]), W, RANK, 2.0, mode=mode)
    assert torch.allclose(update(found, 2.0).float(), expected, atol=1e-5)


def test_corda_depends_on_no_unit_of_the_inputs(x):
    found, expected = (corda(gathered(factor * x), weight(), RANK, 2.0) for factor in (1000.0, 1.0))
    assert torch.allclose(found.A, expected.A, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_corda_of_white_inputs_is_pissa(power: float, rng):
    x = torch.linalg.qr(torch.randn(50, IN, generator=rng))[0].unsqueeze(1)
    A, B = pissa(weight(), RANK, 2.0)
    found = corda(gathered(x), weight(), RANK, 2.0, power=power, damping=0.0)
    assert torch.allclose(found.A.abs(), A.abs(), atol=1e-5)
    assert torch.allclose(found.B.abs(), B.abs(), atol=1e-5)


def test_corda_of_the_outputs_changes_them_least(x):
    W, rows = weight().double(), x.flatten(0, 1).double()
    outputs = rows @ W.T
    best = torch.linalg.eigvalsh(outputs.T @ outputs)[:-RANK].sum()

    def left(part: Tensor) -> float:
        return float((rows @ (W - part).T).square().sum())

    found = corda(gathered(x), W, RANK, 2.0, power=0.5, damping=0.0)
    A, B = pissa(W, RANK, 2.0)
    assert left(update(found, 2.0)) == pytest.approx(float(best), rel=1e-5)
    assert left(update(found, 2.0)) < left(update(corda(gathered(x), W, RANK, 2.0), 2.0))
    assert left(update(found, 2.0)) < left(2.0 * B @ A)


def test_corda_works_with_fewer_tokens_than_features(rng):
    x = tokens(rng, 3, 2)
    found = corda(gathered(x), weight(), RANK, 2.0)
    assert found.A.isfinite().all()
    kept = corda(gathered(x), weight(), RANK, 2.0, mode="kpm")
    rows = x.flatten(0, 1).double()
    assert (rows @ update(kept, 2.0).T).norm() < 0.1 * (rows @ update(found, 2.0).T).norm()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_of_a_complete_sketch_is_corda(mode, rng):
    x = tokens(rng, 3, 2)  # six directions
    exact, sketched = (corda(gathered(x, sketch=columns), weight(), RANK, 2.0, mode=mode) for columns in (None, 10))
    assert torch.allclose(update(sketched, 2.0), update(exact, 2.0), atol=1e-4)


# --- lora_ga


def test_lora_ga_is_the_published_formula(x, g):
    G = torch.einsum("sto,sti->oi", g.double(), x.double()) / (x.shape[0] * x.shape[1])
    U, values, Vh = torch.linalg.svd(G)
    found = lora_ga(gathered(x, g), RANK, gamma=9.0)
    scale = OUT**0.25 / 3
    assert torch.allclose(found.A.abs().double(), scale * Vh[:RANK].abs(), atol=1e-5)
    assert torch.allclose(found.B.abs().double(), scale * U[:, RANK : 2 * RANK].abs(), atol=1e-5)
    assert torch.allclose(found.values, values)


@QUIET
def test_lora_ga_has_the_rows_of_peft(x, g):
    peft = pytest.importorskip("peft")
    layer = nn.Linear(IN, OUT, bias=False)
    layer._peft_loraga_grad = torch.einsum("sto,sti->oi", g, x)
    options = peft.LoraConfig(
        r=RANK,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction="ArB2r"),
    )
    adapted = peft.get_peft_model(nn.Sequential(layer), options).base_model.model[0]
    found = lora_ga(gathered(x, g), RANK)
    assert_same_span(found.A, adapted.lora_A["default"].weight.detach())
    assert_same_span(found.B.T, adapted.lora_B["default"].weight.detach().T)


# --- covariance


def shrunk_second_moment(rows: Tensor, share: float) -> Tensor:
    flat = rows.double().flatten(0, 1)
    second = flat.T @ flat / len(flat)
    return (1 - share) * second + share * second.trace() / len(second) * torch.eye(len(second), dtype=torch.float64)


def inverse_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**-0.5 @ vectors.T


def test_covariance_is_its_formula(x, g):
    statistics = gathered(x, g)
    root_x = inverse_root(shrunk_second_moment(x, statistics.inputs.shrinkage()))
    root_g = inverse_root(shrunk_second_moment(g, statistics.gradients.shrinkage()))
    G = torch.einsum("sto,sti->oi", g.double(), x.double()) / (x.shape[0] * x.shape[1])
    _, values, Vh = torch.linalg.svd(root_g @ G @ root_x)
    found = covariance(statistics, RANK)
    assert torch.allclose(found.values, values)
    for a, row in zip(found.A.double(), Vh[:RANK] @ root_x, strict=True):
        assert abs(float(torch.cosine_similarity(a, row, dim=0))) > 1 - 1e-9


def test_covariance_about_the_mean_is_that_of_centred_data(x, g):
    centred_x, centred_g = x - x.mean((0, 1)), g - g.mean((0, 1))
    found = covariance(gathered(x, g), RANK, centre=True, shrinkage=0.1)
    expected = covariance(gathered(centred_x, centred_g), RANK, shrinkage=0.1)
    assert_same_span(found.A, expected.A)
    assert torch.allclose(found.values, expected.values, atol=1e-5)


def test_features_of_covariance_are_uncorrelated(x, g):
    statistics = gathered(x, g)
    A = covariance(statistics, RANK).A.double()
    products = A @ shrunk_second_moment(x, statistics.inputs.shrinkage()) @ A.T
    assert torch.allclose(products, products[0, 0] * torch.eye(RANK, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("metric_out", ["full", "none"])
def test_covariance_is_invariant_to_mixing_the_inputs(metric_out, x, g, rng):
    mixing = torch.randn(IN, IN, generator=rng)
    options = {"metric_out": metric_out, "shrinkage": 0.0}
    plain = covariance(gathered(x.double(), g), RANK, **options)
    mixed = covariance(gathered(x.double() @ mixing.double().T, g), RANK, **options)
    assert_same_span(mixed.A @ mixing, plain.A)
    assert torch.allclose(mixed.values, plain.values)


def test_covariance_of_white_data_follows_the_gradient_alone(rng):
    # Orthogonal columns make both second moments the identity.
    x, g = (torch.linalg.qr(torch.randn(50, width, generator=rng))[0].unsqueeze(1) for width in (IN, OUT))
    statistics = gathered(x, g)
    assert_same_span(covariance(statistics, RANK).A, lora_ga(statistics, RANK).A)


def test_covariance_spans_the_natural_gradient(x, g):
    G = torch.einsum("sto,sti->oi", g.double(), x.double())
    root_x, root_g = (inverse_root(shrunk_second_moment(rows, 0.2)) for rows in (x, g))
    U, values, Vh = torch.linalg.svd(root_g @ G @ root_x)
    natural = root_g @ U[:, :RANK] * values[:RANK] @ Vh[:RANK] @ root_x  # the best of rank r in the metric of K-FAC
    expected = torch.linalg.svd(natural)[2][:RANK]
    assert_same_span(covariance(gathered(x, g), RANK, shrinkage=0.2).A, expected)


def planted(generator: torch.Generator, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, gradients that depend on three of their features, and these features."""
    features = torch.linalg.qr(torch.randn(IN, RANK, generator=generator))[0].T
    x = torch.randn(sequences, 1, IN, generator=generator) + 0.3 * torch.randn(sequences, 8, IN, generator=generator)
    wanted = torch.randn(RANK, OUT, generator=generator)
    g = x @ features.T @ wanted + torch.randn(sequences, 8, OUT, generator=generator)
    return x, g, features


def test_shrinkage_finds_a_planted_feature_in_few_sequences(rng):
    # The tokens of a sequence repeat each other: 16 sequences do not determine 20 variances.
    shrunk, plain = [], []
    for _ in range(5):
        feature, wanted = (torch.randn(1, width, generator=rng) / math.sqrt(width) for width in (IN, OUT))
        x, g = (torch.randn(16, 1, width, generator=rng) for width in (IN, OUT))
        x, g = x.repeat(1, 8, 1), (g + 3 * x @ feature.T @ wanted).repeat(1, 8, 1)
        shrunk.append(smallest_cosine(covariance(gathered(x, g), 1).A, feature))
        plain.append(smallest_cosine(covariance(gathered(x, g), 1, shrinkage=0.0).A, feature))
    assert min(shrunk) > 0.4
    assert max(plain) < 0.3


@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_suggested_rank_counts_the_planted_features(mean: float, rng):
    for _ in range(5):
        x, g, _ = planted(rng, 64)
        assert covariance(gathered(x + mean, g + mean), 1).suggested_rank == RANK


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_suggested_rank_of_pure_noise_is_zero(spread: float, rng):
    wrong = 0
    for _ in range(40):
        x, g = (torch.randn(32, 8, width, generator=rng) for width in (IN, OUT))
        x, g = (rows + spread * torch.randn(32, 1, rows.shape[-1], generator=rng) for rows in (x, g))
        wrong += covariance(gathered(x, g), 1).suggested_rank > 0
    assert wrong <= 5  # two are expected; more than five happen once in a hundred times


def test_suggested_rank_needs_pairs(x, g):
    assert covariance(gathered(x[:1], g[:1]), 1, shrinkage=0.5).suggested_rank is None
    statistics = MatrixStatistics(OUT, IN, NEEDS["covariance"] - {"permuted"})
    statistics.add(x, g)
    assert covariance(statistics, RANK).suggested_rank is None


def test_covariance_from_one_sequence_is_refused(x, g):
    with pytest.raises(ValueError, match="at least two"):
        covariance(gathered(x[:1], g[:1]), RANK)


# --- smoothness


def smooth_data(generator: torch.Generator, axes: tuple[int, ...], channels: int) -> tuple[Tensor, Tensor]:
    """Return noisy inputs that vary most along two smooth directions, and these."""
    waves = [torch.sin(math.pi * torch.linspace(0, 1, size)) for size in axes]
    shape = waves[0] if len(waves) == 1 else torch.outer(*waves)
    wave = (shape / shape.norm()).flatten()
    profiles = torch.linalg.qr(torch.randn(channels, 2, generator=generator))[0].T
    truth = torch.einsum("pc,w->pcw", profiles, wave).flatten(1)
    own = torch.randn(20, 2, 2, generator=generator) * torch.tensor([2.0, 1.5])
    return own @ truth + torch.randn(20, 2, truth.shape[1], generator=generator), truth


@pytest.mark.parametrize(("axes", "channels"), [((30,), 2), ((7, 7), 3)])
@pytest.mark.parametrize("start", [eva, covariance])
def test_smooth_directions_are_found_better_with_axes(start, axes: tuple[int, ...], channels: int, rng):
    with_axes, without = [], []
    for _ in range(5):
        x, truth = smooth_data(rng, axes, channels)
        g = x @ truth.T @ torch.randn(2, OUT, generator=rng) + torch.randn(20, 2, OUT, generator=rng)
        with_axes.append(smallest_cosine(start(gathered(x, g, axes=axes), 2).A, truth))
        without.append(smallest_cosine(start(gathered(x, g), 2).A, truth))
    assert sum(with_axes) > sum(without)
    assert 1 - sum(with_axes) / 5 < 0.6 * (1 - sum(without) / 5)


def test_rough_directions_are_not_smoothed_away(rng):
    wave = torch.tensor([1.0, -1.0]).repeat(15) / math.sqrt(30)
    x = 5 * torch.randn(20, 2, 1, generator=rng) * wave + 0.1 * torch.randn(20, 2, 30, generator=rng)
    assert_same_span(eva(gathered(x, axes=(30,)), 1).A, wave.unsqueeze(0), angle=0.1)


def test_smoothing_needs_two_sequences(x):
    with pytest.raises(ValueError, match="two sequences"):
        eva(gathered(x[:1], axes=(4,)), 1)
