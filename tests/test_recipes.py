"""Run the code blocks of docs/recipes.md, section by section and unchanged, and check what the text promises."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    attach,
    detach,
    load_adapter,
    lora_layers,
    parameter_groups,
    using,
)
from tests.contract import assert_same_bits
from tests.toys import FEATURES, Toy, digest, loader, network, trainer

pytestmark = pytest.mark.filterwarnings("ignore:These adapters are not smaller.*")

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.M)}
CLASSES = 5


def blocks(title: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[title], flags=re.S)


def run(title: str, names: dict[str, Any]) -> None:
    for block in blocks(title):
        exec(block, names)


class LitModel(Toy):
    """Three pretrained layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class WithHead(LitModel):
    """Pretrained layers and a new head, smaller than the rank; the same each time."""

    def build(self) -> None:
        super().build()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head = nn.Linear(FEATURES, CLASSES)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, _ = batch
        return nn.functional.cross_entropy(self.head(self.net(x)), x[:, :CLASSES].argmax(1))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names that the page gives the reader, and make ``Trainer`` quiet."""
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}

    class QuietTrainer(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**(quiet | {"devices": 1} | options))

        def validate(self, *args: Any, **options: Any) -> Any:
            return super().validate(*args, **{"verbose": False} | options)

    monkeypatch.setattr("lightning.pytorch.Trainer", QuietTrainer)
    return {
        "LitModel": LitModel,
        "model": LitModel(),
        "x": torch.randn(2, FEATURES),
        "train_loader": loader(shuffle=True),
        "val_loader": loader(),
    }


def test_k_fold_scores_are_those_of_new_modules(names: dict[str, Any]) -> None:
    names["folds"] = [(loader(rows), loader(8)) for rows in (16, 24, 32)]
    folds, repeats = blocks("K-fold and repeated fits")
    exec(folds, names)
    scores = names["scores"]

    def score(train: Any, val: Any) -> float:
        run, module = names["Trainer"](max_epochs=3, callbacks=[LoRACallback(rank=8)]), LitModel()
        run.fit(module, train)
        return run.validate(module, val)[0]["val_loss"]

    assert scores == [score(*fold) for fold in names["folds"]]
    exec(repeats, names)
    expected = []
    for seed in (1, 2, 3):
        seed_everything(seed)
        expected.append(score(names["train_loader"], names["val_loader"]))
    assert scores[3:] == expected
    assert len(set(expected)) == 3


def test_two_tasks_share_a_base(names: dict[str, Any]) -> None:
    names["first_loader"] = loader()
    names["second_loader"] = DataLoader(TensorDataset(torch.randn(32, FEATURES), torch.randn(32, FEATURES)), 8)
    train, files = blocks("Two tasks on one base")
    exec(train, names)
    model, states = names["model"], {}
    for task in ("first", "second"):
        with using(model, task):
            states[task] = adapter_state_dict(model)
    assert_same_bits(adapter_state_dict(model), states["first"])
    assert not torch.equal(states["first"]["net.0.lora.B"], states["second"]["net.0.lora.B"])
    exec(files, names)
    for task, state in states.items():
        with using(model, task):
            assert_same_bits(adapter_state_dict(model), state)
    detach(model)
    assert digest(model) == digest(LitModel())


@pytest.mark.parametrize("block", [0, 1], ids=["named", "auto"])
def test_new_head_is_trained_in_full(block: int, names: dict[str, Any]) -> None:
    exec("\n".join(blocks("A new classification head")[: block + 1]), names)
    model, run = WithHead(), trainer(names["callback"])
    run.fit(model, names["train_loader"])
    run.save_checkpoint("adapter.ckpt")
    assert not torch.equal(model.head.weight, WithHead().head.weight)
    assert lora_layers(model).keys() == {"net.0", "net.2", "net.4"}
    again = WithHead()
    load_adapter(again, "adapter.ckpt")
    assert torch.equal(again.head.weight, model.head.weight)


def images() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(2, 3, 224, 224), torch.arange(2)), 2)


_OF_TORCHVISION = ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms")
_OF_TORCHVISION += (".transforms.functional", ".utils")


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return timm, whose models need nothing of the torchvision that it imports."""
    stand_ins = {f"torchvision{name}": MagicMock() for name in _OF_TORCHVISION}
    with patch.dict(sys.modules, stand_ins):
        module = pytest.importorskip("timm", reason="pip install --no-deps timm")
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_vision_models_of_timm(names: dict[str, Any], timm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make = timm.create_model

    def without_download(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        assert pretrained
        assert timm.is_model_pretrained(name)
        return make(name, pretrained=False, **options | ({"zero_init_last": False} if "resnet" in name else {}))

    monkeypatch.setattr(timm, "create_model", without_download)
    names["image_loader"] = images()
    vit, resnet, track = blocks("Vision: ResNet and ViT from timm")
    exec(vit, names)
    kinds = {name.rpartition(".")[2] for name in lora_layers(names["vit"])}
    assert kinds == {"qkv", "proj", "fc1", "fc2"}
    exec(resnet, names)
    model = names["resnet"]
    assert all(isinstance(layer, nn.Conv2d) for layer in lora_layers(model).values())
    assert model.net.bn1.running_mean.eq(0).all()  # where it starts
    assert "net.fc.weight" in adapter_state_dict(model)
    exec(track, names)
    other = names["Vision"]("resnet18.a1_in1k", classes=CLASSES)
    trainer(names["callback"]).fit(other, names["image_loader"])
    assert not other.net.bn1.running_mean.eq(0).any()
    assert "net.bn1.running_mean" in adapter_state_dict(other)
    assert not other.net.bn1.weight.requires_grad


def test_batchnorm_layers_train_in_full_by_glob(timm: ModuleType) -> None:
    model = nn.ModuleDict({"net": timm.create_model("resnet18", num_classes=CLASSES)})  # as in the recipe
    entries = re.search(r"`modules_to_save=(\[.*?\])`\.", SECTIONS["Vision: ResNet and ViT from timm"])
    assert entries is not None
    attach(model, LoRAConfig(rank=8, target_modules="all-conv", modules_to_save=eval(entries[1])))
    trained = {name for name, part in model.named_modules() if _trains_in_full(part)}
    assert trained == {"net.fc", *(name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d))}


def _trains_in_full(part: nn.Module) -> bool:
    return part.training and isinstance(part, (nn.Linear, nn.BatchNorm2d)) and part.weight.requires_grad


def language_model(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options))


def test_dpo_starts_at_ln_2_and_learns(names: dict[str, Any]) -> None:
    def answers() -> tuple[Tensor, Tensor]:
        return torch.randint(32, (4, 12)), (torch.arange(12) >= 6).float().expand(4, 12)

    chosen, rejected = answers(), answers()
    rows = [
        {"chosen": (chosen[0][i], chosen[1][i]), "rejected": (rejected[0][i], rejected[1][i])} for i in range(4)
    ] * 8
    names |= {"language_model": language_model(), "preference_loader": DataLoader(rows, 4)}
    assert names["language_model"].config.resid_pdrop > 0  # would move the loss
    base = digest(names["language_model"])
    losses: list[float] = []
    [block] = blocks("DPO with the base as reference")
    before, after = block.split("trainer.fit", 1)
    exec(before, names)
    step = names["DPO"].training_step

    def noted(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        return loss

    names["DPO"].training_step = noted
    exec("trainer.fit" + after, names)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 1e-3
    detach(names["dpo"])
    assert digest(names["language_model"]) == base


def test_fabric(names: dict[str, Any]) -> None:
    names["model"] = network()
    save, restore = blocks("Fabric")
    exec(save, names)
    saved = adapter_state_dict(names["tuned"])
    moments = names["optimizer"].state_dict()["state"][0]["exp_avg"].clone()
    fresh = dict(names) | {"model": network()}
    exec(save[: save.index("for inputs")], fresh)
    exec(restore, fresh)
    assert_same_bits(adapter_state_dict(fresh["tuned"]), saved)
    assert torch.equal(fresh["optimizer"].state_dict()["state"][0]["exp_avg"], moments)


def test_plain_loop(names: dict[str, Any]) -> None:
    names |= {"network": network(), "build_network": network}
    train, load = blocks("A plain PyTorch loop")
    exec(train, names)
    expected = names["network"](names["x"])
    assert not torch.allclose(expected, network()(names["x"]))
    exec(load, names)
    torch.testing.assert_close(names["loaded"](names["x"]), expected)
    assert type(names["loaded"][0]) is nn.Linear


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_to_peft_and_back(names: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    language_model().save_pretrained("base")
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(32, (16, 12))]
    names["text_loader"] = DataLoader(rows, 4)
    run("A transformers model, to PEFT and back", names)
    tokens = torch.randint(32, (3, 8))
    with torch.no_grad():
        here, there, again = (
            part.eval()(input_ids=tokens).logits
            for part in (names["text"].model, names["with_peft"], names["again"].model)
        )
        base = names["LitText"]().model(input_ids=tokens).logits
    assert not torch.allclose(here, base)
    torch.testing.assert_close(there, here)
    torch.testing.assert_close(again, here)


def first_step(rank: int, **options: Any) -> float:
    """Return by how much one step of Adam at a low rate lowers the loss of a network, on average over starts."""
    lowered = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(7)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)
        x = torch.randn(64, 64, generator=generator, dtype=torch.float64)
        attach(model, LoRAConfig(rank=rank, **options), seed=seed)
        optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-6))
        before = (model(x) - x.flip(1)).square().mean()
        before.backward()
        optimizer.step()
        lowered += (before - (model(x) - x.flip(1)).square().mean()).item()
    return lowered


def test_first_steps_are_as_in_the_table(names: dict[str, Any]) -> None:
    run("Rank and learning rate", names)
    assert [callback.config.rank for callback in names["callbacks"]] == [4, 16, 64]
    rows = re.findall(r"^\| `(.+)` \| (\S+) \| (\S+) \| (\S+) \|$", SECTIONS["Rank and learning rate"], flags=re.M)
    for options, *promised in rows:
        ranks = {rank: first_step(rank, **eval(f"dict({options})", {"rank": rank})) for rank in (4, 16, 64)}
        found = [lowered / ranks[16] for lowered in ranks.values()]
        assert found == pytest.approx([float(each) for each in promised], rel=0.1), options
    assert len(rows) == 3


def test_b_alone_trains_where_the_recipe_freezes_a(names: dict[str, Any]) -> None:
    run("Rank and learning rate", names)
    kind = type("TrainsB", (Toy,), {"configure_optimizers": names["configure_optimizers"]})
    attach(start := Toy(), LoRAConfig(rank=4))
    trainer(LoRACallback(rank=4)).fit(module := kind(), loader())
    for name, layer in lora_layers(module).items():
        assert torch.equal(layer.lora.A, lora_layers(start)[name].lora.A)
        assert layer.lora.B.any()


def test_remedies_run_when_it_does_not_learn(names: dict[str, Any]) -> None:
    names["train_loader"] = loader()
    run("When it does not learn", names)
    assert names["model"].losses[-1] < 0.01 * names["model"].losses[0]


class Ill(LitModel):
    """A model that does not learn, in one of several ways."""

    def __init__(self, lr: float = 1e-2, *, unused: bool = False, conv: bool = False, new: bool = False) -> None:
        super().__init__()
        self.lr = lr
        if new:  # a head beside a body with other values than those of new layers
            body = [nn.Linear(FEATURES, 64), nn.Linear(64, 64)]
            for layer in body:
                nn.init.normal_(layer.weight)
            self.net = nn.Sequential(*body, nn.Linear(64, FEATURES))
        self.spare = nn.Linear(FEATURES, FEATURES) if unused else None
        self.conv = nn.Conv1d(FEATURES, 8 * FEATURES, 3) if conv else None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


ILL: dict[str, tuple[Ill, dict[str, Any]]] = {
    "this run may learn little, or diverge": (Ill(1e-5), {}),
    "looks like one for full fine-tuning": (Ill(1e-5), {}),
    "of the weights that could carry one": (Ill(conv=True), {}),
    "no part of": (Ill(), {"rank": 16}),
    "look random": (Ill(new=True), {}),
    "No gradient reached the adapters of": (Ill(unused=True), {}),
    "No LoRA adapter was trained in": (Ill(0.0), {}),
    "Training diverged": (Ill(1e30), {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", ILL)
def test_messages_are_those_that_the_page_explains(message: str) -> None:
    module, options = ILL[message]
    fit = trainer(LoRACallback(**{"rank": 4} | options), max_steps=4).fit
    if message == "Training diverged":
        with pytest.raises(MisconfigurationException, match=message):
            fit(module, loader())
    else:
        with pytest.warns(UserWarning, match=message):
            fit(module, loader())


def test_page_explains_these_messages() -> None:
    assert re.findall(r"^   \| `(.+?)`", SECTIONS["When it does not learn"], flags=re.M) == list(ILL)


def test_every_recipe_is_tested_and_listed() -> None:
    titles = list(SECTIONS)[1:]
    tested = set(re.findall(r'(?:blocks|run)\("([^"]+)"', Path(__file__).read_text()))
    assert set(titles) <= tested
    listed = re.findall(r"^- \[(.+)\]\(#(.+)\)$", PAGE, flags=re.M)
    assert [title for title, _ in listed] == titles
    assert [anchor for _, anchor in listed] == [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


def test_links_resolve() -> None:
    folder = Path(__file__).parents[1] / "docs"
    missing = [link for link in re.findall(r"\]\(([\w./-]+\.\w+)(?:#[\w-]+)?\)", PAGE) if not (folder / link).exists()]
    assert not missing
