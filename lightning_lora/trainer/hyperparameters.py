"""The options of a fit as hyper-parameters of its loggers."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from lightning_lora.adapted_model import AdaptedModel


def log_options(trainer: Trainer, module: LightningModule) -> None:
    """Log the options as hyper-parameters, with what Lightning logs later: TensorBoard shows the first ones."""
    attached = [root.attachment for root in AdaptedModel(module).roots]
    config = attached[0].config
    always = {"rank": config.rank, "alpha": config.alpha, "target_modules": config.to_dict()["target_modules"]}
    count = sum(each.report.adapter_parameters for each in attached)
    ours = {f"lora/{name}": value for name, value in (always | config.changed() | {"parameters": count}).items()}
    parts = (module, getattr(trainer, "datamodule", None))
    shown = [part.hparams_initial for part in parts if part is not None and part._log_hyperparams]
    theirs = {name: value for each in shown for name, value in each.items() if name != "_class_path"}
    for logger in trainer.loggers:
        _log_hyperparams(logger, theirs | ours)


def _log_hyperparams(logger: Logger, values: dict[str, Any]) -> None:
    try:
        logger.log_hyperparams(values)
    except Exception as error:  # such as MLflow's, whose runs keep the first value: no reason not to train
        rank_zero_warn(
            f"LoRA: {type(logger).__name__} did not take the options as hyper-parameters ({error}). A logger of its "
            "own for each fit records them."
        )
