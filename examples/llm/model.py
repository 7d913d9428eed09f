"""A causal language model that shards itself with FSDP2, so that no GPU ever holds the whole base."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

import lightning_lora

# A Llama small enough for a laptop, with random weights. Its 256 tokens are bytes.
TOY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "initializer_range": 0.15,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


class CausalLM(LightningModule):
    """A transformers model with its decoder layers in ``model.layers``: Llama, Mistral, Qwen, Gemma and others.

    Args:
        pretrained: A folder or a name on the Hugging Face Hub; ``toy`` for a small random Llama.
        learning_rate: Learning rate after the warm-up; constant from then on.
        warmup_steps: Steps of the warm-up.
        checkpointing: Recompute each layer's activations in backward instead of keeping them.
    """

    def __init__(
        self,
        pretrained: str = "toy",
        learning_rate: float = 1e-3,
        warmup_steps: int = 10,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # export.py builds the base from them
        self.net: Any = None

    def build(self) -> None:
        """Build the whole base model on the host. Checkpoints hold only the adapter, never the base."""
        if self.hparams.pretrained == "toy":
            with torch.random.fork_rng():
                torch.manual_seed(0)  # the same base in every process and every run
                self.net = AutoModelForCausalLM.from_config(LlamaConfig(**TOY))
        else:  # the default dtype follows the Trainer's `precision`
            self.net = AutoModelForCausalLM.from_pretrained(self.hparams.pretrained, dtype=torch.get_default_dtype())
        self.net.train()  # from_pretrained returns eval mode, and Lightning keeps modes
        if self.hparams.checkpointing:
            self.net.gradient_checkpointing_enable({"use_reentrant": False})

    def configure_model(self) -> None:
        if self.net is not None:
            return  # Lightning calls this for every stage
        self.build()
        lightning_lora.attach(self)  # before fully_shard; takes the options of the Trainer's LoRACallback
        if self.device_mesh is None:
            return  # one device: nothing to shard
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.model.layers:  # the units, gathered one after another
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)  # the rest: embeddings, final norm, output head

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, vocabulary)
        return self.net(input_ids=tokens, use_cache=False).logits

    def training_step(self, tokens: Tensor) -> Tensor:
        loss = self.next_token_loss(tokens)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, tokens: Tensor) -> None:
        self.log("val_loss", self.next_token_loss(tokens), prog_bar=True, sync_dist=True)

    def next_token_loss(self, tokens: Tensor) -> Tensor:
        logits = self(tokens[:, :-1]).float()  # bfloat16 is too coarse for a sum over the vocabulary
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> dict[str, Any]:
        # All parameters, as without LoRA: the callback keeps those that train.
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.0)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=self.hparams.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}
