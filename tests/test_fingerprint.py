"""The base's fingerprint: another base is refused by name, the same one in any form is not, and reading it is cheap."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_lora import LoRACallback, LoRAConfig, attach, load_adapter, lora_layers, merge, merged, save_adapter
from lightning_lora.adapted_model import AdaptedModel
from lightning_lora.cli import main
from lightning_lora.fingerprint import base_problems, digest, fingerprint, from_plain, places, samples, to_plain
from lightning_lora.storage.checkpoint import RECORD_KEY
from lightning_lora.trainer.warm_start import start_from
from tests.contract import raises_and_changes_nothing, train_all
from tests.files import write_checkpoint
from tests.toys import Spectral, Toy, loader, network, trainer
from tests.toys import digest as bits
from tests.trainer.test_checkpoints import fitted, read

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller")


def of(module: nn.Module) -> Any:
    return fingerprint(AdaptedModel(module).base)


def refusal(module: nn.Module, recorded: Any) -> str | None:
    return next(iter(base_problems(recorded, samples(AdaptedModel(module).base, recorded), "model")), None)


class Other(Toy):
    """The same layers, one of them with another weight."""

    def build(self) -> None:
        super().build()
        with torch.no_grad():
            self.net[2].weight.mul_(1.5)


# --- what it is


def test_fingerprint_holds_sampled_values(rng: torch.Generator) -> None:
    tensors = {
        "matrix": torch.randn(7, 5, generator=rng),
        "transposed": torch.randn(7, 5, generator=rng).T,
        "vector": torch.randn(3, generator=rng, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "image": torch.randn(2, 3, 4, 4, generator=rng).to(memory_format=torch.channels_last),
        "spectrum": torch.randn(2, 3, 5, generator=rng, dtype=torch.complex64),
        "conjugate": torch.randn(2, generator=rng, dtype=torch.complex128).conj(),
    }
    found = fingerprint(tensors)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        flat = tensor.contiguous().flatten().tolist()
        values = [flat[place] for place in places(tensor.shape)]
        if tensor.is_complex():
            values = [part for value in values for part in (value.real, value.imag)]
        assert list(found[name].values) == values
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)


def test_samples_lie_in_different_rows_and_columns() -> None:
    for shape in [(16, 16), (64, 4096), (4096, 64), (1000, 1000)]:
        assert len({place // shape[1] for place in places(shape)}) == len(places(shape))
        assert len({place % shape[1] for place in places(shape)}) == len(places(shape))


def test_every_kind_of_tensor_is_sampled() -> None:
    names = [f"layers.{i}.{kind}" for i in range(200) for kind in "abcdefgh"]
    found = fingerprint({name: torch.ones(2, 2) for name in names})
    assert 32 <= len(found) <= 128
    assert {name[-1] for name in found} == set("abcdefgh")
    assert list(found) == [name for name in names if name in found]


@pytest.mark.parametrize("name", ["head", "fc", "classifier", "net.head.fc", "pooler.dense"])
def test_other_head_of_deep_model_is_detected(name: str) -> None:
    blocks = {f"blocks.{i}.{kind}": torch.ones(4) for i in range(100) for kind in ("fc1", "fc2", "norm1", "norm2")}
    recorded = fingerprint(blocks | {f"{name}.weight": torch.ones(4)})
    other = samples(blocks | {f"{name}.weight": torch.zeros(4)}, recorded)
    message = str(base_problems(recorded, other, "model"))
    assert f"first {name}.weight" in message
    assert "saved only if modules_to_save names it" in message
    assert len(recorded) == len(of(nn.ModuleList(nn.Linear(2, 2) for _ in range(100))))


def test_every_part_of_model_without_repetition_is_sampled() -> None:
    tensors = {f"{letter}{other}.weight": torch.ones(2) for letter in ascii_letters for other in ascii_letters[:4]}
    assert list(fingerprint(tensors)) == list(tensors)


def test_fingerprint_covers_only_the_base() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    attach(model, LoRAConfig(rank=1, target_modules=["a"], modules_to_save=["b"], bias="lora_only"))
    assert set(of(model)) == {"a.weight", "norm.weight", "norm.bias"}


def test_fingerprint_round_trips_through_json() -> None:
    found = of(network())
    assert from_plain(json.loads(json.dumps(to_plain(found)))) == found


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        [],
        {"x": None},
        {"x": {"shape": [2], "dtype": "float32", "values": [1.0]}},
        {"x": {"shape": [-2], "dtype": "float32", "values": []}},
        {"x": {"shape": [2**40] * 12, "dtype": "float32", "values": [0.0] * 4}},
        {"x": {"shape": [1], "dtype": "int8", "values": [1.0]}},
        {"x": {"shape": [2], "dtype": "complex64", "values": [1.0, 1.0]}},
        {"x": {"shape": [1], "dtype": ["float32"], "values": [1.0]}},
        {"x": {"shape": [1], "dtype": "float32", "values": [float("nan")]}},
        {"x": {"shape": "1", "dtype": "float32", "values": [1.0]}},
        {str(i): {} for i in range(5000)},
    ],
)
def test_invalid_fingerprint_is_refused(nonsense: Any) -> None:
    with pytest.raises(ValueError, match="in the adapter's file"):
        from_plain(nonsense)


# --- which bases are the same

PRECISIONS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("second", PRECISIONS, ids=str)
@pytest.mark.parametrize("first", PRECISIONS, ids=str)
def test_other_precision_of_same_base_is_accepted(first: torch.dtype, second: torch.dtype) -> None:
    with torch.no_grad():
        tiny = network()
        tiny[0].weight.mul_(1e-5)  # where float16 has few digits left
    recorded = of(tiny.to(first))
    original = network()
    with torch.no_grad():
        original[0].weight.mul_(1e-5)
    assert refusal(original.to(second), recorded) is None  # both from float32
    assert refusal(tiny.to(second), recorded) is None  # one from the other
    assert refusal(tiny.float(), recorded) is None


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("step", [1.02, -1.0])
def test_other_weights_are_detected_in_every_precision(step: float, dtype: torch.dtype) -> None:
    recorded = of(network())
    other = network().to(dtype)
    with torch.no_grad():
        other[2].weight.mul_(step)
    message = refusal(other, recorded)
    assert message is not None
    assert "1 of 6 compared tensors differ, first 2.weight." in message


def test_last_bit_counts_in_same_precision() -> None:
    recorded, other = of(network()), network()
    with torch.no_grad():
        other[2].weight.copy_(torch.nextafter(other[2].weight, torch.tensor(10.0)))
    assert "first 2.weight" in str(refusal(other, recorded))


def test_other_shape_is_named() -> None:
    recorded = of(nn.Embedding(10, 4))
    assert "modules_to_save" not in str(refusal(nn.Embedding(12, 4), recorded))
    assert "weight (12, 4), not (10, 4)" in str(refusal(nn.Embedding(12, 4), recorded))


def test_only_shared_tensors_are_compared() -> None:
    recorded = of(nn.ModuleDict({"a": network(), "b": nn.Linear(2, 2)}))
    assert refusal(nn.ModuleDict({"a": network(), "c": nn.Linear(3, 3)}), recorded) is None


def test_quantized_weights_are_skipped() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    recorded = of(model)
    model["a"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model["b"].to("meta")
    assert set(of(model)) == {"a.bias"}
    assert refusal(model, recorded) is None


def test_fingerprint_inside_merged_is_that_of_base() -> None:
    model = network()
    recorded = of(model)
    attach(model, LoRAConfig(rank=2))
    train_all(model, torch.Generator().manual_seed(0))
    with merged(model):
        assert of(model) == recorded
    merge(model)
    assert "3 of 6" in str(refusal(model, recorded))


@pytest.mark.parametrize("second", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("first", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("part", ["real", "imag"])
def test_other_complex_weights_are_detected(part: str, first: torch.dtype, second: torch.dtype) -> None:
    recorded = from_plain(json.loads(json.dumps(to_plain(of(in_precision(first))))))
    other = in_precision(second)
    assert refusal(other, recorded) is None
    with torch.no_grad():
        getattr(other.spec.weight, part).mul_(1.02)
    assert "1 of 3 compared tensors differ, first spec.weight." in str(refusal(other, recorded))


def in_precision(dtype: torch.dtype) -> Spectral:
    module = Spectral()
    module.spec.weight = nn.Parameter(module.spec.weight.detach().to(dtype))
    return module


def test_real_weights_are_not_complex_ones() -> None:
    module = Spectral()
    recorded = of(module)
    module.spec.weight = nn.Parameter(module.spec.weight.detach().real.clone())
    assert "first spec.weight." in str(refusal(module, recorded))
    one, other = (fingerprint({"x": torch.ones(1, dtype=dtype)}) for dtype in (torch.complex64, torch.float32))
    assert "first x." in str(base_problems(one, other, "model"))
    assert "first x." in str(base_problems(other, one, "model"))


@pytest.mark.parametrize("shape", [(), (3,), (6, 5)], ids=str)
def test_sharding_does_not_change_complex_samples(shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        placed = distribute_tensor(whole, mesh, [Shard(0) if shape else Replicate()])
        found = fingerprint({"x": placed})
        assert len(found["x"].values) == 2 * min(4, whole.numel())
        assert found == fingerprint({"x": whole})
    finally:
        torch.distributed.destroy_process_group()


# --- loading


@pytest.fixture(params=["checkpoint", "directory"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An adapter trained on ``Toy``."""
    _, module, path = fitted(tmp_path / "source")
    if request.param == "directory":
        save_adapter(module, tmp_path / "peft")
        path = str(tmp_path / "peft")
    return path


def test_loading_checks_base(adapter: str) -> None:
    load_adapter(Toy(), adapter)
    load_adapter(Toy().bfloat16(), adapter)
    module = Other()
    with raises_and_changes_nothing(
        module, ValueError, r"a different base than this \w+: 1 of 6 .* first (net\.)?2\.weight"
    ):
        load_adapter(module, adapter)
    load_adapter(module, adapter, check_base=False)
    assert len(lora_layers(module)) == 3


def test_warm_start_checks_base(adapter: str) -> None:
    module = Other()
    attach(module, LoRAConfig(rank=6))
    with raises_and_changes_nothing(module, ValueError, "a different base than this"):
        start_from(module, adapter)
    with pytest.raises(ValueError, match="a different base than this"):
        trainer(LoRACallback(rank=6, init_from=adapter)).fit(Other(), loader())
    trainer(LoRACallback(rank=6, init_from=adapter, check_base=False)).fit(module, loader())


def test_a_directory_knows_the_buffers_of_its_base(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.net = network()
            self.register_buffer("scale", torch.full((3,), scale))
            self.register_buffer("passing", torch.rand(2), persistent=False)

    attach(module := Scaled(2.0), LoRAConfig(rank=2))
    save_adapter(module, tmp_path)
    load_adapter(Scaled(2.0), tmp_path)
    with pytest.warns(UserWarning, match="other values in the buffers scale of this Scaled"):
        load_adapter(Scaled(1.0), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(Scaled(1.0), tmp_path, check_base=False)


@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_resuming_and_evaluating_check_base(stage: str, tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path)
    module, before = Other(), bits(Other().net)
    with pytest.raises(ValueError, match=r"(?s)nothing was changed.*1 of 6 compared tensors differ, first net\.2"):
        getattr(trainer(LoRACallback(rank=4), max_steps=20), stage)(module, loader(), ckpt_path=path)
    assert not any(layer.lora.B.any() for layer in lora_layers(module).values())
    assert {name: value for name, value in bits(module.net).items() if ".lora." not in name} == before
    run = trainer(LoRACallback(rank=4, check_base=False), max_steps=20)
    getattr(run, stage)(Other(), loader(), ckpt_path=path)


def test_base_inside_checkpoint_is_not_compared(tmp_path: Path) -> None:
    _, module, path = fitted(tmp_path)
    checkpoint = read(path)
    checkpoint["state_dict"] = dict(module.state_dict())
    torch.save(checkpoint, tmp_path / "whole.ckpt")
    other = Other()
    trainer(LoRACallback(rank=4)).test(other, loader(), ckpt_path=str(tmp_path / "whole.ckpt"), verbose=False)
    assert bits(other) == bits(module)


def test_adapter_without_fingerprint_loads_anywhere(tmp_path: Path) -> None:
    _, module, path = fitted(tmp_path)
    checkpoint = read(path)
    del checkpoint[RECORD_KEY]["base"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    load_adapter(Other(), tmp_path / "old.ckpt")
    save_adapter(module, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file(load_file(file), file)
    load_adapter(Other(), tmp_path / "peft")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 10_000, '{"0.weight": {"shape": [1]}}'])
def test_damaged_fingerprint_is_refused(text: str, tmp_path: Path) -> None:
    _, module, _ = fitted(tmp_path)
    save_adapter(module, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"lightning_lora_base": text})
    with raises_and_changes_nothing(Toy(), ValueError, "damaged"):
        load_adapter(Toy(), tmp_path / "peft")


def test_tied_weights_are_found_by_every_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    attach(model, LoRAConfig(rank=2, target_modules=["head"], untie_weights=True))
    train_all(model, torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "peft")
    load_adapter(Tied(), tmp_path / "peft")


def test_base_from_full_checkpoint_is_recorded(tmp_path: Path) -> None:
    torch.save({"state_dict": Other().state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "full.ckpt")
    run = trainer(LoRACallback(rank=4))
    run.fit(Toy(), loader(), ckpt_path=str(tmp_path / "full.ckpt"))
    run.save_checkpoint(tmp_path / "adapter.ckpt")
    load_adapter(Other(), tmp_path / "adapter.ckpt")
    with raises_and_changes_nothing(Toy(), ValueError, "different base"):
        load_adapter(Toy(), tmp_path / "adapter.ckpt")


@pytest.mark.parametrize("kind", ["checkpoint", "directory"])
def test_another_complex_base_is_refused_unless_the_file_is_from_before(kind: str, tmp_path: Path) -> None:
    module = Spectral()
    attach(module, LoRAConfig(rank=2, target_modules=["lin"]))
    path, record = tmp_path / "adapter", to_plain(of(module))
    if kind == "directory":
        save_adapter(module, path)
    else:
        write_checkpoint(module, path)
    load_adapter(Spectral(), path)
    other = Spectral()
    with torch.no_grad():
        other.spec.weight.imag.mul_(2)
    with raises_and_changes_nothing(other, ValueError, r"1 of \d compared tensors differ, first spec\.weight\."):
        load_adapter(other, path)
    del record["spec.weight"]  # as it was recorded before complex weights were compared
    if kind == "directory":
        file = path / "adapter_model.safetensors"
        save_file(load_file(file), file, metadata={"lightning_lora_base": json.dumps(record)})
    else:
        content = read(str(path))
        content[RECORD_KEY]["base"] = record
        torch.save(content, path)
    load_adapter(other, path)


# --- the command


def base_file(module: nn.Module, path: Path, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Path:
    save_file({name: change(tensor).contiguous() for name, tensor in module.state_dict().items()}, path)
    return path


def test_verify_command_compares_base(adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = base_file(Toy().net, tmp_path / "same.safetensors", lambda tensor: tensor.bfloat16())
    other = base_file(Other().net, tmp_path / "other.safetensors")
    out = str(tmp_path / "out")
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "toy"}')  # the weight in the middle is square
    folders = {}
    for name, file in (("same", same), ("other", other)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        file.rename(folders[name] / "model.safetensors")
        (folders[name] / "config.json").write_text(config.read_text())
    assert main(["verify", adapter, str(folders["same"])]) == 0
    assert "the one that the adapter was trained on, judging by samples of 6 tensors" in capsys.readouterr().out
    for command in (["verify", adapter, str(folders["other"])], ["merge", adapter, str(folders["other"]), out]):
        assert main(command) == 1
        assert "1 of 6 compared tensors differ" in capsys.readouterr().err
        assert not Path(out).exists()
        assert main([*command, "--any-base"]) == 0
        assert "no values were compared" in capsys.readouterr().out


def test_inspect_command_shows_fingerprint(adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", adapter]) == 0
    assert "of 6 tensors" in capsys.readouterr().out
    assert main(["inspect", adapter, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["base"]
    recorded = from_plain(found["tensors"])
    assert digest(recorded) == found["fingerprint"]
    assert {name.removeprefix("net."): each.values for name, each in recorded.items()} == {
        name: each.values for name, each in of(network()).items()
    }


def test_safetensors_metadata_holds_fingerprint(tmp_path: Path) -> None:
    _, module, _ = fitted(tmp_path)
    save_adapter(module, tmp_path / "peft")
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert len(file.metadata()["lightning_lora_base"]) < 2000


# --- cost


def test_fingerprint_allocates_nothing_of_tensor_size() -> None:
    model = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(6))
    model.append(nn.Conv2d(64, 64, 5, bias=False).to(memory_format=torch.channels_last))
    largest, weights = [0], {parameter.data_ptr() for parameter in model.parameters()}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.data_ptr() not in weights:
                    largest[0] = max(largest[0], tensor.numel())
            return result

    with Watch():
        found = of(model)
        assert refusal(model, found) is None
    assert len(found) == 7
    assert 0 < largest[0] < 100


# --- rows that were added at random


class Resized(Toy):
    """A vocabulary of which the last two rows are new, and random in every process."""

    def __init__(self, seed: int, *, tokens: int = 40) -> None:
        self.seed, self.tokens = seed, tokens
        super().__init__()

    def build(self) -> None:
        super().build()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(self.tokens, 8)
            torch.manual_seed(self.seed)
            with torch.no_grad():
                self.embed.weight[-2:].normal_()

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return super().loss([x + self.embed(torch.full((len(x),), self.tokens - 1)), y])


TARGETS: dict[str, Any] = {"rank": 2, "target_modules": ["net.*"]}
WAYS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "checkpoint": lambda module, path: load_adapter(module, path / "adapter.ckpt"),
    "directory": lambda module, path: load_adapter(module, path / "adapter"),
    "test": lambda module, path: trainer(LoRACallback()).test(module, loader(), path / "adapter.ckpt", verbose=False),
    "init_from": lambda module, path: trainer(LoRACallback(init_from=path / "adapter.ckpt", **TARGETS)).fit(
        module, loader()
    ),
}


def save_resized(path: Path, **options: Any) -> None:
    module = Resized(1)
    (run := trainer(LoRACallback(**TARGETS | options))).fit(module, loader())
    run.save_checkpoint(path / "adapter.ckpt")
    save_adapter(module, path / "adapter", export_root="")


@pytest.mark.parametrize("way", WAYS)
def test_last_rows_of_an_embedding_that_are_others_are_warned_of(way: str, tmp_path: Path) -> None:
    save_resized(tmp_path)
    with pytest.warns(UserWarning, match=r"last rows of embed\.weight are not those .*trainable_token_indices"):
        WAYS[way](Resized(2), tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_last_rows_that_are_the_same_or_trained_are_not_warned_of(way: str, tmp_path: Path) -> None:
    save_resized(tmp_path)
    WAYS[way](Resized(1), tmp_path)  # any warning would be an error


@pytest.mark.parametrize("way", ["checkpoint", "directory", "test"])
def test_last_rows_that_the_adapter_holds_are_not_warned_of(way: str, tmp_path: Path) -> None:
    save_resized(tmp_path, trainable_token_indices={"embed": [38, 39]})
    WAYS[way](Resized(2), tmp_path)
    save_resized(tmp_path / "full", modules_to_save=["embed"])
    WAYS[way](Resized(2), tmp_path / "full")


@pytest.mark.filterwarnings("default:The last rows")
@pytest.mark.parametrize("seed", [1, 2])
def test_verify_command_warns_of_other_last_rows(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_resized(tmp_path)
    base = base_file(Resized(seed), tmp_path / "base.safetensors")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "adapter.ckpt"), str(base)]) == 0
    said = capsys.readouterr()
    assert "samples of 7 tensors" in said.out
    assert ("The last rows of embed.weight are not those" in said.err) == (seed == 2)
