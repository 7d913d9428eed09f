"""What training changes and no checkpoint holds is named when saving, and refused when a resumed fit would lose it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig, add_adapter, attach, set_adapter
from lightning_lora.named_adapters import adapter_names
from tests.toys import FEATURES, Toy, loader, network, trainer

HOOKS = ["on_fit_start", "on_train_start", "training_step"]


class WithLateTeacher(Toy):
    """Makes a dense teacher in a hook; the teacher moves after every batch unless ``rate`` is 0."""

    def __init__(self, hook: str, rate: float = 0.1, value: float = 0.5) -> None:
        self.hook, self.rate, self.value = hook, rate, value
        super().__init__()

    def make(self, hook: str) -> None:
        if hook == self.hook and not hasattr(self, "teacher"):
            self.teacher = nn.Linear(FEATURES, FEATURES, bias=False).requires_grad_(False)
            nn.init.constant_(self.teacher.weight, self.value)

    def on_fit_start(self) -> None:
        self.make("on_fit_start")

    def on_train_start(self) -> None:
        self.make("on_train_start")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.make("training_step")
        return super().training_step(batch, batch_idx) + self.teacher(self.net(batch[0])).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.teacher.weight.data.mul_(1 - self.rate)


def fit(module: Toy, file: Path, *, resume: bool = False, steps: int = 2, **lora: Any) -> list[str]:
    """Fit and save; return the warnings."""
    run = trainer(LoRACallback(rank=2, **lora), max_steps=steps)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.fit(module, loader(), ckpt_path=str(file) if resume else None)
        for _ in range(2):
            run.save_checkpoint(file)
    return [str(each.message) for each in found if "LoRA:" in str(each.message)]


@pytest.mark.parametrize("hook", HOOKS)
def test_saving_names_once_a_module_that_came_late_and_moves(hook: str, tmp_path: Path):
    told = fit(WithLateTeacher(hook), tmp_path / "a.ckpt")
    assert len(told) == 1
    what = "added to the base" if hook == "training_step" else "changed the base"
    assert f"has {what} since training began: teacher.weight." in told[0]


def test_only_what_is_new_counts_as_added_where_a_fingerprint_looks_at_a_part_of_the_base(tmp_path: Path):
    class Deep(WithLateTeacher):
        def build(self) -> None:
            super().build()
            self.other = nn.ModuleList([nn.Linear(2, 2) for _ in range(80)]).requires_grad_(False)

    told = fit(Deep("training_step"), tmp_path / "a.ckpt", target_modules=["net.*"])
    assert ["other." in each for each in told] == [False]


@pytest.mark.parametrize("hook", HOOKS)
def test_resuming_refuses_a_late_module_that_begins_anew(hook: str, tmp_path: Path):
    fit(WithLateTeacher(hook), tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match=r"teacher\.weight.*__init__, setup or configure_model"):
        fit(WithLateTeacher(hook), tmp_path / "a.ckpt", resume=True, steps=4)


@pytest.mark.parametrize("hook", HOOKS)
def test_resuming_takes_a_late_module_that_is_the_same_again_or_any_if_asked_to(hook: str, tmp_path: Path):
    fit(WithLateTeacher(hook, rate=0), tmp_path / "a.ckpt")
    fit(WithLateTeacher(hook, rate=0), tmp_path / "a.ckpt", resume=True, steps=4)
    other = WithLateTeacher(hook, rate=0, value=0.25)
    fit(other, tmp_path / "a.ckpt", resume=True, steps=6, check_base=False)
    assert other.teacher.weight.unique().tolist() == [0.25]


def test_resuming_without_the_late_module_goes_on(tmp_path: Path):
    fit(WithLateTeacher("on_fit_start"), tmp_path / "a.ckpt")
    fit(Toy(), tmp_path / "a.ckpt", resume=True, steps=4)


# --- adapters beside the trained one


class WithTeacherAdapter(Toy):
    """Has a second adapter, which moves after every batch unless ``rate`` is 0."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        super().__init__()

    def setup(self, stage: str) -> None:
        if not adapter_names(self):
            for name in ("student", "teacher"):
                add_adapter(self, name, LoRAConfig(rank=2))
            set_adapter(self, "student")

    def on_train_batch_end(self, *_: Any) -> None:
        if self.rate:
            for name, tensor in self.named_parameters():
                if ".lora_others.teacher." in name:
                    tensor.data.add_(self.rate)


@pytest.mark.parametrize(("rate", "saved", "count"), [(0.1, "trained", 1), (0.1, "all", 0), (0.0, "trained", 0)])
def test_saving_names_once_another_adapter_that_has_moved_and_is_not_saved(
    rate: float, saved: str, count: int, tmp_path: Path
):
    told = fit(WithTeacherAdapter(rate), tmp_path / "a.ckpt", adapter="student", save_adapters=saved)
    assert len(told) == count
    assert all("the adapters 'teacher' since" in each and "save_adapters='all'" in each for each in told)


class WithMomentumTeacher(Toy):
    """Makes a teacher in ``setup``, as docs/layers.md says, and lets it follow the student."""

    def build(self) -> None:
        self.student = network()
        self.seen: list[Tensor] = []

    def setup(self, stage: str) -> None:
        attach(self)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((self.student(x) - y) ** 2).mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # before callbacks save
        super().optimizer_step(*args, **kwargs)
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.data.lerp_(student.data, 0.5)
        self.seen.append(self.student[0].lora.B.detach().clone())


def test_a_momentum_teacher_made_in_setup_follows_the_student_and_resumes(tmp_path: Path):
    options: dict[str, Any] = {"target_modules": ["student.0", "student.2"], "allow_untrained": ["teacher.*"]}
    whole, half, resumed = (WithMomentumTeacher() for _ in range(3))
    assert not fit(whole, tmp_path / "whole.ckpt", steps=8, **options)
    expected = torch.zeros_like(whole.seen[0])
    for B in whole.seen:
        expected = expected.lerp(B, 0.5)
    assert torch.equal(whole.teacher[0].lora.B, expected)
    assert torch.equal(whole.teacher[0].weight, whole.student[0].weight)
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    trainer(LoRACallback(rank=2, **options), saved, max_steps=4).fit(half, loader())
    fit(resumed, Path(saved.best_model_path), resume=True, steps=8, **options)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
