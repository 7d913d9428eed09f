"""Modules that wrap themselves for FSDP in ``configure_model``; that they train alike is in ``tests/distributed``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import FSDPPrecision
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, wrap

from lightning_lora import LoRACallback, attach, lora_layers
from lightning_lora.layers import Adapter
from tests.distributed.cpu_fsdp import CPUFSDPStrategy, add_cpu_events
from tests.toys import Toy, loader, network, trainer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`"),
]


@pytest.fixture
def process_group() -> Iterator[None]:
    add_cpu_events()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Wraps(Toy):
    """Wraps its first layer, and then all of itself."""

    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network(torch.get_default_dtype())
            self.attach()
            self.wrap()

    def attach(self) -> None:
        attach(self)

    def wrap(self) -> None:
        self.net[0] = wrap(self.net[0])
        self.net = wrap(self.net)


def run(module: Toy, *callbacks: Callback, policy: Any = None, **options: Any) -> Any:
    """Fit under FSDP and return the Trainer."""
    strategy = CPUFSDPStrategy(auto_wrap_policy=policy)
    found = trainer(*callbacks, strategy=strategy, use_distributed_sampler=False, **options)
    found.fit(module, loader())
    return found


def units(module: nn.Module) -> set[str]:
    named = {path.replace("_fsdp_wrapped_module.", ""): part for path, part in module.named_modules()}
    return {path for path, part in named.items() if isinstance(part, FullyShardedDataParallel)}


def test_adapters_become_units_in_all_layers() -> None:
    class InPart(Wraps):
        def wrap(self) -> None:
            self.net[0] = wrap(self.net[0])

    adapters = {f"net.{layer}.lora" for layer in (0, 2, 4)}
    for module, wrapped in ((Wraps(), {"net", "net.0"}), (InPart(), {"net.0"})):
        run(module, LoRACallback(rank=2))
        assert units(module) == adapters | wrapped
        assert all(isinstance(layer.lora.module, Adapter) for layer in lora_layers(module).values())


@pytest.mark.filterwarnings("ignore:A FSDP `auto_wrap_policy` is set")  # by the user: ours alone is taken back
def test_policy_applies_inside_wrapped_layers() -> None:
    class Once(Wraps):
        def wrap(self) -> None:
            self.net = wrap(self.net)

    module = Once()
    run(module, LoRACallback(rank=2), policy=ModuleWrapPolicy({nn.Linear}))
    assert units(module) == {"net"} | {f"net.{layer}{part}" for layer in (0, 2, 4) for part in ("", ".lora")}


@pytest.mark.filterwarnings("ignore:It is recommended to use")  # of a process group around a single device
def test_later_stages_match_one_process() -> None:
    modules = Toy(), Wraps()
    for module, strategy in zip(modules, ("auto", CPUFSDPStrategy()), strict=True):
        found = trainer(LoRACallback(rank=2), strategy=strategy, use_distributed_sampler=False)
        found.fit(module, loader())
        found.test(module, loader(), verbose=False)
        found.fit_loop.epoch_loop.max_steps = 4
        found.fit(module, loader())
    assert modules[1].losses == pytest.approx(modules[0].losses)
    assert len(set(modules[0].losses)) == 4


def test_init_from_under_fsdp(tmp_path: Path) -> None:
    single, module, checkpoint = Toy(), Wraps(), ModelCheckpoint(tmp_path)
    trainer(LoRACallback(rank=2), checkpoint).fit(single, loader())
    run(module, LoRACallback(rank=2, init_from=checkpoint.best_model_path), max_steps=1)
    with torch.no_grad():
        assert module.losses == pytest.approx([single.loss(next(iter(loader()))).item()])


@pytest.mark.filterwarnings("ignore:FSDP with `bf16-true` enables computation")
def test_factors_keep_their_dtype() -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            adapters = [layer.lora for layer in lora_layers(module).values()]
            self.seen = {p.dtype for adapter in adapters for p in adapter.parameters()}

    module, looks = Wraps(), Looks()
    run(module, LoRACallback(rank=2), looks, plugins=[FSDPPrecision("bf16-true")])
    assert looks.seen == {torch.float32}


# --- refusals


class WrapsFirst(Wraps):
    def attach(self) -> None: ...


class BuildsLater(Wraps):
    def wrap(self) -> None:
        self.net[0] = wrap(self.net[0])
        self.more = wrap(nn.Linear(8, 8))


class LeavesTrained(Wraps):
    def wrap(self) -> None:
        self.net[0], self.net[2] = wrap(self.net[0]), wrap(self.net[2])


class Constructs(Wraps):
    def wrap(self) -> None:
        self.net = FullyShardedDataParallel(self.net, device_id=torch.device("cpu"), use_orig_params=True)


class ConstructsToo(Wraps):
    def wrap(self) -> None:
        self.net[0] = wrap(self.net[0])
        self.net[2] = FullyShardedDataParallel(self.net[2], device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (WrapsFirst, RuntimeError, r"wraps parts of itself before it has adapters.*attach\(self\), then wrap"),
        (BuildsLater, MisconfigurationException, r"Added to BuildsLater after .*: more\.weight, more\.bias\."),
        (LeavesTrained, MisconfigurationException, r"^net\.4 would train without FSDP.*Wrap them too"),
        (Constructs, MisconfigurationException, r"was wrapped by FSDP\(\.\.\.\) itself.*then wrap\(\.\.\.\)"),
        (ConstructsToo, MisconfigurationException, r"adapters of net\.2 together with frozen weights.*use wrap\("),
    ],
)
def test_wrong_wrapping_is_refused_with_remedy(kind: type[Wraps], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(kind(), LoRACallback(rank=2, modules_to_save=["net.4"]))
