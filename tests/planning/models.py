"""Short ways to attach, and a model with tied weights."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_lora import AttachReport, LoRAConfig, attach, lora_layers


def report(model: nn.Module, **options: object) -> AttachReport:
    return attach(model, LoRAConfig(**{"rank": 2, **options}))


def reached(model: nn.Module, **options: object) -> list[str]:
    attach(model, LoRAConfig(**{"rank": 2, **options}))
    return list(lora_layers(model))


class TiedModel(nn.Module):
    """A language model's usual tie of output to input embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(tokens)))
