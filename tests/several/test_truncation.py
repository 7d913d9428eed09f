"""An adapter cut to lower ranks: the best approximation of each layer's dense update, and an adapter like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_names,
    adapter_state_dict,
    add_adapter,
    attach,
    calibrate,
    combine,
    detach,
    disabled,
    load_adapter,
    lora_layers,
    merge,
    merged,
    save_adapter,
    truncate_adapter,
    using,
)
from lightning_lora.attachment import get_attachment
from lightning_lora.layers import LoRALayer
from lightning_lora.several import truncation
from tests.contract import assert_same_bits, learn, raises_and_changes_nothing
from tests.files import files_of, run, write_checkpoint
from tests.peft_format.models import CLOSE, QUIET, bert, distance, gpt2, in_peft, llama, logits, mixtral, trained
from tests.several.test_combination import EXACT, RICH, ROUNDING, Rich
from tests.test_switching import CONFIGS, base, tokens
from tests.toys import Spectral, Toy, loader, trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")]

ADAPTERS: dict[str, tuple[Callable[[], nn.Module], LoRAConfig]] = {
    "linear, convolution, embedding": (base, replace(CONFIGS["plain"], rank=4)),
    "recurrent, with a head": (base, CONFIGS["head"]),
    "token rows and statistics": (base, replace(CONFIGS["rows"], rank=3)),
    "a bias of B, with a norm": (base, replace(CONFIGS["norm"], rank=3)),
    "biases": (base, LoRAConfig(rank=3, target_modules=["fc", "rnn"], bias="all")),
    "biases of adapted layers": (base, LoRAConfig(rank=3, target_modules=["fc", "conv"], bias="lora_only")),
    "attention, experts, transposed convolution": (Rich, replace(RICH["whole"], rank=4)),
    "slices and a bilinear layer": (Rich, RICH["slices"]),
    "attention's inputs and experts": (Rich, RICH["attention's inputs"]),
}
PARTS = {"qkv.weight": {"q": slice(0, 12), "v": slice(24, 36, 2)}}  # of RICH["slices"]


def adapted(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a module with a trained adapter without a name, in float64 so that comparisons are exact."""
    build, config = ADAPTERS[case]
    torch.manual_seed(5)
    module = build().to(dtype)
    attach(module, config)
    learn(module, 0)
    return module


def inside(module: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors with the adapter inside the weights."""
    with merged(module):
        return {key: value.detach().clone() for key, value in module.state_dict().items() if "lora" not in key}


def without(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items() if "lora" not in key}


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Return each dense update as the matrices that have factors of their own: experts, and slices of rows."""
    bare, found = without(module), dict[str, Tensor]()
    for name, value in inside(module).items():
        update = (value - bare[name]).double()
        if name.startswith("experts."):
            found |= {f"{name}[{number}]": expert for number, expert in enumerate(update)}
        elif value.ndim > 1 and f"{name.rpartition('.')[0]}.lora.rows" not in module.state_dict():
            rows = PARTS.get(name, {}) if "qkv.lora.q.A" in module.state_dict() else {}
            found |= {f"{name}[{key}]": update[part] for key, part in rows.items()} or {name: update.flatten(1)}
    return {name: matrix for name, matrix in found.items() if matrix.any()}


def best(matrix: Tensor, rank: int) -> Tensor:
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * values[:rank] @ Vh[:rank]


# --- the best approximation


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("case", ADAPTERS)
def test_every_layer_becomes_its_best_approximation_of_the_rank(case: str, rank: int):
    module = adapted(case)
    before = matrices(module)
    truncate_adapter(module, rank=rank)
    after = matrices(module)
    assert after.keys() == before.keys()
    for name, matrix in before.items():
        assert float((after[name] - best(matrix, rank)).norm()) <= EXACT * float(matrix.norm()), name


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("case", ["linear, convolution, embedding", "recurrent, with a head"])
def test_energy_keeps_the_least_rank_that_holds_it(case: str, energy: float):
    module = adapted(case)
    before = matrices(module)
    for layer in truncate_adapter(module, energy=energy):
        name = layer.name if layer.name.startswith("rnn") else f"{layer.name}.weight"
        squares = torch.linalg.svdvals(before[name]).square()
        held = squares.cumsum(0) / squares.sum()
        assert layer.rank == int((held < energy - 1e-9).sum()) + 1
        assert layer.stacked == ADAPTERS[case][1].rank
        assert layer.error == pytest.approx(float((squares[layer.rank :].sum() / squares.sum()).sqrt()), abs=1e-7)


def test_the_error_of_experts_is_that_of_the_stack():
    module = adapted("attention's inputs and experts")
    before = torch.stack([matrix for name, matrix in matrices(module).items() if "experts" in name])
    [layer] = [layer for layer in truncate_adapter(module, rank=2) if "experts" in layer.name]
    squares = torch.linalg.svdvals(before).square()
    assert layer.error == pytest.approx(float((squares[:, 2:].sum() / squares.sum()).sqrt()))


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_trains_in_full_keeps_every_bit(case: str):
    module = adapted(case)
    moved = {name: value for name, value in inside(module).items() if not torch.equal(value, without(module)[name])}
    others = {name: value for name, value in without(module).items() if name not in moved}
    rows = {name: each.clone() for name, each in module.state_dict().items() if name.endswith(("rows", "lora.bias"))}
    truncate_adapter(module, rank=1)
    assert_same_bits({name: without(module)[name] for name in others}, others)
    for name, value in rows.items():  # a bias of B has the scaling of before inside
        now = module.state_dict()[name]
        assert torch.equal(now, value) or torch.allclose(now, value * ADAPTERS[case][1].alpha / 3, rtol=1e-12)


def test_half_precision_factors_become_float32():
    module = base()
    attach(module, LoRAConfig(rank=4, target_modules=["fc"], adapter_dtype="bfloat16"))
    learn(module, 0)
    before = matrices(module.double())["fc.weight"]
    truncate_adapter(module.float(), rank=2)
    assert lora_layers(module)["fc"].lora.A.dtype == torch.float32
    assert distance(matrices(module.double())["fc.weight"], best(before, 2)) <= EXACT


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_is_a_difference_comes_back_at_the_rank_of_its_update(start: str, tmp_path: Path):
    module = base().double()
    attach(module, LoRAConfig(rank=3, target_modules=["fc"], init=start))
    calibrate(module)
    learn(module, 0)
    adapter = lora_layers(module)["fc"].lora
    with torch.no_grad():
        adapter.A.copy_(adapter.whole_factors()[0][3:])  # then the difference has one factor in common with its start
    before = matrices(module)["fc.weight"]
    true_rank = int(torch.linalg.matrix_rank(before))
    [layer] = truncate_adapter(module, energy=1.0)
    assert layer[1:3] == (6, true_rank)
    assert true_rank == 3
    assert not lora_layers(module)["fc"].lora.is_difference
    assert distance(matrices(module)["fc.weight"], before) <= ROUNDING * 1e3
    save_adapter(module, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == true_rank


# --- layers without an update


def test_layers_without_an_update_drop_out_and_are_ordinary_again():
    module = adapted("linear, convolution, embedding")
    with torch.no_grad():
        lora_layers(module)["conv"].lora.B.zero_()
    layers = truncate_adapter(module, energy=0.99)
    assert {layer.name: layer.rank > 0 for layer in layers} == {"embed": True, "conv": False, "fc": True}
    assert [*lora_layers(module)] == ["embed", "fc"]
    assert type(module.conv) is nn.Conv1d
    assert not module.conv._modules


def test_an_adapter_without_any_update_is_refused():
    module = base()
    attach(module, CONFIGS["plain"])
    with torch.no_grad():
        lora_layers(module)["embed"].lora.A.zero_()  # where B is not zero at the start
    with raises_and_changes_nothing(module, ValueError, "truncate_adapter: the adapter is zero in every layer"):
        truncate_adapter(module, rank=1)


def test_a_head_stays_where_no_layer_has_an_update():
    module = base()
    attach(module, CONFIGS["head"])
    module.head.weight.data.mul_(2)
    expected = module.eval()(tokens())
    assert {layer.rank for layer in truncate_adapter(module, rank=1)} == {0}
    assert torch.equal(module(tokens()), expected)


# --- an adapter like any other


@pytest.mark.parametrize("case", ADAPTERS)
def test_detaching_afterwards_restores_the_base(case: str):
    module, plain = adapted(case), adapted(case)
    detach(plain)  # heads keep what they learned
    truncate_adapter(module, rank=1)
    detach(module)
    assert_same_bits(module.state_dict(), plain.state_dict())
    assert [type(part) for part in module.modules()] == [type(part) for part in plain.modules()]
    flags = [parameter.requires_grad for parameter in plain.parameters()]
    assert [parameter.requires_grad for parameter in module.parameters()] == flags


def test_the_adapter_trains_and_the_base_does_not():
    module = adapted("recurrent, with a head", torch.float32)
    flags = {name: each.requires_grad for name, each in module.named_parameters()}
    truncate_adapter(module, rank=2)
    assert {name: each.requires_grad for name, each in module.named_parameters()} == flags
    module.train()(tokens()).sum().backward()
    assert {name for name, each in module.named_parameters() if each.grad is not None} == {
        name for name, needs in flags.items() if needs
    }


def test_a_mode_of_evaluation_stays():
    module = adapted("linear, convolution, embedding").eval()
    truncate_adapter(module, rank=1)
    assert not any(part.training for part in module.modules())


def test_options_stay():
    module = base()
    attach(module, LoRAConfig(rank=4, target_modules=["fc"], dropout=0.3, frozen_norm="track", use_rslora=True), seed=7)
    learn(module, 0)
    truncate_adapter(module, rank=1)
    record = get_attachment(module)
    assert (record.config.dropout, record.config.frozen_norm, record.seed, record.name) == (0.3, "track", 7, None)
    assert lora_layers(module)["fc"].lora.spec.scaling == 1.0


def test_a_single_adapter_keeps_its_name_and_the_base_its_values():
    module = base().double()
    bare = without(module)
    add_adapter(module, "german", replace(CONFIGS["head"], target_modules=["fc", "rnn", "conv"]))
    learn(module, 0)
    with torch.no_grad():
        lora_layers(module)["conv"].lora.B.zero_()
    head, before = module.head.weight.clone(), matrices(module)["fc.weight"]
    truncate_adapter(module, rank=1)
    assert adapter_names(module) == ["german"]
    assert torch.equal(module.head.weight, head)
    assert distance(matrices(module)["fc.weight"], best(before, 1)) <= EXACT
    assert not module.conv._modules
    with using(module, None):
        assert_same_bits(without(module), bare)
    add_adapter(module, "other", LoRAConfig(rank=1, target_modules=["conv"]))
    assert adapter_names(module) == ["german", "other"]


def test_an_adapter_of_a_part_is_cut_there():
    module = nn.ModuleDict({"model": adapted("linear, convolution, embedding"), "other": nn.Linear(4, 4)})
    before = matrices(module["model"])
    assert [layer.name for layer in truncate_adapter(module, rank=1)] == ["embed", "conv", "fc"]
    assert distance(matrices(module["model"])["fc.weight"], best(before["fc.weight"], 1)) <= EXACT


def test_it_is_saved_loaded_and_merged(tmp_path: Path):
    module = adapted("linear, convolution, embedding", torch.float32)
    truncate_adapter(module, energy=0.7)
    save_adapter(module, tmp_path / "peft")
    checkpoint, expected = write_checkpoint(module, tmp_path / "one.ckpt"), module.eval()(tokens())
    for path in (checkpoint, tmp_path / "peft"):
        again = base()
        load_adapter(again, path)
        torch.testing.assert_close(again.eval()(tokens()), expected)
    merge(module)
    assert not any(isinstance(part, LoRALayer) for part in module.modules())
    torch.testing.assert_close(module(tokens()), expected)


OPTIONS = {"rank": 6, "target_modules": ["net.0", "net.2"], "modules_to_save": ["net.4"]}


@pytest.mark.parametrize("options", [{"rank": 6}, OPTIONS])
@pytest.mark.parametrize("name", [None, "german"])
def test_a_fit_goes_on_with_the_ranks_of_the_cut(options: dict[str, Any], name: str | None):
    module = Toy()
    trainer(LoRACallback(**options, adapter=name), max_steps=8).fit(module, loader())
    truncate_adapter(module, rank=2)
    before = {key: value.clone() for key, value in adapter_state_dict(module).items()}
    trainer(LoRACallback(**options, adapter=name), max_steps=8).fit(module, loader())  # the same options
    assert {layer.lora.spec.rank for layer in lora_layers(module).values()} == {2}
    after = adapter_state_dict(module)
    assert [key for key, value in before.items() if torch.equal(after[key], value)] == []
    assert module.losses[-1] < module.losses[8]


def test_every_later_fit_resumes_with_the_options_of_the_first(tmp_path: Path):
    module, checkpoints = Toy(), [tmp_path / f"{number}.ckpt" for number in range(3)]
    trainer(LoRACallback(**OPTIONS), max_steps=4).fit(module, loader())
    truncate_adapter(module, rank=2)
    for steps, (before, after) in enumerate(zip([None, *checkpoints], checkpoints, strict=False), start=1):
        fit = trainer(LoRACallback(**OPTIONS), max_steps=4 * steps)
        fit.fit(module, loader(), ckpt_path=before)
        fit.save_checkpoint(after)
        assert {layer.lora.spec.rank for layer in lora_layers(module).values()} == {2}
        module = Toy()  # as in a new process


def test_a_fresh_fit_starts_anew_after_a_cut():
    module = Toy()
    trainer(LoRACallback(**OPTIONS, fresh=True), max_steps=3).fit(module, loader())
    first = module.losses[:3]
    truncate_adapter(module, rank=2)
    trainer(LoRACallback(**OPTIONS, fresh=True), max_steps=3).fit(module, loader())
    assert module.losses[3:] == first
    assert lora_layers(module)["net.0"].lora.spec.rank == 6


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_fresh_fit_does_not_take_trained_values_for_the_first_ones(is_cut: bool, monkeypatch: pytest.MonkeyPatch):
    module = Toy()
    trainer(LoRACallback(**OPTIONS)).fit(module, loader())
    if not is_cut:
        monkeypatch.setattr(truncation, "attach_sum", None)
    with nullcontext() if is_cut else pytest.raises(TypeError):
        truncate_adapter(module, rank=2)
    with pytest.raises(MisconfigurationException, match=r"the first values of net\.4 were not kept"):
        trainer(LoRACallback(**OPTIONS, fresh=True)).fit(module, loader())


# --- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "truncate_adapter: set energy, .*; or rank"),
        ({"energy": 0.5, "rank": 1}, ValueError, "rank=1 and energy=0.5 are both set; set one of them"),
        ({"energy": 0.0}, ValueError, "energy must be above 0 and at most 1, got 0.0"),
        ({"energy": float("nan")}, ValueError, "energy must be above 0 and at most 1, got nan"),
        ({"energy": "0.9"}, TypeError, "energy must be a number, got '0.9'"),
        ({"energy": True}, TypeError, "energy must be a number, got True"),
        ({"rank": 0}, ValueError, "rank must be >= 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an integer, got 2.0"),
        ({"rank": 5}, ValueError, "truncate_adapter: rank=5 is above 4, the highest rank that the adapter can have"),
    ],
)
def test_options_that_cut_nothing_are_refused(options: dict[str, Any], error: type[Exception], message: str):
    module = adapted("linear, convolution, embedding")
    with raises_and_changes_nothing(module, error, message):
        truncate_adapter(module, **options)


def test_a_module_without_adapters_is_refused():
    with pytest.raises(ValueError, match=r"truncate_adapter: Mixed has no adapters; call attach"):
        truncate_adapter(base(), rank=1)


def test_several_adapters_are_refused_with_the_way_that_keeps_both():
    module = base()
    for name in ("a", "b"):
        add_adapter(module, name, LoRAConfig(rank=4, target_modules=["fc"]))
        learn(module, 0)
    with raises_and_changes_nothing(module, ValueError, "several adapters, 'a', 'b'") as caught:
        truncate_adapter(module, energy=0.99)
    call = re.search(r"combine\(module, .*?\)", str(caught.value))
    assert call is not None
    eval(call[0], {"combine": combine, "module": module})
    assert adapter_names(module) == ["a", "b", "a_small"]


def test_dora_is_refused_with_its_reason():
    module = base()
    attach(module, CONFIGS["dora"])
    learn(module, 0)
    with raises_and_changes_nothing(module, ValueError, "the adapter uses DoRA, which rescales each row") as caught:
        truncate_adapter(module, rank=1)
    assert "add up" not in str(caught.value)


def test_nan_is_refused():
    module = adapted("linear, convolution, embedding")
    lora_layers(module)["fc"].lora.B.data[0] = float("nan")
    with pytest.raises(ValueError, match="the adapter holds NaN or infinity in fc"):
        truncate_adapter(module, rank=1)


@pytest.mark.parametrize("mode", [merged, disabled])
@pytest.mark.parametrize("name", [None, "german"])
def test_nothing_is_cut_inside_a_mode(mode: Any, name: str | None):
    module = base()
    if name is None:
        attach(module, CONFIGS["head"])
    else:
        add_adapter(module, name, CONFIGS["head"])
    learn(module, 0)
    with mode(module), raises_and_changes_nothing(module, RuntimeError, f"inside {mode.__name__}"):
        truncate_adapter(module, rank=1)


def test_adapters_that_wait_for_their_start_are_refused():
    module = base()
    attach(module, LoRAConfig(rank=2, target_modules=["fc"], init="pissa"))
    with raises_and_changes_nothing(module, RuntimeError, "wait for their start"):
        truncate_adapter(module, rank=1)


def test_parts_of_a_module_are_refused():
    module = adapted("linear, convolution, embedding")
    with pytest.raises(ValueError, match="attached to a parent"):
        truncate_adapter(module.fc, rank=1)
    two = nn.ModuleDict({"one": adapted("biases"), "other": adapted("biases")})
    with raises_and_changes_nothing(two, ValueError, "one, other were attached to one by one"):
        truncate_adapter(two, rank=1)
    assert truncate_adapter(two["one"], rank=1)


def test_a_running_trainer_is_refused_since_its_optimizer_holds_the_factors():
    class Cutting(Toy):
        def on_train_epoch_start(self) -> None:
            with pytest.raises(RuntimeError, match="a Trainer is running with this Cutting"):
                truncate_adapter(self, rank=1)
            self.refused = True

    module = Cutting()
    trainer(LoRACallback(rank=2)).fit(module, loader())
    assert module.refused
    assert truncate_adapter(module, rank=1)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("wrap", "how"),
    [(nn.parallel.DistributedDataParallel, "DistributedDataParallel"), (fully_shard, "FSDPToy")],
)
def test_a_wrapped_module_is_refused(wrap: Any, how: str):
    module = Toy()
    attach(module, LoRAConfig(rank=2))
    learn(module, 0)
    with pytest.raises(RuntimeError, match=f"is wrapped in {how}"):
        truncate_adapter(wrap(module), rank=1)


def test_cutting_keeps_imaginary_parts():
    module, rng = Spectral(), torch.Generator().manual_seed(3)
    attach(module, LoRAConfig(rank=2, target_modules=["lin"], modules_to_save=["spec"]))
    with torch.no_grad():
        for tensor in (module.spec.weight, module.spec.mean, module.lin.lora.B):
            tensor.copy_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=rng))
    before = {key: value.clone() for key, value in module.spec.state_dict().items()}
    truncate_adapter(module, rank=1)
    assert all(torch.equal(value, before[key]) for key, value in module.spec.state_dict().items())


# --- nothing is half changed


@pytest.mark.parametrize("name", [None, "german"])
@pytest.mark.parametrize("config", ["plain", "head", "rows", "norm", "biases"])
@pytest.mark.parametrize("step", ["attach_sum", "state_of_sum", "copy_adapter_state"])
def test_an_error_at_any_step_leaves_the_adapter_as_it_was(
    step: str, config: str, name: str | None, monkeypatch: pytest.MonkeyPatch
):
    module = base()
    options = LoRAConfig(rank=3, target_modules=["fc"], bias="all") if config == "biases" else CONFIGS[config]
    if name is None:
        attach(module, options)
    else:
        add_adapter(module, name, options)
        with using(module, None):  # which leaves attributes of its own
            pass
    learn(module.train(), 0)
    lora_layers(module).popitem()[1].lora.requires_grad_(False)  # as a user may

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(truncation, step, fail)
    with raises_and_changes_nothing(module, OSError, "no memory"):
        truncate_adapter(module, rank=1)
    monkeypatch.undo()
    assert truncate_adapter(module, rank=1)


def test_layers_that_no_config_can_name_are_refused_and_nothing_changes():
    module = nn.ModuleDict({"rnn": nn.GRU(4, 4), "below": nn.ModuleDict({"rnn": nn.GRU(4, 4)})})
    attach(module, LoRAConfig(rank=1, target_modules=r"rnn"))  # a regular expression for one of them
    learn(module, 0)
    with raises_and_changes_nothing(module, ValueError, r"truncate_adapter: .*exactly the layers of the result"):
        truncate_adapter(module, rank=1)


# --- PEFT and files


FILES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpt2, slices": (gpt2, {"target_modules": ["wpe"], "target_slices": {"c_attn": {"q": "0:16", "v": "32:48"}}}),
    "llama": (llama, {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 3}}),
    "llama, tokens": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"model.embed_tokens": [2, 5]}},
    ),
    "bert, head and biases": (
        bert,
        {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "bias": "all"},
    ),
    "mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
}


@pytest.mark.parametrize("case", FILES)
def test_peft_computes_the_same_from_the_module_and_from_the_file(case: str, tmp_path: Path):
    make, options = FILES[case]
    module = trained(make(), **({"rank": 4} | options))
    save_adapter(module, tmp_path / "before")
    assert run("truncate", tmp_path / "before", "--energy", "0.8", "--out", tmp_path / "of file") == 0
    layers = truncate_adapter(module, energy=0.8)
    assert any(0 < layer.rank < layer.stacked for layer in layers)
    save_adapter(module, tmp_path / "of module")
    expected = logits(module.eval())
    assert distance(logits(in_peft(make(), tmp_path / "of module")), expected) <= CLOSE
    if "target_slices" in options:  # the file holds one update for all slices, which is cut as one
        again = make()
        load_adapter(again, tmp_path / "of file")
        expected = logits(again.eval())
    assert distance(logits(in_peft(make(), tmp_path / "of file")), expected) <= CLOSE


def test_the_command_refuses_what_it_cannot_cut_in_its_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cases: dict[str, tuple[dict[str, Any], str, str]] = {
        "dora": ({"use_dora": True}, "1", "uses DoRA, which rescales each row"),
        "plain": ({}, "3", "rank=3 is above 2, the highest rank that the adapter can have"),
    }
    for name, (options, rank, message) in cases.items():
        save_adapter(trained(llama(), target_modules=["q_proj"], **options), tmp_path / name)
        assert run("truncate", tmp_path / name, "--rank", rank, "--out", tmp_path / "cut") == 1
        said = capsys.readouterr().err
        assert "truncate: " in said
        assert message in said
        assert "combine" not in said
        assert not (tmp_path / "cut").exists()


def test_the_command_replaces_a_directory_only_if_asked(tmp_path: Path):
    save_adapter(trained(llama(), target_modules=["q_proj"]), tmp_path / "one")
    before = files_of(tmp_path / "one")
    command = ("truncate", tmp_path / "one", "--rank", 1, "--out", tmp_path / "one")
    assert run(*command) == 1
    assert files_of(tmp_path / "one") == before
    assert run(*command, "--overwrite") == 0
    model = llama()
    load_adapter(model, tmp_path / "one")
    assert {layer.lora.spec.rank for layer in lora_layers(model).values()} == {1}
