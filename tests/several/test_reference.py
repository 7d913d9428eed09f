"""A frozen adapter, or the base, as the reference of preference optimization (DPO), on a language model."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lightning_lora import LoRAConfig, adapter_state_dict, add_adapter, parameter_groups, using
from tests.contract import assert_same_bits, learn

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

TOKENS, LENGTH, PAIRS, STEPS = 32, 10, 4, 20


def language_model(*, is_checkpointed: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=TOKENS, **sizes)).train()
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def log_prob(model: nn.Module, answers: Tensor) -> Tensor:
    logits = model(input_ids=answers, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, answers[:, 1:, None]).sum((1, 2))


def margin(model: nn.Module, pairs: Tensor) -> Tensor:
    return log_prob(model, pairs[0]) - log_prob(model, pairs[1])


def loss_of(policy: Tensor, reference: Tensor) -> Tensor:
    return -logsigmoid(0.1 * (policy - reference)).mean()


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    with using(model, name):
        return adapter_state_dict(model)


@pytest.mark.parametrize("reference", ["sft", None])
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, nullcontext], ids=["without a graph", "with a graph"])
def test_twenty_steps_move_the_policy_alone(reference: str | None, is_checkpointed: bool, context: Any):
    model = language_model(is_checkpointed=is_checkpointed)
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapter(model, "policy", LoRAConfig(rank=2, modules_to_save=["lm_head"]))
    if reference is not None:
        learn(model, 1)
        add_adapter(model, reference, adapter_state_dict(model))
    start, at_first = copy.deepcopy(model), state(model, "policy")
    pairs = torch.randint(TOKENS, (2, PAIRS, LENGTH), generator=torch.Generator().manual_seed(2))
    optimizer, losses = torch.optim.AdamW(parameter_groups(model, lr=1e-2)), []
    for _ in range(STEPS):
        policy = margin(model, pairs)
        with context(), using(model, reference):
            compared = margin(model, pairs)
        loss = loss_of(policy, compared)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            expected = loss_of(policy, margin(start, pairs))  # a whole second model, which nothing trains
        torch.testing.assert_close(loss, expected)
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses[-1] < losses[0] / 2
    if reference is not None:
        assert_same_bits(state(model, reference), at_first)
    with using(model, None):
        assert_same_bits({name: value for name, value in model.state_dict().items() if "lora" not in name}, untouched)
    moved = {name for name, value in state(model, "policy").items() if not torch.equal(value, at_first[name])}
    assert moved == at_first.keys()


def test_gradients_with_checkpointing_are_those_beside_a_second_model():
    found: list[list[Tensor | None]] = []
    for is_checkpointed in (False, True):
        model = language_model(is_checkpointed=is_checkpointed)
        for seed, name in enumerate(("policy", "sft")):
            add_adapter(model, name, LoRAConfig(rank=2, modules_to_save=["lm_head"]), seed=seed)
            with using(model, name):
                learn(model, seed)
        pairs = torch.randint(TOKENS, (2, PAIRS, LENGTH), generator=torch.Generator().manual_seed(2))
        other = model if is_checkpointed else copy.deepcopy(model)
        policy = margin(model, pairs)
        with using(other, "sft"):
            compared = margin(other, pairs)
        loss_of(policy, compared).backward()
        found.append(gradients(model, "policy") + gradients(other, "sft"))
    torch.testing.assert_close(*found)


def gradients(model: nn.Module, name: str) -> list[Tensor | None]:
    with using(model, name):
        return [parameter.grad for group in parameter_groups(model, 1.0) for parameter in group["params"]]
