"""The table and the picture of ``digits.py``. Nothing about LoRA itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch.utils.data import TensorDataset

RIGHT, WRONG, INK = "#1a7f4b", "#c8352b", "#22303c"
COLORS = {"old": "#9fb4c7", "new": "#2f6db5"}
LAYERS = ("q", "k", "v", "proj", "fc1", "fc2")


# --- the table


def print_report(results: dict[str, Any]) -> None:
    head = ("", "old domain", "new domain", "trainable", "checkpoint bytes", "step (median)")
    rows = [head, *(_cells(row) for row in results["table"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for number, row in enumerate(rows):
        print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
        if number == 0:
            print("  ".join("-" * width for width in widths))
    merged = results["merged"]
    print("\nTwo adapters on one base:")
    for name, scores in results["swaps"].items():
        print(
            f"  {name + ' adapter':16}  shifted digits {scores['shifted']:6.1%}   odd or even {scores['parity']:6.1%}"
        )
    routed = results["routed"]
    print(
        f"  one batch of {routed['images']} images of both tasks: {routed['accuracy']:.1%} right; logits differ by at "
        f"most {routed['largest_difference']:.0e} from those of one task at a time"
    )
    print(f"  logits after each swap equal those after training, bit for bit: {_yes(results['swap_is_exact'])}")
    print(f"Detached: logits equal those of the base, bit for bit: {_yes(results['detach_is_exact'])}")
    print(
        f"Merged: {merged['accuracy']:.1%} on the new domain with {merged['lora_layers']} LoRA layers left; "
        f"logits differ by at most {merged['largest_difference']:.0e}"
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    step = "-" if row["step_ms"] is None else f"{row['step_ms']:.1f} ms"
    return (row["method"], f"{row['old']:.1%}", f"{row['new']:.1%}", f"{row['trainable']:,}", f"{row['bytes']:,}", step)


def _yes(fact: bool) -> str:
    return "yes" if fact else "NO"


# --- the picture


def draw(results: dict[str, Any], clean: TensorDataset, shifted: TensorDataset, path: Path) -> None:
    """Draw digits with answers on top, accuracies and update sizes below."""
    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#8a98a5"})
    figure = plt.figure(figsize=(12.5, 9.6), dpi=130, facecolor="white")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    _draw_digits(top, results["answers"], clean, shifted)
    left, right = bottom.subplots(1, 2, width_ratios=(1.25, 1))
    bottom.subplots_adjust(left=0.065, right=0.955, bottom=0.14, top=0.82, wspace=0.24)
    _draw_accuracies(left, results["table"])
    _draw_updates(right, bottom, results["updates"])
    figure.savefig(path)
    plt.close(figure)


def _draw_digits(
    figure: SubFigure, answers: dict[str, list[int]], clean: TensorDataset, shifted: TensorDataset
) -> None:
    truth = clean.tensors[1]
    shown = [int((truth == digit).nonzero()[0]) for digit in range(10)]  # the first of each digit in the test set
    figure.suptitle("One base model, two adapters", fontsize=17, fontweight="bold", y=0.985)
    figure.text(0.905, 0.945, "■ right", color=RIGHT, ha="right")
    figure.text(0.97, 0.945, "■ wrong", color=WRONG, ha="right")
    axes = figure.subplots(4, 10)
    figure.subplots_adjust(left=0.215, right=0.97, top=0.865, bottom=0.06, hspace=0.42, wspace=0.25)
    rows = (
        ("Test image", "true digit, old domain", clean, [str(int(label)) for label in truth], truth.tolist(), None),
        ("Frozen base", "in the new domain", shifted, None, truth.tolist(), answers["base"]),
        ("LoRA: new domain", "same images, adapter 1", shifted, None, truth.tolist(), answers["shifted"]),
        (
            "LoRA: odd or even?",
            "old domain, adapter 2",
            clean,
            ["even", "odd"],
            (truth % 2).tolist(),
            answers["parity"],
        ),
    )
    for line, row in zip(axes, rows, strict=True):
        _draw_row(line, shown, *row)


def _draw_row(axes: Any, shown: list[int], title: str, what: str, data: Any, names: Any, truth: Any, said: Any) -> None:
    for axis, index in zip(axes, shown, strict=True):
        axis.imshow(data.tensors[0][index].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        if said is None:
            axis.set_title(str(truth[index]), color=INK, fontsize=13, pad=4)
            continue
        answer = names[said[index]] if names and said[index] < len(names) else str(said[index])
        color = RIGHT if said[index] == truth[index] else WRONG
        axis.set_title(answer, color=color, fontsize=13, fontweight="bold", pad=4)
        for spine in axis.spines.values():
            spine.set(color=color, linewidth=2)
    axes[0].text(-0.3, 0.62, title, transform=axes[0].transAxes, ha="right", va="center", fontweight="bold")
    axes[0].text(-0.3, 0.34, what, transform=axes[0].transAxes, ha="right", va="center", color="#5b6b79")


def _draw_accuracies(axis: Axes, table: list[dict[str, Any]]) -> None:
    for offset, (key, label) in zip((-0.2, 0.2), (("old", "old domain"), ("new", "new domain")), strict=True):
        places = [place + offset for place in range(len(table))]
        bars = axis.bar(places, [100 * row[key] for row in table], 0.38, color=COLORS[key], label=label)
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=10)
    axis.set_xticks(range(len(table)), [row["method"].replace(" ", "\n", 1) for row in table])
    axis.set(ylim=(0, 112), ylabel="accuracy on 397 test images (%)", yticks=range(0, 101, 25))
    axis.set_title(
        "With LoRA switched off, nothing is forgotten",
        fontweight="bold",
        fontsize=12,
        loc="left",
        pad=32,
    )
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, borderaxespad=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", length=0)


def _draw_updates(axis: Axes, figure: Figure | SubFigure, updates: dict[str, float]) -> None:
    blocks = sorted({name.split(".")[1] for name in updates if name.startswith("blocks.")})
    sizes = [[100 * updates[f"blocks.{block}.{layer}"] for layer in LAYERS] for block in blocks]
    image = axis.imshow(sizes, cmap="YlGnBu", aspect="auto", vmin=0)
    axis.set_xticks(range(len(LAYERS)), LAYERS)
    axis.set_yticks(range(len(blocks)), [f"block {int(block) + 1}" for block in blocks])
    axis.tick_params(length=0)
    dark = 0.5 * max(map(max, sizes))
    for y, row in enumerate(sizes):
        for x, size in enumerate(row):
            axis.text(x, y, f"{size:.0f}%", ha="center", va="center", color="white" if size > dark else INK)
    axis.set_title("Where the new domain changed the model", fontweight="bold", fontsize=12, loc="left", pad=32)
    axis.text(0, 1.03, _outside(updates), transform=axis.transAxes, va="bottom")
    figure.colorbar(image, ax=axis, label="update's norm, % of the weight's", pad=0.03)


def _outside(updates: dict[str, float]) -> str:
    return "outside the blocks: " + ", ".join(f"{name} {updates[name]:.0%}" for name in ("embed", "head"))
