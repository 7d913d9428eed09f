"""What saving costs does not depend on the base: counted exactly, in bytes that operations read or make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora import LoRACallback, attach
from tests.distributed.cpu_fsdp import CPUFSDPStrategy, add_cpu_events
from tests.toys import Toy, loader, network, trainer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`"),
    pytest.mark.filterwarnings("ignore:LoRA. this run may learn little"),
]


def model_parallel() -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo", save_distributed_checkpoint=False
    )


STRATEGIES: dict[str, Callable[[], Strategy | str]] = {
    "single": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp": CPUFSDPStrategy,
    "fsdp2": model_parallel,
    "tensor parallel": model_parallel,
    "fsdp2, tensor parallel": model_parallel,
}


PICKING = (torch.ops.aten.take.default, torch.ops.aten.index.Tensor, torch.ops.aten.searchsorted.Tensor)


class Loaded(Toy):
    """Carries a frozen base of any size beside the layers that are adapted."""

    def __init__(self, width: int, layers: int, strategy: str) -> None:
        self.size, self.divided_by = (width, layers), strategy
        super().__init__()

    def build(self) -> None:
        width, layers = self.size
        self.net = network()
        self.base = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def configure_model(self) -> None:
        if "tensor parallel" in self.divided_by:
            mesh = self.device_mesh["tensor_parallel"]
            parallelize_module(self.net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
            parallelize_module(self.base, mesh, {"*": ColwiseParallel()})
        if STRATEGIES[self.divided_by] is model_parallel:
            attach(self)
        if "fsdp2" in self.divided_by:
            for part in (self.net, *self.base):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Work(TorchDispatchMode):
    """Adds up the bytes of tensors that operations read or make, but for views and for elements that are picked out."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            touched = [result] if function in PICKING else [args, kwargs, result]
            self.bytes += sum(each.nbytes for each in tree_leaves(touched) if isinstance(each, Tensor))
        return result


def work_of_saving(module: Loaded, path: Path) -> int:
    options = {"target_modules": ["net.0", "net.2"], "modules_to_save": ["net.4"]}
    strategy = STRATEGIES[module.divided_by]()
    run = trainer(LoRACallback(rank=2, **options), strategy=strategy, use_distributed_sampler=False)
    run.fit(module, loader())
    with Work() as work:
        run.save_checkpoint(path)
    return work.bytes


@pytest.fixture
def process_group(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.getfixturevalue("strategy") == "single":
        yield
        return
    add_cpu_events()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saving_work_does_not_depend_on_base(strategy: str, tmp_path: Path) -> None:
    small, large = Loaded(8, 80, strategy), Loaded(128, 160, strategy)
    done = [work_of_saving(module, tmp_path / "a.ckpt") for module in (small, large)]
    # Which rows and columns a process holds is counted once for each shape: some vectors of int64.
    spare = 8 * 8 * (128 - 8) if STRATEGIES[strategy] is model_parallel else 0
    assert 0 < done[0] <= done[1] <= done[0] + spare
    assert sum(parameter.nbytes for parameter in large.base.parameters()) > 1000 * spare
