"""Script of the processes in ``test_every_strategy.py``.

Arguments: the results directory, the number of processes, the directory of whole models, the checkpoint of a single
process, and the modes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lora import LoRACallback, attach, disabled, lora_layers
from lightning_lora.ops import linear as ops
from tests.distributed.cpu_fsdp import CPUFSDPStrategy, DoubleFSDPPrecision
from tests.toys import Toy, loader, network, trainer

LORA = {"rank": 4, "modules_to_save": ["net.4"]}
ON_META = ("fsdp1_policy", "fsdp1_wrapped", "fsdp2", "tp", "tp_fsdp2")
ON_WHOLE_MODELS = ("ddp", "fsdp1", "fsdp1_policy", "fsdp1_wrapped", "fsdp2", "tp", "tp_fsdp2")
PROBE = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)


class Wide(Toy):
    """Sees its share of the rows of every batch in float64; AdamW with two groups."""

    factor = 1.0  # of one weight of the base
    built_on = "cpu"

    def build(self) -> None:
        # In configure_model, the precision plugin changes the default dtype and with it the random weights.
        with torch.device(self.built_on), torch.no_grad(), float32_by_default():
            self.net = network(torch.float64)
            self.net[2].weight.mul_(self.factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rank, world = self.share()
        return super().training_step([part[rank::world].double() for part in batch], batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step([part.double() for part in batch], batch_idx)

    def share(self) -> tuple[int, int]:
        mesh = self.device_mesh
        if mesh is None:
            return self.global_rank, self.trainer.world_size
        return mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()

    def configure_optimizers(self) -> Any:
        first, second = self.net[0].parameters(), [*self.net[2].parameters(), *self.net[4].parameters()]
        groups = [{"params": list(first), "lr": 2e-2}, {"params": second}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Sharded(Wide):
    """Shards itself in ``configure_model``, as users of FSDP2 and tensor parallelism do."""

    def build(self) -> None: ...

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        super().build()
        if self.device_mesh["tensor_parallel"].size() > 1:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        attach(self)
        if self.device_mesh["data_parallel"].size() > 1:
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Undivided(Sharded):
    """Forgets to shard itself."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            super(Sharded, self).build()
            attach(self)


class ShardedInPart(Undivided):
    """Forgets some layers."""

    def configure_model(self) -> None:
        super().configure_model()
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class FullyShardedOnly(Undivided):
    """Forgets tensor parallelism."""

    def configure_model(self) -> None:
        super().configure_model()
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Wrapped(Wide):
    """Wraps layers in ``configure_model``, as users of FSDP do, except one, of which only the adapter is a unit."""

    def build(self) -> None: ...

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        super().build()
        attach(self)
        self.net[0], self.net[4] = wrap(self.net[0]), wrap(self.net[4])


class WideOnMeta(Wide):
    """Is built on the meta device; its weights come from ``reset_parameters``."""

    built_on = "meta"


class ShardedOnMeta(Sharded):
    """The same, but shards itself."""

    built_on = "meta"


class WrappedOnMeta(Wrapped):
    """The same, but wraps itself completely, because only units get memory."""

    built_on = "meta"

    def configure_model(self) -> None:
        super().configure_model()
        self.net = wrap(self.net)


def module_of(mode: str, on_meta: bool = False) -> Wide:
    if mode.startswith(("fsdp2", "tp")):
        return ShardedOnMeta() if on_meta else Sharded()
    if mode == "fsdp1_wrapped":
        return WrappedOnMeta() if on_meta else Wrapped()
    return WideOnMeta() if on_meta else Wide()


def strategy(mode: str, processes: int) -> Strategy | str:
    if mode == "single":
        return "auto"
    if mode == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if mode.startswith("fsdp1"):
        return CPUFSDPStrategy(
            state_dict_type="sharded" if "distributed" in mode else "full",
            auto_wrap_policy={nn.Linear} if "policy" in mode else None,
        )
    tensor_parallel = processes if mode == "tp" else 2 if mode == "tp_fsdp2" else 1
    return ModelParallelStrategy(
        data_parallel_size=processes // tensor_parallel,
        tensor_parallel_size=tensor_parallel,
        process_group_backend="gloo",
        save_distributed_checkpoint="distributed" in mode,
    )


@contextmanager
def float32_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


class Watch(Callback):
    """Counts the bytes gathered during a save, and records gradients and the frozen base."""

    def __init__(self) -> None:
        self.bytes_at_save: list[int] = []
        self.frozen_gradients = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        own = trainer.save_checkpoint

        def save(*args: Any, **kwargs: Any) -> None:
            with counted(functional=not isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy))) as count:
                own(*args, **kwargs)
            self.bytes_at_save.append(count[0])

        trainer.save_checkpoint = save

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        frozen = [p for p in pl_module.parameters() if not p.requires_grad]
        self.frozen_gradients += sum(p.grad is not None for p in frozen)


@contextmanager
def counted(*, functional: bool) -> Iterator[list[int]]:
    """Count the tensor bytes that each process receives, through DTensor or torch.distributed."""
    count = [0]
    places = [(dist, name) for name in ("all_gather", "all_gather_into_tensor", "all_reduce")]
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.comm.cdb is not None:
        places.append((deepspeed.comm.comm.cdb, "all_gather_function"))
    before = [getattr(*place) for place in places]
    gather_into = torch.ops._c10d_functional.all_gather_into_tensor

    def counting(function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            output = next(iter([*args, *kwargs.values()]))
            tensors = output if isinstance(output, list) else [output]
            count[0] += sum(tensor.nbytes for tensor in tensors)
            return function(*args, **kwargs)

        return counted

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is gather_into.default:
                count[0] += result.nbytes
            return result

    for place, function in zip(places, before, strict=True):
        setattr(*place, counting(function))
    try:
        with Mode() if functional else nullcontext():
            yield count
    finally:
        for place, function in zip(places, before, strict=True):
            setattr(*place, function)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


def exported(directory: Path, mode: str, name: str) -> Path:
    """Return the export folder of a run."""
    return directory / mode / name / "peft"


def run_of(mode: str, processes: int, *callbacks: Callback, nodes: int = 1, **options: Any) -> Trainer:
    return trainer(
        *callbacks,
        strategy=strategy(mode, processes),
        devices=processes // nodes,
        num_nodes=nodes,
        plugins=[DoubleFSDPPrecision()] if mode.startswith("fsdp1") else None,
        use_distributed_sampler=False,
        **options,
    )


def fit(
    directory: Path,
    name: str,
    mode: str,
    processes: int,
    epochs: int,
    ckpt_path: str | None = None,
    merge: bool = False,
    nodes: int = 1,
) -> dict[str, Any]:
    module = module_of(mode)
    watch, checkpoint = Watch(), ModelCheckpoint(directory / mode / name, save_last=True)
    run = run_of(
        mode,
        processes,
        LoRACallback(
            **LORA,
            merge_on_teardown=merge,
            diagnostics_every_n_steps=0 if mode.startswith("fsdp1") else 2,
            export_dir=str(exported(directory, mode, name)),
        ),
        *([] if merge else [checkpoint]),  # without one, the last state is exported
        watch,
        nodes=nodes,
        max_epochs=epochs,
        max_steps=-1,
        limit_val_batches=1,
    )
    # The validation comes last: FSDP2 leaves the outermost unit whole after a pass without gradients.
    run.fit(module, loader(16), loader(16), ckpt_path=ckpt_path)
    results = {
        "losses": module.losses,
        "last": checkpoint.last_model_path,
        "rank": module.global_rank,
        "bytes_at_save": watch.bytes_at_save,
        "frozen_gradients": watch.frozen_gradients,
        "adapters": len(lora_layers(module)),
        "metrics": {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("lora/")},
        "kinds": sorted({type(part).__name__ for part in module.modules()}),
    }
    with torch.no_grad():
        results["output"] = whole(run.strategy.model(PROBE))
    return results


def refused_on_another_base(directory: Path, mode: str, processes: int, checkpoint: str) -> str:
    """Return the error of resuming when one weight of the base differs."""
    Wide.factor = 1.5
    try:
        fit(directory, "other", mode, processes, 2, checkpoint)
    except ValueError as error:
        return str(error)
    finally:
        Wide.factor = 1.0
    return "nothing"


def said_of(module: Wide, **sizes: int) -> str:
    """Return the error or warning of a fit under a ModelParallelStrategy with these sizes."""
    run = trainer(
        LoRACallback(**LORA),
        strategy=ModelParallelStrategy(process_group_backend="gloo", **sizes),
        devices=dist.get_world_size(),
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run.fit(module, loader(16))
        except MisconfigurationException as error:
            return str(error)
    return "\n".join(text for each in caught if "LoRA" in (text := str(each.message)))


def said_of_all() -> dict[str, str]:
    """Return the messages for modules that forget to shard something."""
    if dist.get_world_size() == 4:
        return {"two kinds": said_of(FullyShardedOnly(), data_parallel_size=2, tensor_parallel_size=2)}
    return {
        "auto": said_of(Undivided()),
        "data parallel": said_of(Undivided(), data_parallel_size=2, tensor_parallel_size=1),
        "in part": said_of(ShardedInPart(), data_parallel_size=2, tensor_parallel_size=1),
        "all": said_of(FullyShardedOnly(), data_parallel_size=2, tensor_parallel_size=1),
    }


def evaluated(mode: str, processes: int, checkpoint: str) -> float:
    """Return the loss of a checkpoint, evaluated by a callback without options."""
    run = run_of(mode, processes, LoRACallback(), limit_val_batches=2)
    [found] = run.validate(module_of(mode), loader(16), ckpt_path=checkpoint, verbose=False)
    return found["val_loss"]


class Start(Callback):
    """Records the initial adapters, and the outputs with and without them."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.state = {name: t.clone() for name, t in trainer.strategy.lightning_module_state_dict().items()}
        with torch.no_grad():
            self.output = whole(trainer.strategy.model(PROBE))
            with disabled(pl_module):
                self.base_output = whole(trainer.strategy.model(PROBE))


def write_whole_models(directory: Path, make: type[Wide] = Wide) -> None:
    """Write checkpoints from before LoRA, one that fits and one that does not."""
    run, module = trainer(), make()
    run.strategy.connect(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    run.save_checkpoint(directory / "fits.ckpt")
    module.net[2] = nn.Linear(16, 17)
    run.save_checkpoint(directory / "misfit.ckpt")


def start_on_whole_models(mode: str, processes: int, files: Path) -> dict[str, Any]:
    """Train on a whole model's checkpoint, and record the error for one that does not fit."""
    run, refused = run_of(mode, processes, LoRACallback(**LORA)), "nothing"
    try:
        run.fit(module_of(mode), loader(16), ckpt_path=files / "misfit.ckpt")
    except ValueError as error:
        refused = str(error)
    with torch.no_grad():
        output = whole(run.strategy.model(PROBE))
    options = LORA | {"use_dora": "tp" not in mode}
    found = started(mode, processes, module_of(mode), options, files / "fits.ckpt")
    return found | {"refused": refused, "output of the refused": output}


def started(
    mode: str, processes: int, module: Wide, options: dict[str, Any], ckpt_path: Path | None = None
) -> dict[str, Any]:
    """Train a module, and also return its initial state."""
    start = Start()
    run = run_of(mode, processes, LoRACallback(**options), start)
    run.fit(module, loader(16), ckpt_path=ckpt_path)
    return {
        "losses": module.losses,
        "start": start.state,
        "output": start.output,
        "base_output": start.base_output,
        "end": run.strategy.lightning_module_state_dict(),
    }


def main() -> None:
    ops._FEW = 0  # take the fast path for small layers too
    warnings.simplefilter("ignore")
    directory, processes, files, single, *modes = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]
    results: dict[str, Any] = {}
    for mode in modes:
        results[mode] = {
            "whole": fit(directory, "whole", mode, processes, 2),
            "half": fit(directory, "half", mode, processes, 1),
            "from single": fit(directory, "from_single", mode, processes, 2, single),
            "merged": fit(directory, "merged", mode, processes, 2, merge=True),
        }
        results[mode]["other base"] = refused_on_another_base(directory, mode, processes, single)
        results[mode]["resumed"] = fit(directory, "resumed", mode, processes, 2, results[mode]["half"]["last"])
        results[mode]["evaluated"] = evaluated(mode, processes, single)
        if mode in ON_META:
            module = module_of(mode, on_meta=True)
            results[mode]["on meta"] = started(mode, processes, module, LORA, files / "fits.ckpt")
        if mode in ON_WHOLE_MODELS:
            results[mode]["on a whole model"] = start_on_whole_models(mode, processes, files)
    results["said"] = said_of_all()
    rank = results[modes[0]]["whole"]["rank"]
    torch.save(results, directory / f"rank{rank}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
