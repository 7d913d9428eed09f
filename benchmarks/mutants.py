"""Break the package on purpose, and count the random sequences until the checks of ``tests/fuzz.py`` see it.

``benchmarks/reliability.py --mutants 1000`` runs all of them, each in a process of its own on a changed copy of the
package, and ``found_after`` runs one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_lora"


class Mutant(NamedTuple):
    """A mistake, and the line that makes it.

    Attributes:
        mistake: What the package does wrong then.
        file: Path in the package.
        old: The right lines, which are there once.
        new: The wrong ones.
        test: A test that sees it, if the sequences do not.
    """

    mistake: str
    file: str
    old: str
    new: str
    test: str = ""


MUTANTS = [
    Mutant(
        "`merge` forgets the scaling",
        "layers/low_rank.py",
        "            total.addmm_(B, A, alpha=self.spec.scaling)\n",
        "            total.addmm_(B, A)\n",
    ),
    Mutant(
        "`merged` restores the weights by subtraction, which rounds",
        "modes.py",
        "            base_parameter(layer, name).copy_(original)\n",
        "            base_parameter(layer, name).sub_(base_parameter(layer, name) - original)\n",
    ),
    Mutant(
        "`disabled` leaves trained biases in place",
        "modes.py",
        'lambda _: "disabled"), _base_values(model):',
        'lambda _: "disabled"):',
    ),
    Mutant(
        "`scaled` does not go back",
        "modes.py",
        "    finally:\n        for adapter, spec in before:\n            adapter.spec = spec\n",
        "    finally:\n        pass\n",
    ),
    Mutant(
        "`detach` and `merge` leave the base frozen",
        "surgery.py",
        "            parameter.requires_grad_(root.attachment.required_grad.get(",
        "            bool(root.attachment.required_grad.get(",
    ),
    Mutant(
        "`detach` leaves an untied weight untied",
        "surgery.py",
        "        _tie_again(root)\n    _thaw(model, model.roots)\n",
        "    _thaw(model, model.roots)\n",
    ),
    Mutant(
        "loading skips the last tensor",
        "state.py",
        "        for name, tensor in model.trained.items():\n            if name not in grown:\n",
        "        for name, tensor in [*model.trained.items()][:-1]:\n            if name not in grown:\n",
    ),
    Mutant(
        "loading takes a state with tensors missing",
        "state.py",
        "    missing = [name for name in tensors if name not in state]\n",
        "    missing, state = [], {**tensors, **state}\n",
    ),
    Mutant(
        "`set_adapter` takes the other adapter's dropout along",
        "named_adapters.py",
        '            part._modules["lora"] = in_mode_of(part, place._modules.pop("lora"))\n',
        '            part._modules["lora"] = in_mode_of(part, place._modules.pop("lora"))\n'
        "            for other in _others(part).values():\n"
        '                for each in part.adapters().values() if "lora" in other._modules else ():\n'
        "                    if hasattr(other.lora, 'spec'):\n"
        "                        each.spec = each.spec._replace(dropout=other.lora.spec.dropout)\n",
    ),
    Mutant(
        "`set_adapter` leaves the head of the other adapter",
        "named_adapters.py",
        "        return [(table, key) for table in TABLES for key in vars(self)[table]]\n",
        '        return [(table, key) for table in TABLES for key in vars(self)[table] if key != "weight"]\n',
    ),
    Mutant(
        "`remove_adapter` leaves the factors on the layers",
        "named_adapters.py",
        "        del others[name]\n        if not others:\n            del part._modules[OTHERS]\n",
        "        pass\n",
    ),
    Mutant(
        "a refused call leaves a record",
        "named_adapters.py",
        "        if not had_record and several is not None",
        "        if had_record and several is not None",
    ),
    Mutant(
        "`combine` exchanges the weights",
        "several/combination.py",
        "weight for each, weight in weights.items()}\n    home",
        "weight for each, weight in zip(weights, [*weights.values()][::-1])}\n    home",
    ),
    Mutant(
        "`combine` sums heads without the base's share",
        "several/sum_as_adapter.py",
        "    return 0.0 if abs(rest) < _SMALLEST_REST else rest\n",
        "    return 0.0\n",
    ),
    Mutant(
        "`truncate_adapter` keeps the smallest singular values",
        "several/combination.py",
        "    A = [each.values[:rank].sqrt().unsqueeze(1) * each.V[:, :rank].T for each in found]\n"
        "    B = [each.U[:, :rank] * each.values[:rank].sqrt() for each in found]\n",
        "    A = [each.values[-rank:].sqrt().unsqueeze(1) * each.V[:, -rank:].T for each in found]\n"
        "    B = [each.U[:, -rank:] * each.values[-rank:].sqrt() for each in found]\n",
    ),
    Mutant(
        "`routed` gives samples back in the order of the adapters",
        "several/routing.py",
        "for group in self.groups]).argsort()\n",
        "for group in self.groups])\n",
    ),
    Mutant(
        "a copy shares its factors with the original",
        "layers/adapter.py",
        '    def __init__(self, module: nn.Module, spec: AdapterSpec, parameter: str = "weight") -> None:\n',
        "    def __deepcopy__(self, memo):\n        return self\n\n"
        '    def __init__(self, module: nn.Module, spec: AdapterSpec, parameter: str = "weight") -> None:\n',
    ),
    Mutant(
        "`alpha / rank` for rsLoRA, too",
        "config.py",
        "alpha / (math.sqrt(rank) if self.use_rslora else rank)",
        "alpha / rank",
    ),
    Mutant(
        "DoRA's norms leave out the product of weight and update",
        "layers/dora.py",
        "_squares(rows, A.dtype) + 2 * scaling * crossed + scaling**2 * update",
        "_squares(rows, A.dtype) + scaling**2 * update",
    ),
    Mutant(
        "frozen normalization layers move their statistics",
        "layers/norm.py",
        "        super().train(False)\n",
        "        super().train(mode)\n",
    ),
    Mutant(
        "`load_adapter` takes one scaling of a PEFT directory for all layers",
        "peft_format/importing.py",
        "* self.peft.scaling_of(target)\n",
        '* self.peft.scaling_of("")\n',
        test="tests/peft_format/test_roundtrip.py",
    ),
    Mutant(
        "a resumed fit forgets the state of the optimizer",
        "trainer/checkpoints.py",
        "self.layout.load_optimizer_state(optimizer,",
        "(optimizer,",
    ),
    Mutant(
        "a file saved before a merge loads after it",
        "loading.py",
        "    check_not_merged(module, file.merges, lambda: not check_base or has_base_values(module, file.base))\n",
        "    check_base = False\n",
        test="tests/test_state.py",
    ),
    Mutant(
        "`merge` refuses every layer with a bias of `B`",
        "modes.py",
        "    if layer._parameters.get(parameter) is None:\n",
        "    if layer._parameters.get(parameter) is None or parameter == 'bias':\n",
    ),
]


def mutated(mutant: Mutant, folder: Path) -> Path:
    """Write a copy of the package with the mistake into a folder; return the file that has it.

    Raises:
        ValueError: The lines to change are not there, or not once.
    """
    original = (ROOT / PACKAGE / mutant.file).read_text()
    if (count := original.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.mistake}: {mutant.file} has {mutant.old!r} {count} times, not once.")
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / PACKAGE / mutant.file
    path.write_text(original.replace(mutant.old, mutant.new))
    return path


def found_after(mutant: Mutant, most: int) -> dict[str, Any]:
    """Return how many sequences the checks needed to see a mistake, and in which step; None for both if they did not.

    Args:
        mutant: The mistake.
        most: The number of sequences to give up after.
    """
    with tempfile.TemporaryDirectory() as folder:
        mutated(mutant, Path(folder))
        search = os.pathsep.join([folder, str(ROOT)])
        command = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), "--first-failure", str(most)]
        run = subprocess.run(command, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{mutant.mistake}: the run failed.\n{run.stderr}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def section(results: dict[str, Any]) -> str:
    """Return the part of the page about the mistakes."""
    found = results["found"]
    seen = [each for each in found.values() if each["sequences"] is not None]
    tests = {mutant.mistake: mutant.test for mutant in MUTANTS}
    rows = [
        f"| {mistake} | {each['sequences'] or f'not seen; `{tests[mistake]}` does'} |"
        for mistake, each in found.items()
    ]
    table = "\n".join(["| mistake | sequences |", "| --- | --- |", *rows])
    return f"""\
[`benchmarks/mutants.py`](../benchmarks/mutants.py) breaks the package in {len(found)} ways, one at a time, and runs the
sequences of the first seeds until a check fails, at most {results["most"]}. The checks saw {len(seen)} of the mistakes,
after this many sequences:

{table}

Some were not seen at first. So the checks now also compare the dropout of every adapter, which weights layers share,
and what a sum holds in full; a removed adapter leaves nothing; a refusal that must come has to come, and one without
reason fails; a batch is long enough for mistakes in its order; and half of the new adapters have learned something."""
