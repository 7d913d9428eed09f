"""How strategies are prepared for adapters, and what they refuse; what they do is in ``tests/distributed``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy, size_based_auto_wrap_policy

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    attach,
    load_adapter,
    lora_layers,
)
from lightning_lora.layers import Adapter
from lightning_lora.optimizers import repair_optimizers
from lightning_lora.trainer.checkpoints import install_adapter_checkpoints
from lightning_lora.trainer.checks import GradientCheck
from lightning_lora.trainer.strategies import layout_of
from tests.contract import assert_same_bits
from tests.distributed.cpu_deepspeed import CPUDeepSpeedStrategy
from tests.distributed.cpu_fsdp import CPUFSDPStrategy, add_cpu_events
from tests.toys import Toy, loader, network, trainer


def test_unsupported_strategy_is_refused() -> None:
    class Odd(Strategy): ...

    Odd.__abstractmethods__ = frozenset()
    with pytest.raises(MisconfigurationException, match=r"not support Odd yet\. Supported are a single device and DDP"):
        install_adapter_checkpoints(Odd())


def test_spawn_launcher_is_refused() -> None:
    run = trainer(LoRACallback(rank=4), strategy="ddp_spawn", devices=2)
    module = Toy()
    with pytest.raises(MisconfigurationException, match="would exist only in the workers"):
        LoRACallback.setup(run.callbacks[0], run, module, "fit")
    assert not lora_layers(module)


def test_spawn_launcher_with_a_merge_is_refused() -> None:
    run, module = trainer(LoRACallback(rank=4, merge_on_teardown=True), strategy="ddp_spawn", devices=2), Toy()
    attach(module, LoRAConfig(rank=4))
    with pytest.raises(MisconfigurationException, match=r"keep its adapters, too. Call merge\(model\)"):
        LoRACallback.setup(run.callbacks[0], run, module, "fit")


@pytest.mark.parametrize("there", [["mine"], ["mine", "other"]])
def test_spawn_launcher_trains_only_the_active_one_of_several_adapters(there: list[str]) -> None:
    run, module = trainer(LoRACallback(adapter="other", rank=4), strategy="ddp_spawn", devices=2), Toy()
    for name in there:
        add_adapter(module, name, LoRAConfig(rank=4))
    with pytest.raises(MisconfigurationException, match=r"which is 'mine'.*call set_adapter\(model, 'other'\)"):
        LoRACallback.setup(run.callbacks[0], run, module, "fit")


@pytest.mark.distributed
@pytest.mark.parametrize("weights_only", [False, True])
def test_main_process_saves_what_forked_ones_have_trained(weights_only: bool, tmp_path: Path) -> None:
    module = Toy()
    attach(module, LoRAConfig(rank=4))
    run = trainer(LoRACallback(rank=4), strategy="ddp_fork", devices=2, max_steps=4)
    run.fit(module, loader())
    assert all(bool(layer.lora.B.any()) for layer in lora_layers(module).values())
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only=weights_only)
    loaded = Toy()
    load_adapter(loaded, tmp_path / "after.ckpt")
    assert_same_bits(adapter_state_dict(loaded), adapter_state_dict(module))


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (FSDPStrategy, "under FSDPStrategy a process holds flat slices"),
        (DeepSpeedStrategy, "DeepSpeed removes gradients as soon as they are computed"),
    ],
)
def test_rank_schedules_are_refused_where_components_cannot_be_seen(strategy: type[Strategy], reason: str) -> None:
    if strategy is DeepSpeedStrategy:
        pytest.importorskip("deepspeed")
        strategy = CPUDeepSpeedStrategy  # the same without a GPU
    with pytest.raises(MisconfigurationException, match=f"rank_schedule: {reason}.*call truncate_adapter"):
        layout_of(strategy()).check_fit(with_diagnostics=False, with_schedule=True)


# --- FSDP


def test_fsdp_without_use_orig_params_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"use_orig_params=True.*the adapters' parameters are lost"):
        layout_of(FSDPStrategy(use_orig_params=False))


class Attends(Toy):
    def build(self) -> None:
        self.attention = nn.MultiheadAttention(8, 2)


class Tied(Toy):
    def build(self) -> None:
        self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Attends, {"target_modules": ["attention"]}, "the weight itself must carry: attention, attention.out_proj"),
        (Tied, {"target_modules": [], "trainable_token_indices": [1]}, "tied layers share: head"),
    ],
)
def test_fsdp_refuses_adapters_read_by_other_layers(module: type[Toy], options: dict[str, Any], message: str) -> None:
    adapted = module()
    attach(adapted, LoRAConfig(rank=2, **options))
    with pytest.raises(MisconfigurationException, match=message):
        layout_of(FSDPStrategy()).attached(adapted)


@pytest.fixture
def process_group() -> Iterator[None]:
    add_cpu_events()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


POLICIES = {
    "none": (None, set()),
    "a set of classes": ({nn.Linear}, {"0", "2", "4"}),
    "ModuleWrapPolicy": (ModuleWrapPolicy({nn.Tanh}), {"1", "3"}),
    "CustomPolicy": (CustomPolicy(lambda module: isinstance(module, nn.Linear)), {"0", "2", "4"}),
    "a function": (lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, nn.Tanh), {"1", "3"}),
    "a size": (size_based_auto_wrap_policy, set()),
}


@pytest.mark.distributed
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", POLICIES)
def test_adapters_get_their_own_fsdp_units(name: str) -> None:
    policy, units = POLICIES[name]
    strategy = FSDPStrategy() if policy is None else FSDPStrategy(auto_wrap_policy=policy)
    for _ in range(2):  # a strategy may be prepared again
        layout_of(strategy)
    model = network()
    attach(model, LoRAConfig(rank=2))
    wrapped = FullyShardedDataParallel(model, device_id=model[0].weight.device, **strategy.kwargs)
    inside = {path.replace("_fsdp_wrapped_module.", "") for path, part in wrapped.named_modules() if _is_unit(part)}
    assert inside - {""} == units | {f"{layer}.lora" for layer in (0, 2, 4)}
    adapters = [part for part in wrapped.modules() if _is_unit(part) and isinstance(part.module, Adapter)]
    assert len(adapters) == 3


def _is_unit(module: nn.Module) -> bool:
    return isinstance(module, FullyShardedDataParallel)


@pytest.mark.distributed
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merge_under_fsdp_in_one_process(tmp_path: Path) -> None:
    modules = {"fsdp": Toy(), "single": Toy()}
    for name, module in modules.items():
        strategy = CPUFSDPStrategy(auto_wrap_policy={nn.Linear}) if name == "fsdp" else "auto"
        callback, options = LoRACallback(rank=2, merge_on_teardown=True), {"use_distributed_sampler": False}
        run = trainer(callback, strategy=strategy, root=tmp_path, **options)
        run.fit(module, loader())
    x = torch.ones(3, 8)
    assert not lora_layers(modules["fsdp"])
    with torch.no_grad():
        torch.testing.assert_close(modules["fsdp"].net(x), modules["single"].net(x))


# --- DeepSpeed

needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")


@pytest.mark.usefixtures("process_group")
def test_processes_agree_over_root_device() -> None:
    class OffloadedBase(Toy):
        def build(self) -> None:
            self.away = nn.Linear(2, 2, device="meta")  # stands for a device of which processes cannot tell each other
            super().build()

    module, strategy = OffloadedBase(), SingleDeviceStrategy()
    attach(module, LoRAConfig(rank=2, target_modules=["net.0", "net.2"]))
    strategy._lightning_module = module
    module.net[:1](torch.ones(1, 8, dtype=module.net[0].weight.dtype)).sum().backward()
    check = GradientCheck(module, layout_of(strategy))
    with pytest.warns(UserWarning, match=r"adapters of net\.2 in"):
        check.before_step(torch.optim.SGD(p for p in module.parameters() if p.requires_grad))
    assert check.untrained() == ["net.2"]


@needs_deepspeed
@pytest.mark.parametrize("options", [{"stage": 0}, {"zero_optimization": False}])
def test_deepspeed_without_zero_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"stages 1, 2 and 3, not in stage 0.*strategy='ddp'"):
        layout_of(DeepSpeedStrategy(**options))


@needs_deepspeed
def test_stage_3_refuses_adapters_read_by_other_layers() -> None:
    adapted = Attends()
    attach(adapted, LoRAConfig(rank=2, target_modules=["attention"]))
    layout_of(DeepSpeedStrategy(stage=2)).attached(adapted)
    with pytest.raises(
        MisconfigurationException, match=r"stage=3.*weight itself must carry: attention.*or use stage 2"
    ):
        layout_of(DeepSpeedStrategy(stage=3)).attached(adapted)


@needs_deepspeed
def test_deepspeed_config_optimizer_is_refused_for_fit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    callback = LoRACallback(rank=2, target_modules=["net.0"])
    run, module = trainer(callback, strategy=CPUDeepSpeedStrategy(config=config)), Toy()
    module.trainer = run
    callback.setup(run, module, "test")
    with pytest.raises(MisconfigurationException, match=r"'optimizer': .*'AdamW'.*return one from configure"):
        callback.setup(run, module, "fit")


@needs_deepspeed
def test_deepspeed_refuses_empty_groups() -> None:
    module = Toy()
    attach(module, LoRAConfig(rank=2, target_modules=["net.0"]))
    optimizer = torch.optim.AdamW([{"params": list(part.parameters())} for part in (module.net[0], module.net[2])])
    repair_optimizers(module, [optimizer])
    with pytest.raises(MisconfigurationException, match=r"1 of the 2 parameter groups .* hold frozen parameters only"):
        layout_of(DeepSpeedStrategy()).configured(module, [optimizer])


def test_divided_weight_is_not_untied() -> None:
    module = Tied()
    module.embed.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"untie_weights cannot copy .* ZeRO-3 has already sharded: head\.weight"):
        attach(module, LoRAConfig(rank=2, target_modules=["head"], untie_weights=True))
    assert module.head.weight is module.embed.weight
    assert not lora_layers(module)
