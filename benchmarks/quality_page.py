"""The results of ``quality.py``: its tables, what they show, and the pictures of ``docs/quality.md``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from quality import (
    ALONE,
    ARMS,
    CONTROL_RANKS,
    FULL,
    LORA,
    OTHER,
    PEFT,
    PILOTS,
    RESULTS,
    SEEDS,
    STARTS,
    STEPS,
    SWEPT,
    rank_arm,
)
from starts import MARKS
from studies import END, Difference, Runs, best_rate, complete, finals, interval, markdown, pairs, write_section

from lightning_lora.analysis.plots import HUES, INK, new_figure

PAGE = RESULTS.parents[1] / "docs" / "quality.md"
MARGIN, LEVEL, POWER, NEAR = 0.5, 0.05, 0.8, 0.05  # points; of tests; ; of loss, for robustness
COMPARED = [arm for arm in ARMS if arm not in (LORA, PEFT, OTHER)]
BETWEEN, WITHIN = (5.0, 20.0), 2.0  # what the two positive controls ask for
GRAY = "#9aa0a6"


# --- statistics


def points(runs: Runs, study: str, arm: str) -> list[float]:
    """Return the paired differences of accuracy from LoRA, in points."""
    return [100 * each for each in pairs(runs, study, arm, LORA, which=1)]


def tail(values: Sequence[float], beyond: float = 0.0) -> float:
    """Return the one-sided p of a mean above a number."""
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    excess = statistics.mean(values) - beyond
    if error == 0:
        return 0.5 if excess == 0 else float(excess < 0)
    return float(t.sf(excess / error, len(values) - 1))


def two_sided(values: Sequence[float]) -> float:
    above = tail(values)
    return 2 * min(above, 1 - above)


def equivalence(values: Sequence[float]) -> float:
    """Return the p of two one-sided tests that the mean lies within the margin."""
    return max(tail(values, -MARGIN), tail([-each for each in values], -MARGIN))


def holm(found: Mapping[str, float]) -> dict[str, float]:
    """Return p values after Holm's correction."""
    corrected, largest = dict[str, float](), 0.0
    for at, name in enumerate(sorted(found, key=lambda name: found[name])):
        largest = max(largest, min(1.0, (len(found) - at) * found[name]))
        corrected[name] = largest
    return corrected


def corrected(runs: Runs, study: str) -> dict[str, float]:
    there = complete(runs, study, COMPARED, SEEDS)
    return holm({arm: two_sided(points(runs, study, arm)) for arm in there})


def detectable(deviation: float, count: int = len(SEEDS)) -> float:
    """Return the mean that a paired t test finds with the power that is asked for."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    critical = t.ppf(1 - LEVEL / 2, count - 1)

    def lacking(effect: float) -> float:
        return nct.sf(critical, count - 1, effect * math.sqrt(count)) - POWER  # the other tail counts for nothing

    return deviation * float(brentq(lacking, 0.1, 10.0))


# --- rates


def losses(runs: Runs, study: str, arm: str) -> dict[float, float]:
    """Return the mean validation loss by rate."""
    found: dict[float, list[float]] = {}
    for name, each in runs.items():
        if name.startswith(f"{study}/{arm}/") and "validation" in each:
            found.setdefault(float(name.split("/")[2]), []).append(each["validation"])
    return {rate: statistics.mean(found[rate]) for rate in sorted(found)}


def vertex(curve: Mapping[float, float]) -> float:
    """Return the rate at the vertex of the parabola through the best and its neighbors; at an edge, the best."""
    rates = [*curve]
    at = rates.index(min(curve, key=lambda rate: curve[rate]))
    if at in (0, len(rates) - 1):
        return rates[at]
    low, best, high = (curve[rate] for rate in rates[at - 1 : at + 2])
    step = math.log(rates[at + 1] / rates[at - 1]) / 2
    return rates[at] * math.exp(step * (low - high) / (2 * (low - 2 * best + high)))


def robustness(curve: Mapping[float, float]) -> tuple[float, bool]:
    """Return the factor between the ends of the rates that are nearly the best, and whether both are inside."""
    limit = min(curve.values()) + NEAR
    rates = [*curve]
    at = rates.index(min(curve, key=lambda rate: curve[rate]))
    ends = [crossing(curve, side, limit) for side in (rates[at::-1], rates[at:])]
    return ends[1][0] / ends[0][0], ends[0][1] and ends[1][1]


def crossing(curve: Mapping[float, float], outward: Sequence[float], limit: float) -> tuple[float, bool]:
    for near, far in pairwise(outward):
        if curve[far] > limit:
            share = (limit - curve[near]) / (curve[far] - curve[near])
            return near * (far / near) ** share, True
    return outward[-1], False


def ratio(runs: Runs, study: str) -> float:
    """Return the best rate of LoRA over that of full fine-tuning."""
    return vertex(losses(runs, study, LORA)) / vertex(losses(runs, study, FULL))


def rank_rates(runs: Runs, study: str) -> dict[int, float]:
    curves = {rank: losses(runs, study, rank_arm(rank)) for rank in CONTROL_RANKS}
    return {rank: vertex(curve) for rank, curve in curves.items() if curve}


def sweep_error(runs: Runs, study: str) -> str:
    """Return how much the losses of adapters in a sweep differ from those of the same adapters alone."""
    alone, together = (f"{study}/{arm}/" for arm in (ALONE, ALONE.partition(",")[0]))
    found = [name for name in runs if name.startswith(alone)]
    errors = [abs(runs[name]["validation"] - runs[name.replace(alone, together)]["validation"]) for name in found]
    verdict = f"they differ by at most {max(errors):.0e}" if any(errors) else "all are equal, bit for bit"
    return f"{len(errors)} validation losses of the sweep on *{study}*, and of its adapters alone: {verdict}."


# --- tables


def label(arm: str) -> str:
    return f"`{arm}`" if arm in STARTS else arm


def mean(runs: Runs, study: str, arm: str, mark: str, which: int) -> float:
    return statistics.mean(each[mark][which] for each in finals(runs, study, arm).values())


def forgotten(runs: Runs, study: str, arm: str) -> list[float]:
    found = finals(runs, study, arm)
    return [found[seed]["forgetting"] for seed in SEEDS]


def signed(values: Difference, decimals: int) -> str:
    return f"{values.mean:+.{decimals}f} ± {values.margin:.{decimals}f}".replace("-", "−")  # noqa: RUF001 - a minus


def probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def beside(values: Difference, decimals: int) -> str:
    text = signed(values, decimals)
    return f"tied ({text})" if values.is_tie else text


def results(runs: Runs, study: str) -> str:
    """Return what an arm reached, and what it forgot."""
    lines = [[study, "rate", "accuracy, %", "p, corrected", "loss", "forgetting"]]
    chances = corrected(runs, study)
    for arm in complete(runs, study, ARMS, SEEDS):
        rate, inside = best_rate(runs, study, arm)
        cells = [label(arm), f"{rate:.2g}" + ("" if inside or arm == OTHER else " (edge)")]
        kept = forgotten(runs, study, arm)
        if arm == LORA:
            cells += [f"{100 * mean(runs, study, arm, END, 1):.1f}", "", f"{mean(runs, study, arm, END, 0):.3f}"]
            cells.append(f"{statistics.mean(kept):.3f}")
        else:
            chance = chances.get(arm)
            cells += [
                beside(interval(points(runs, study, arm)), 2),
                "" if chance is None else probability(chance),
                beside(interval(pairs(runs, study, arm, LORA)), 3),
            ]
            less = [one - other for one, other in zip(kept, forgotten(runs, study, LORA), strict=True)]
            cells.append(beside(interval(less), 3))
        lines.append(cells)
    return markdown(lines)


def course(runs: Runs, study: str) -> str:
    """Return how an arm got there, and what it cost."""
    lines = [[study, *(f"loss at {mark} %" for mark in MARKS[:-1]), "rates", "near the best", "parameters", "seconds"]]
    for arm in complete(runs, study, ARMS, SEEDS):
        curve = losses(runs, study, arm)
        cells = [label(arm)]
        for mark in MARKS[:-1]:
            is_base = arm == LORA
            value = f"{mean(runs, study, arm, mark, 0):.3f}"
            cells.append(value if is_base else beside(interval(pairs(runs, study, arm, LORA, mark)), 3))
        width, inside = robustness(curve)
        near = f"{'' if inside else '> '}{width:.1f}"
        own = finals(runs, study, arm)
        cells += [str(len(curve)), near] if arm != OTHER else ["", ""]
        cells.append(f"{statistics.mean(own[seed]['parameters'] for seed in SEEDS):,.0f}")
        seconds = [each["seconds"] for name, each in runs.items() if is_pilot(name, study, arm)]
        lines.append([*cells, f"{statistics.median(seconds):.1f}"])
    return markdown(lines)


def is_pilot(name: str, study: str, arm: str) -> bool:
    return name.startswith(f"{study}/{arm}/") and int(name.rpartition("/")[2]) in PILOTS


def controls(runs: Runs, studies: Sequence[str]) -> str:
    """Return whether the study finds what is known."""
    lines = [["positive control", *studies]]
    ratios = [ratio(runs, study) for study in studies]
    lines.append(["best rate of LoRA / of full fine-tuning", *(f"{each:.1f}" for each in ratios)])
    lines.append(["is between 5 and 20", *("yes" if BETWEEN[0] <= each <= BETWEEN[1] else "**no**" for each in ratios)])
    rates = [rank_rates(runs, study) for study in studies]
    lines += [
        [f"best rate of rank {rank}", *(f"{each[rank]:.2g}" if rank in each else "" for each in rates)]
        for rank in CONTROL_RANKS
    ]
    spreads = [max(each.values()) / min(each.values()) if len(each) == len(CONTROL_RANKS) else 0.0 for each in rates]
    lines.append(["highest / lowest of these", *(f"{each:.2f}" if each else "" for each in spreads)])
    lines.append(["is at most 2", *(("yes" if each <= WITHIN else "**no**") if each else "" for each in spreads)])
    return markdown(lines)


# --- what follows


def findings(runs: Runs, study: str) -> str:
    """Return what the rules of the protocol say of a task."""
    sentences = [*equivalent(runs, study), *compared(runs, study), *power(runs, study)]
    return " ".join([f"- *{study}*:", *sentences])


def equivalent(runs: Runs, study: str) -> Iterator[str]:
    if PEFT not in complete(runs, study, ARMS, SEEDS):
        return
    values = points(runs, study, PEFT)
    shown = "equivalent" if equivalence(values) < LEVEL else "not shown to be equivalent"
    inside = signed(interval(values, 1 - 2 * LEVEL), 2)  # the two tests reject if this is within the margin
    yield f"PEFT is {shown} to LoRA within {MARGIN} points (90 % interval {inside})."


def compared(runs: Runs, study: str) -> Iterator[str]:
    chances = corrected(runs, study)
    differ = [arm for arm in chances if chances[arm] < LEVEL]
    better = [arm for arm in differ if statistics.mean(points(runs, study, arm)) > 0]
    groups = {
        "Better than LoRA": better,
        "Worse than LoRA": [arm for arm in differ if arm not in better],
        "Tied with LoRA": [arm for arm in chances if arm not in differ],
    }
    for verdict, arms in groups.items():
        if arms:
            yield f"{verdict}: {', '.join(label(arm) for arm in arms)}."


def power(runs: Runs, study: str) -> Iterator[str]:
    middle = statistics.median(statistics.stdev(points(runs, study, arm)) for arm in corrected(runs, study))
    yield (
        f"Paired differences have a standard deviation of {middle:.2f} points (median of the arms), so eight seeds find"
        f" a true difference of {detectable(middle):.2f} points four times in five."
    )


def there(runs: Runs) -> list[str]:
    """Return the tasks that have more than one complete arm."""
    return [study for study in STEPS if len(complete(runs, study, ARMS, SEEDS)) > 1]


def section(content: dict[str, Any]) -> str:
    runs: Runs = content["runs"]
    studies = there(runs)
    parts = [controls(runs, studies), *(part(runs, study) for study in studies for part in (results, course))]
    parts.append("By the rules that were fixed before the runs:")
    parts.append("\n".join(findings(runs, each) for each in studies))
    parts += [sweep_error(runs, study) for study in SWEPT if losses(runs, study, ALONE)]
    return "\n\n".join(parts)


# --- pictures


def style(arm: str) -> dict[str, Any]:
    shown = [each for each in ARMS if each not in (PEFT, OTHER)]
    at = shown.index(arm)
    own = {"color": INK, "linewidth": 2.2} if arm == LORA else {"color": HUES[(at - 1) % len(HUES)], "linewidth": 1.2}
    return {**own, "linestyle": ("-", "--")[(at - 1) // len(HUES) if at else 0], "label": arm, "markersize": 5}


def draw(runs: Runs, folder: Path) -> None:
    studies = there(runs)
    for name, picture in {"rates": draw_rates, "differences": draw_differences, "forgetting": draw_forgetting}.items():
        save(picture(runs, studies), folder / f"quality_{name}.svg")


def save(figure: Any, file: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": file.stem}):
        figure.savefig(file, format="svg", facecolor="white", metadata=dict.fromkeys(("Date", "Creator")))
    text = file.read_text(encoding="utf-8")
    file.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def draw_rates(runs: Runs, studies: Sequence[str]) -> Any:
    with new_figure(3.4 * len(studies), 3.6, 1, len(studies)) as (figure, grid):
        for axes, study in zip(grid[0], studies, strict=True):
            lowest, ceiling = math.inf, 0.0
            for arm in [arm for arm in complete(runs, study, ARMS, SEEDS) if arm not in (PEFT, OTHER)]:
                curve = losses(runs, study, arm)
                axes.plot([*curve], [*curve.values()], marker=".", **style(arm))
                lowest = min(lowest, *curve.values())
                ceiling = max(ceiling, sorted(curve.values())[min(3, len(curve) - 1)])
            axes.set(
                xscale="log", title=study, xlabel="learning rate", ylim=(lowest - 0.05 * (ceiling - lowest), ceiling)
            )
            axes.minorticks_off()
        grid[0][0].set_ylabel("validation loss, mean of two pilots")
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def draw_differences(runs: Runs, studies: Sequence[str]) -> Any:
    with new_figure(3.4 * len(studies), 3.2, 1, len(studies)) as (figure, grid):
        arms = [arm for arm in ARMS if arm != LORA]
        for axes, study in zip(grid[0], studies, strict=True):
            axes.axvspan(-MARGIN, MARGIN, color=GRAY, alpha=0.25, linewidth=0)
            axes.axvline(0, color=INK, linewidth=0.8)
            for arm in complete(runs, study, arms, SEEDS):
                found = interval(points(runs, study, arm))
                color = GRAY if arm in (PEFT, OTHER) else HUES[0]
                axes.errorbar(
                    found.mean, -arms.index(arm), xerr=found.margin, fmt="o", color=color, ecolor=color, markersize=4
                )
            axes.set(title=study, xlabel="accuracy less LoRA's, points", yticks=range(1 - len(arms), 1), yticklabels=[])
        grid[0][0].set_yticklabels(arms[::-1])
    return figure


def draw_forgetting(runs: Runs, studies: Sequence[str]) -> Any:
    names = {"digits": "loss on upright digits", "sentences": "drift of embeddings", "language": "loss on English"}
    with new_figure(3.4 * len(studies), 3.6, 1, len(studies)) as (figure, grid):
        for axes, study in zip(grid[0], studies, strict=True):
            for arm in [arm for arm in complete(runs, study, ARMS, SEEDS) if arm not in (PEFT, OTHER)]:
                own = style(arm)
                marker = "o" if own.pop("linestyle") == "-" else "s"
                x, y = statistics.mean(forgotten(runs, study, arm)), 100 * mean(runs, study, arm, END, 1)
                axes.plot(x, y, marker=marker, linestyle="", **own)
            axes.set(title=study, xlabel=f"forgetting: {names[study]}")
        grid[0][0].set_ylabel("accuracy on the new task, %")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def write_page(content: dict[str, Any]) -> None:
    write_section(PAGE, "quality.py", section(content))
    draw(content["runs"], PAGE.parent)
