"""Script of the processes in ``test_deepspeed.py``.

Arguments: the results directory, which contains checkpoints of whole models, and the checkpoint of a single process.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRACallback, lora_layers
from lightning_lora.ops import linear as ops
from lightning_lora.sharding import gathered
from tests.distributed.strategy_job import LORA, PROBE, Watch, Wide, exported
from tests.toys import Toy, loader, network, trainer

MODES = ("1", "2", "3", "3 built late")  # ZeRO's stage; built late: in configure_model, sharded at once


class Single(Wide):
    """The model of the other strategies in float32, as DeepSpeed requires."""

    def build(self) -> None:
        with torch.device(self.built_on):
            self.net = network()
        with torch.no_grad(), gathered([self.net[2].weight], to_write=True):
            self.net[2].weight.mul_(self.factor)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rank, world = self.global_rank, self.trainer.world_size
        return Toy.training_step(self, [part[rank::world] for part in batch], batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)


class Late(Single):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            super().build()


class OnMeta(Single):
    built_on = "meta"


class LateOnMeta(Late):
    """Is built in ``configure_model``, where stage 3 allocates and shards each layer."""

    built_on = "meta"


class Kinds(Single):
    """One layer of each kind that stage 3 can train, built in ``configure_model``."""

    OPTIONS = {
        "target_modules": ["first", "conv"],
        "target_slices": {"second": {"a": "0:4", "b": "6:12"}},
        "trainable_token_indices": {"embed": [3, 7]},
        "use_dora": True,
        "bias": "all",
        "rank": 2,
    }

    def build(self) -> None: ...

    def configure_model(self) -> None:
        if hasattr(self, "embed"):
            return
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.embed, self.conv = nn.Embedding(20, 8), nn.Conv1d(12, 8, 1)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 12)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        tokens = (10 * x).long().abs() % 20  # (rows, 8)
        hidden = self.second(self.first(self.embed(tokens)).tanh())
        return ((self.conv(hidden.mT).mean(-1) - y) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Attends(Single):
    """Has a layer whose weight carries the update."""

    OPTIONS = {"target_modules": ["attention", "net.4"], "rank": 2, "init": "olora"}

    def build(self) -> None:
        super().build()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        attended, _ = self.attention(*[x.unsqueeze(1).expand(-1, 3, -1) * x.new_tensor([[1.0], [2.0], [3.0]])] * 3)
        return ((self.net(attended.mean(1)) - y) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Idle(Single):
    """Has a layer that it does not use."""

    def build(self) -> None:
        super().build()
        self.idle = nn.Linear(8, 8)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def strategy(mode: str) -> Any:
    if mode == "single":
        return "auto"
    from tests.distributed.cpu_deepspeed import CPUDeepSpeedStrategy

    found = CPUDeepSpeedStrategy(stage=int(mode[0]), offload_optimizer="offloaded" in mode)
    if "offloaded" in mode:
        found.config["zero_force_ds_cpu_optimizer"] = False  # otherwise DeepSpeed compiles its own Adam first
    return found


def fit(
    directory: Path,
    name: str,
    mode: str,
    epochs: int,
    ckpt_path: str | None = None,
    module: Single | None = None,
    keeps: bool = True,
    options: dict[str, Any] = LORA,
    processes: int = 2,
    nodes: int = 1,
    **more: Any,
) -> dict[str, Any]:
    module = module or (Late() if "late" in mode else Single())
    watch, checkpoint = Watch(), ModelCheckpoint(directory / mode / name, save_last=True)
    run = trainer(
        LoRACallback(
            **options, export_dir=None if "target_modules" in options else str(exported(directory, mode, name))
        ),
        *([checkpoint] if keeps else []),  # without one, the last state is exported
        watch,
        max_epochs=epochs,
        max_steps=-1,
        strategy=strategy(mode),
        devices=1 if mode == "single" else processes // nodes,
        num_nodes=nodes,
        use_distributed_sampler=False,
        **more,
    )
    run.fit(module, loader(16), ckpt_path=ckpt_path)
    found = {
        "losses": module.losses,
        "last": checkpoint.last_model_path,
        "rank": module.global_rank,
        "bytes_at_save": watch.bytes_at_save,
        "frozen_gradients": watch.frozen_gradients,
        "adapters": len(lora_layers(module)),
    }
    if hasattr(module, "net"):
        with torch.no_grad():
            found["output"] = run.strategy.model(PROBE.to(module.net[0].weight.dtype)).float()
    return found


def validation_loss(mode: str, ckpt_path: str) -> float:
    """Return the loss of a checkpoint, evaluated by a callback without options."""
    run = trainer(LoRACallback(), strategy=strategy(mode), devices=1 if mode == "single" else 2, limit_val_batches=2)
    [result] = run.validate(Late() if "late" in mode else Single(), loader(16), ckpt_path=ckpt_path, verbose=False)
    return result["val_loss"]


def write_whole_models(directory: Path) -> None:
    """Write checkpoints from before LoRA; one has wrong shapes."""
    wider = Single()
    wider.net[2] = nn.Linear(16, 17)
    for name, module in {"net": Single(), "wider": wider, "kinds": Kinds()}.items():
        run = trainer()
        run.strategy.connect(module)
        module.configure_model()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        run.save_checkpoint(directory / f"{name}.ckpt")


def on_whole_models(directory: Path, mode: str) -> dict[str, Any]:
    """Train on the weights of a ``ckpt_path``."""
    module = LateOnMeta() if "late" in mode else None
    found = {"net": fit(directory, "on_net", mode, 1, str(directory / "net.ckpt"), module=module)}
    if mode in ("single", "3"):
        module = Kinds()
        found["kinds"] = fit(
            directory, "on_kinds", mode, 1, str(directory / "kinds.ckpt"), module=module, options=module.OPTIONS
        )
    return found


def refused(directory: Path, mode: str, checkpoint: str | None, module: Single | None = None) -> str:
    """Return the error of a fit."""
    try:
        fit(directory, "other", mode, 2, checkpoint, module=module)
    except (ValueError, MisconfigurationException, NotImplementedError) as error:
        return f"{error}\n{error.__context__}"  # Lightning then moves the module to the CPU, which fails on meta
    return "nothing"


def refused_on_another_base(directory: Path, mode: str, checkpoint: str) -> str:
    """Return the error of resuming when one weight of the base differs."""
    Wide.factor = 1.5
    try:
        return refused(directory, mode, checkpoint)
    finally:
        Wide.factor = 1.0


def warned(directory: Path) -> list[str]:
    """Return the error for a layer that receives no gradient."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(directory, "idle", "2", 1, module=Idle(), options={"rank": 2})
    return [str(each.message) for each in caught]


def main() -> None:
    ops._FEW = 0  # take the fast path for small layers too
    warnings.simplefilter("ignore")
    directory, single = Path(sys.argv[1]), sys.argv[2]
    merging = LORA | {"merge_on_teardown": True}
    results: dict[str, Any] = {}
    for mode in MODES:
        results[mode] = {
            "whole": fit(directory, "whole", mode, 2, options=merging),
            "half": fit(directory, "half", mode, 1),
            "from single": fit(directory, "from_single", mode, 2, single, keeps=False),
        }
        results[mode]["resumed"] = fit(directory, "resumed", mode, 2, results[mode]["half"]["last"], options=merging)
        results[mode]["other base"] = refused_on_another_base(directory, mode, single)
        results[mode]["whole models"] = on_whole_models(directory, mode)
        results[mode]["validation"] = validation_loss(mode, single)
    results["on meta"] = [refused(directory, mode, None, OnMeta()) for mode in ("2", "3")]
    results["misfit"] = refused(directory, "3", str(directory / "wider.ckpt"))
    results["kinds"] = fit(directory, "kinds", "3", 2, module=Kinds(), options=Kinds.OPTIONS)
    results["attention"] = fit(directory, "attention", "2", 2, module=Attends(), options=Attends.OPTIONS)
    results["warned"] = warned(directory)
    for mode in ("2", "3"):
        offloaded = f"{mode} offloaded"
        results[offloaded] = {
            "whole": fit(directory, "whole", offloaded, 2),
            "resumed": fit(directory, "resumed", offloaded, 2, results[mode]["half"]["last"]),
        }
    for mode in ("2", "3 built late"):
        half = fit(directory, "bf16_half", mode, 1, precision="bf16-mixed")
        results[mode]["bf16"] = {
            "whole": fit(directory, "bf16_whole", mode, 2, precision="bf16-mixed"),
            "resumed": fit(directory, "bf16_resumed", mode, 2, half["last"], precision="bf16-mixed"),
        }
    torch.save(results, directory / f"rank{results['1']['whole']['rank']}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
