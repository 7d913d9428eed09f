from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.analysis import Loadings, analyze, loadings
from lightning_lora.analysis.adapters import AdapterMatrix
from lightning_lora.analysis.components import components_of, loadings_of
from lightning_lora.layers import LowRankAdapter
from tests.contract import train_all
from tests.files import write_checkpoint


def orthonormal(count: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64))[0].T


def found_in(A: Tensor, B: Tensor, **options: Any) -> Loadings:
    matrix = AdapterMatrix("layer", A, B, 1.0, **options)
    return loadings_of(matrix, matrix.svd())


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


# --- the components


def test_planted_components_are_found_however_the_update_is_split(rng: torch.Generator):
    reads, writes, values = orthonormal(3, 9, rng), orthonormal(3, 7, rng), torch.tensor([5.0, 2.0, 0.5]).double()
    mixed = torch.randn(3, 3, generator=rng, dtype=torch.float64)
    found = found_in(mixed @ reads, writes.T * values @ mixed.inverse())
    assert_same(found.values, values)
    assert_same(found.shares, values.square() / values.square().sum())
    signs = (found.reads * reads).sum(1, keepdim=True)
    assert_same(signs.abs(), torch.ones(3, 1))
    assert_same(found.reads, signs * reads)
    assert_same(found.writes, signs * writes)


@pytest.mark.parametrize("writes_kernel", [False, True])
def test_the_largest_entry_of_what_is_read_is_positive(writes_kernel: bool, rng: torch.Generator):
    A, B = torch.randn(8, 12, generator=rng), torch.randn(12, 8, generator=rng)
    found = found_in(A, B, writes_kernel=writes_kernel)
    assert torch.equal(found.reads.amax(1), found.reads.abs().amax(1))


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(12, 10), {}),
    "slice": (lambda: nn.Linear(12, 20), {"target_modules": [], "target_slices": {"0": {"q": "0:9"}}}),
    "conv": (lambda: nn.Conv2d(4, 10, 3), {}),
    "grouped conv": (lambda: nn.Conv2d(8, 16, (3, 2), groups=2), {}),
    "transposed conv": (lambda: nn.ConvTranspose1d(12, 10, 3), {}),
    "embedding": (lambda: nn.Embedding(30, 12), {}),
}
KERNELS = {"conv": (4, 3, 3), "grouped conv": (4, 3, 2), "transposed conv": (10, 3)}


def adapted(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    make, targets = KINDS[kind]
    model = nn.Sequential(make())
    ll.attach(model, ll.LoRAConfig(**({"rank": 2, "target_modules": "all"} | targets | options)))
    train_all(model, torch.Generator().manual_seed(1))
    return model


def update_of(model: nn.Module) -> Tensor:
    """Return the update of the only layer as ``(out, in)``."""
    [adapter] = [each for each in model.modules() if isinstance(each, LowRankAdapter)]
    update = adapter.spec.scaling * (adapter.B.double() @ adapter.A.double())
    return (update.T if "Transpose" in type(model[0]).__name__ else update).detach()  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
def test_the_components_of_every_kind_of_layer_add_up_to_its_update(kind: str):
    model = adapted(kind)
    [found] = loadings(model)
    assert_same(found.writes.T * found.values @ found.reads, update_of(model))
    assert found.kernel == KERNELS.get(kind, ())
    assert found.writes_kernel == (kind == "transposed conv")


IN_PEFT = ("linear", "conv", "embedding")
FORMS = [(kind, "checkpoint") for kind in KINDS] + [(kind, form) for kind in IN_PEFT for form in ("PEFT", "with base")]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_a_file_says_the_same_as_the_module(kind: str, form: str, tmp_path: Path):
    model = adapted(kind)
    if form == "checkpoint":
        source: Any = (write_checkpoint(model, tmp_path / "adapter.ckpt"), None)
    else:
        ll.save_adapter(model, tmp_path / "adapter")
        source = (tmp_path / "adapter", nn.Sequential(KINDS[kind][0]()) if form == "with base" else None)
    [found], [expected] = loadings(*source), loadings(model)
    assert found.kernel == expected.kernel
    assert found.writes_kernel == expected.writes_kernel
    assert_same(found.reads, expected.reads)
    assert_same(found.writes, expected.writes)


def test_an_update_can_be_asked_for_by_name():
    model = nn.ModuleDict({"h": nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), "neck": nn.Linear(8, 8)})
    ll.attach(model, ll.LoRAConfig(rank=2))
    assert [each.name for each in loadings(model, layer="h.1")] == ["h.1"]
    with pytest.raises(ValueError, match=r"layer='nek' has no update. Closest names: 'neck'."):
        loadings(model, layer="nek")


def test_an_update_that_is_zero_reads_with_the_rows_of_its_start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    ll.attach(model, ll.LoRAConfig(rank=2, init="eva"))
    x = torch.randn(400, 12) * torch.linspace(3, 0.5, 12)
    ll.calibrate(model, x.split(50))
    [found] = loadings(model)
    directions = torch.linalg.svd((x - x.mean(0)).double())[2][:2]
    assert_same((found.reads * directions).sum(1).abs(), torch.ones(2))
    assert found.reads.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert not found.writes.any()
    assert found.shares.isnan().all()


# --- in short


def test_the_strongest_features_are_named_with_their_shares():
    read, write = torch.zeros(1, 9), torch.zeros(1, 5)
    read[0, [7, 2, 4, 0]] = torch.tensor([0.8, -0.5, 0.3, 0.14])
    write[0, 3] = 2.0
    [component] = components_of(found_in(read, write.T))
    squares = read[0].square() / read.square().sum()
    assert [at for at, _ in component.reads] == [7, 2, 4]
    assert [share for _, share in component.reads] == pytest.approx([float(squares[at]) for at in (7, 2, 4)])
    assert component.writes == ((3, pytest.approx(1.0)),)
    assert component.share == pytest.approx(1.0)
    assert component.picture is None


def test_only_the_leading_components_are_summed_up(rng: torch.Generator):
    found = components_of(found_in(torch.randn(6, 9, generator=rng), torch.randn(9, 6, generator=rng)))
    assert len(found) == 4
    assert [each.share for each in found] == sorted((each.share for each in found), reverse=True)


def kernel_component(patches: Tensor) -> Any:
    [component] = components_of(
        found_in(patches.reshape(1, -1), torch.tensor([[0.0], [3.0]]).to(patches), kernel=tuple(patches.shape))
    )
    return component


def test_the_pattern_of_many_channels_is_the_one_they_share(rng: torch.Generator):
    channels = torch.tensor([0.1, -0.2, 2.0, 0.0, 1.0])
    for pattern in torch.nn.functional.normalize(torch.randn(8, 12, generator=rng)).view(8, 3, 4):
        component = kernel_component(channels.view(-1, 1, 1) * pattern)
        assert_same(component.picture, pattern * pattern.flatten()[pattern.abs().argmax()].sign())
    for patches in torch.randn(8, 5, 3, 4, generator=rng):
        picture = kernel_component(patches).picture
        assert picture.max() == picture.abs().max()
    assert [at for at, _ in component.reads] == [2, 4, 1]
    assert component.reads[0][1] == pytest.approx(4 / 5.05)
    assert component.writes == ((1, pytest.approx(1.0)),)


def test_three_channels_are_colors_and_their_sign_is_that_of_the_largest_loading(rng: torch.Generator):
    patches = torch.randn(3, 4, 5, generator=rng)
    patches[1, 2, 3] = -9.0
    picture = kernel_component(patches).picture
    assert_same(picture, -patches.permute(1, 2, 0) / patches.norm())


@pytest.mark.parametrize(
    ("positions", "size"), [((7,), (1, 7)), ((4, 5), (4, 5)), ((2, 3, 5), (3, 10)), ((1, 1), None), ((1,), None)]
)
def test_kernels_of_all_dimensions_become_flat_pictures(
    positions: tuple[int, ...], size: tuple[int, int] | None, rng: torch.Generator
):
    patches = torch.randn(1, *positions, generator=rng)
    picture = kernel_component(patches).picture
    assert (None if picture is None else tuple(picture.shape)) == size
    if len(positions) == 3:
        assert_same(picture[:, 5:].abs(), patches[0, 1].abs() / patches.norm())


# --- in an analysis


def test_an_analysis_shows_what_a_start_from_data_reads_but_not_random_rows():
    x = [torch.randn(8, 12) for _ in range(4)]
    for start, is_shown in (("eva", True), ("kaiming", False)):
        model = nn.Sequential(nn.Linear(12, 10))
        ll.attach(model, ll.LoRAConfig(rank=2, init=start))
        if is_shown:
            ll.calibrate(model, x)
        [layer] = analyze(model).layers
        assert bool(layer.components) == is_shown


def test_an_analysis_names_the_features_of_some_of_many_layers_and_says_so():
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(30))
    ll.attach(model, ll.LoRAConfig(rank=2))
    train_all(model, torch.Generator().manual_seed(0))
    analysis = analyze(model)
    header, *rows = analysis.component_rows()
    assert header == ("layer", "component", "share", "reads", "writes")
    assert [row[0] for row in rows] == ["0", "3", "5", "8", "11", "13", "16", "18", "21", "24", "26", "29"]
    assert "their shares of it; of 12 of the 30 updates" in str(analysis)
    [number] = {row[1] for row in rows}
    assert number == "1"
    assert len(analysis.component_rows(leading=2)) == 1 + 24
    first = analysis.layers[0].components[0]
    assert rows[0][2] == f"{first.share:.0%}"
    assert rows[0][3].startswith(f"{first.reads[0][0]} ({first.reads[0][1]:.0%}), ")


def test_the_plain_values_hold_the_components_and_the_record_of_the_start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 2))
    ll.attach(model, ll.LoRAConfig(rank=2, init="eva", target_modules="all"))
    report = ll.calibrate(model, [torch.randn(4, 3, 6, 6) for _ in range(3)])
    found = json.loads(json.dumps(analyze(model).to_dict()))
    first = found["layers"][0]["components"][0]
    assert first["share"] is None
    assert len(first["reads"]) == 3
    assert torch.tensor(first["picture"]).shape == (2, 2, 3)
    assert found["start"] == json.loads(json.dumps(report.plain()))
    assert found["start"]["layers"]["0"]["explained"] == report.layers[0].explained


def test_a_file_keeps_the_record_of_the_start(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 6))
    ll.attach(model, ll.LoRAConfig(rank=2, init="eva"))
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    report = ll.calibrate(model, [torch.randn(2, 4, 12) for _ in range(5)], mask=lambda batch: mask)
    analysis = analyze(write_checkpoint(model, tmp_path / "adapter.ckpt"))
    assert analysis.start == report
    assert report.tokens == 6 / 8
    assert str(report) in str(analysis)
    assert all(layer.components and math.isnan(layer.components[0].share) for layer in analysis.layers)
    ll.save_adapter(model, tmp_path / "peft")
    assert analyze(tmp_path / "peft").start is None


def test_a_damaged_record_of_the_start_is_named(tmp_path: Path):
    model = nn.Sequential(nn.Linear(12, 12))
    ll.attach(model, ll.LoRAConfig(rank=2, init="eva"))
    ll.calibrate(model, [torch.randn(8, 12) for _ in range(3)])
    path = write_checkpoint(model, tmp_path / "adapter.ckpt")
    content = torch.load(path, weights_only=True)
    content["lightning_lora"]["adapters"][0]["calibration"] = {"layers": {"0": {"begin": 3}}}
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"adapter.ckpt' is malformed"):
        analyze(path)
