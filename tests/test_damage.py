"""Processes that are killed, files that are damaged, files that would run code: nothing wrong is ever loaded."""

from __future__ import annotations

import codecs
import errno
import os
import pickle
import random
import signal
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from lightning_lora import LoRACallback, adapter_state_dict, detach, load_adapter, lora_layers
from lightning_lora.state import describe
from lightning_lora.storage.checkpoint import RECORD_KEY
from tests.contract import raises_and_changes_nothing
from tests.distributed import killed_job
from tests.processes import Job
from tests.toys import Toy, digest, loader, network, trainer
from tests.trainer.test_checkpoints import assert_same_bits, fitted, read

# --- processes that are killed


def started(directory: Path, moment: str) -> Job:
    return Job(killed_job.__file__, directory, moment, TMPDIR=directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a run that nothing stopped."""
    directory = tmp_path_factory.mktemp("whole")
    killed_job.fit(directory)
    return read(directory / f"epoch={killed_job.EPOCHS - 1}.ckpt")


@pytest.mark.slow
@pytest.mark.usual_paths
@pytest.mark.parametrize(
    ("moment", "saved"),
    [("training", 2), ("half written", 2), ("written", 2), ("half moved", 2), ("committed", 2), ("moved", 3)],
)
def test_killed_run_resumes_from_last_complete_checkpoint(
    moment: str, saved: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    code, output = started(tmp_path, moment).finish()
    assert code == -signal.SIGKILL, output
    files = sorted(tmp_path.glob("*.ckpt"))
    assert [file.name for file in files] == [f"epoch={epoch}.ckpt" for epoch in range(saved)]
    for file in files:
        load_adapter(Toy(), file)  # each is whole
    module, run = killed_job.fit(tmp_path / "resumed", ckpt_path=str(files[-1]))
    assert run.global_step == killed_job.EPOCHS * killed_job.STEPS
    resumed = read(tmp_path / "resumed" / f"epoch={killed_job.EPOCHS - 1}.ckpt")
    for key in ("state_dict", "optimizer_states", "global_step", RECORD_KEY):
        assert_same_bits(resumed[key], whole[key])
    detach(module)
    assert digest(module.net) == digest(network())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("dead", [0, 1])
def test_dead_process_ends_others_within_timeout(dead: int, tmp_path: Path) -> None:
    code, output = started(tmp_path, f"rank{dead}").finish()
    assert code != 0, output
    survivor = int((tmp_path / f"pid{1 - dead}").read_text())
    for _ in range(10 * killed_job.PATIENCE):
        if not Path(f"/proc/{survivor}/cmdline").exists() or not Path(f"/proc/{survivor}/cmdline").read_bytes():
            break
        time.sleep(0.1)
    else:
        os.kill(survivor, signal.SIGKILL)
        pytest.fail("the other process goes on")
    for file in tmp_path.glob("*.ckpt"):
        load_adapter(Toy(), file)


# --- a disk that is full


@pytest.mark.parametrize("fails", ["opening", "writing", "flushing", "moving"])
def test_full_disk_leaves_old_checkpoint(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, module, path = fitted(tmp_path)
    before, files = Path(path).read_bytes(), sorted(tmp_path.iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def partial(self: Any, checkpoint: Any, place: Path, *args: Any, **kwargs: Any) -> None:
        Path(place).write_bytes(before[: len(before) // 2])
        full()

    if fails == "opening":
        monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", full)
    elif fails == "writing":
        monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", partial)
    elif fails == "flushing":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with torch.no_grad():
        for layer in lora_layers(module).values():
            layer.lora.B.add_(1.0)
    with pytest.raises(OSError, match="No space left"):
        run.save_checkpoint(path)
    monkeypatch.undo()
    assert Path(path).read_bytes() == before
    assert sorted(tmp_path.iterdir()) == files


# --- files that are damaged


def outcome(path: Path, good: dict[str, Any]) -> str:
    """Load an adapter's file into a base, and say what happened."""
    module = Toy()
    try:
        load_adapter(module, path)
    except ValueError:
        assert not lora_layers(module)
        assert digest(module.net) == digest(network())
        return "refused"
    except Exception as error:
        return f"{type(error).__name__} instead of a ValueError"
    same = describe(module) == good["record"] and list(adapter_state_dict(module)) == list(good["state"])
    same = same and all(torch.equal(value, good["state"][name]) for name, value in adapter_state_dict(module).items())
    return "unharmed" if same else "loaded something else without a word"


class Stands(Callback):
    """Keeps all that a resumed run starts with."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        moments = [{key: value.clone() for key, value in s.items()} for s in trainer.optimizers[0].state.values()]
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        state = {name: value.clone() for name, value in adapter_state_dict(module).items()}
        self.state: dict[str, Any] = {"state": state, "moments": moments, "step": trainer.global_step, "rates": rates}
        raise StopIteration


def resumed_outcome(path: Path, good: dict[str, Any]) -> str:
    """Resume training from a file, and say what happened."""
    module, stands = Toy(), Stands()
    try:
        trainer(LoRACallback(rank=4), stands, max_epochs=9, max_steps=-1).fit(module, loader(), ckpt_path=str(path))
    except StopIteration:
        pass
    except ValueError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__} instead of a ValueError"
    try:
        assert_same_bits(stands.state, good["resumed"])
    except AssertionError:
        return "loaded something else without a word"
    return "unharmed"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An undamaged file, and what it loads as."""
    _, _, path = fitted(tmp_path_factory.mktemp("good"))
    module, stands = Toy(), Stands()
    load_adapter(module, path)
    with pytest.raises(StopIteration):
        trainer(LoRACallback(rank=4), stands, max_epochs=9, max_steps=-1).fit(Toy(), loader(), ckpt_path=path)
    return {
        "bytes": Path(path).read_bytes(),
        "record": describe(module),
        "state": adapter_state_dict(module),
        "resumed": stands.state,
    }


Reader = Callable[[Path, dict[str, Any]], str]
each_reader = pytest.mark.parametrize(
    "reader", [outcome, pytest.param(resumed_outcome, marks=pytest.mark.slow)], ids=["load_adapter", "resume"]
)


def damaged(good: dict[str, Any], path: Path, reader: Reader, damages: dict[int, bytes]) -> dict[str, list[int]]:
    """Return what happened with each damaged file: outcome -> positions of the damage."""
    found: dict[str, list[int]] = {}
    for position, content in damages.items():
        path.write_bytes(content)
        found.setdefault(reader(path, good), []).append(position)
    return found


@each_reader
def test_intact_file_loads(reader: Reader, good: dict[str, Any], tmp_path: Path) -> None:
    assert damaged(good, tmp_path / "good.ckpt", reader, {0: good["bytes"]}) == {"unharmed": [0]}


@each_reader
def test_truncation_at_any_byte_is_refused(reader: Reader, good: dict[str, Any], tmp_path: Path) -> None:
    content = good["bytes"]
    cuts = {position: content[:position] for position in torch.linspace(0, len(content) - 1, 100).long().tolist()}
    found = damaged(good, tmp_path / "cut.ckpt", reader, cuts)
    assert found.keys() == {"refused"}, found


@each_reader
def test_flipped_bit_is_refused_or_harmless(reader: Reader, good: Any, tmp_path: Path) -> None:
    content, rng, flips = good["bytes"], random.Random(0), {}
    for position in torch.linspace(0, len(content) - 1, 400).long().tolist():
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        flips[position] = bytes(changed)
    found = damaged(good, tmp_path / "flipped.ckpt", reader, flips)
    assert found.keys() <= {"refused", "unharmed"}, Counter({key: len(value) for key, value in found.items()})
    assert len(found["refused"]) > 100


@each_reader
def test_flipped_bit_in_trained_tensor_is_refused(reader: Reader, good: Any, tmp_path: Path) -> None:
    content, flips = good["bytes"], {}
    for value in good["state"].values():
        stored = value.contiguous().numpy().tobytes()
        assert content.count(stored) == 1
        for offset in range(0, len(stored), len(stored) // 4):
            position = content.index(stored) + offset
            flips[position] = content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]
    found = damaged(good, tmp_path / "flipped.ckpt", reader, flips)
    assert found.keys() == {"refused"}, found


# --- files that would run code


class Runs:
    """Unpickles as whatever creating a folder returns."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


def in_the_record(content: dict[str, Any], code: Runs) -> None:
    content[RECORD_KEY]["adapters"][0]["config"]["rank"] = code


def in_the_state(content: dict[str, Any], code: Runs) -> None:
    content["state_dict"]["net.0.lora.A"] = code


def in_the_optimizer(content: dict[str, Any], code: Runs) -> None:
    content["optimizer_states"][0]["state"][0]["exp_avg"] = code


def in_the_callbacks(content: dict[str, Any], code: Runs) -> None:
    content["callbacks"]["LoRACallback"] = code


def zipped(content: Any, path: Path) -> None:
    torch.save(content, path)


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def pickled(content: Any, path: Path) -> None:
    plain = {key: value for key, value in content.items() if not isinstance(value, Tensor)}
    path.write_bytes(pickle.dumps(plain, protocol=2))


def in_the_hyper_parameters(content: dict[str, Any], code: Runs) -> None:
    content["hyper_parameters"] = {"path": code}


@pytest.mark.parametrize("save", [zipped, legacy, pickled])
@pytest.mark.parametrize(
    "hide", [in_the_record, in_the_state, in_the_optimizer, in_the_callbacks, in_the_hyper_parameters]
)
def test_malicious_pickle_never_runs(hide: Any, save: Any, tmp_path: Path) -> None:
    _, _, source = fitted(tmp_path)
    content, target, path = read(source), tmp_path / "ran", tmp_path / "evil.ckpt"
    hide(content, Runs(target))
    save(content, path)
    module = Toy()
    if save is zipped and hide not in (in_the_record, in_the_state):  # the adapter itself is whole
        load_adapter(module, path)
        assert_same_bits(adapter_state_dict(module), read(source)["state_dict"])
    else:
        with raises_and_changes_nothing(module, ValueError, "cannot be read|does not fit"):
            load_adapter(module, path)
    for stage in ("test", "fit"):
        with pytest.raises(ValueError, match=r"evil\.ckpt' cannot be read"):
            getattr(trainer(LoRACallback(rank=4), max_steps=20), stage)(module, loader(), ckpt_path=str(path))
    assert not target.exists()
    pickle.loads(pickle.dumps(Runs(target)))
    assert target.exists()  # it does run where nothing stops it


# Each leaves one object on the stack, after trying to change or to call something that lives on.
PROGRAMS = {
    "method of a module": b"cos\nmkdir\n(VTARGET\ntR",
    "code": b"cbuiltins\nexec\n(Vimport os; os.mkdir('TARGET')\ntR",
    "found by getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVmkdir\ntR(VTARGET\ntR",
    "import": b"clightning_lora_never_imported\nthing\n",
    "attribute of a known function": b"ctorch._utils\n_rebuild_tensor_v2\n(N}V__doc__\nVTARGET\nstb",
    "attribute of a known class": b"ccollections\nOrderedDict\n(N}Vpop\nNstb",
    "attribute of a parameter's class": b"ctorch.nn.parameter\nParameter\n(N}Vpop\nNstb",
    "an object that calls": b"ios\nmkdir\n",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_hostile_program_changes_nothing_outside_the_file(program: bytes, tmp_path: Path) -> None:
    _, _, source = fitted(tmp_path)
    content, target, path = read(source), tmp_path / "ran", tmp_path / "evil.ckpt"
    content["hyper_parameters"] = {"mark": "MARK"}
    torch.save(content, tmp_path / "marked.ckpt")
    marked = pickle.dumps("MARK", protocol=2)[2:-1].split(b"q")[0]
    hostile = program.replace(b"TARGET", str(target).encode())
    if program.startswith(b"ios"):  # the mark and the arguments come before the opcode
        hostile = b"(V" + str(target).encode() + b"\n" + hostile
    with zipfile.ZipFile(tmp_path / "marked.ckpt") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            held = old.read(name)
            assert not name.endswith("data.pkl") or held.count(marked) == 1
            new.writestr(name, held.replace(marked, hostile) if name.endswith("data.pkl") else held)
    kinds = (torch._utils._rebuild_tensor_v2, OrderedDict, torch.nn.Parameter)
    codecs.lookup("cp437")  # zipfile imports it at its first use
    before, modules = [dict(vars(kind)) for kind in kinds], set(sys.modules)
    with suppress(ValueError):
        load_adapter(Toy(), path)
    assert [dict(vars(kind)) for kind in kinds] == before
    assert torch._utils._rebuild_tensor_v2.__doc__ is None
    assert set(sys.modules) == modules
    assert not target.exists()
