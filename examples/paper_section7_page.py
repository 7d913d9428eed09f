"""The output of ``paper_section7.py``: findings, tables, pictures and the page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_lora.analysis.plots import HUES, INK, as_svg, new_figure, plot_layers, plot_similarities
from lightning_lora.analysis.reports import Page

Rows = list[dict[str, Any]]
ATTENTION = ("q", "k", "v", "proj")
SHOWS, SHOWS_NOT = "It shows here.", "It does not show at this size."


# --- findings: the paper's claim, the measurement, and whether they agree


def findings(numbers: dict[str, Any]) -> list[dict[str, str]]:
    found = [
        *_of_matrices(numbers["7.1 matrices"]),
        *_of_ranks(numbers["7.2 ranks"]),
        *_of_subspaces(numbers["7.2 subspaces"], numbers["pair"]),
        *_of_relation(numbers["7.3 relation"]),
    ]
    return [dict(zip(("section", "claim", "found", "verdict"), each, strict=True)) for each in found]


def _of_matrices(rows: Rows) -> Iterator[tuple[str, str, str, str]]:
    scores = {tuple(row["targets"]): row for row in rows}
    single = [row for targets, row in scores.items() if len(targets) == 1 and targets[0] in ATTENTION]
    every = scores.get(ATTENTION)
    if single and every:
        best = max(single, key=lambda row: row["mean"])
        yield (
            "7.1",
            "More kinds of attention matrices at a lower rank do better than one kind at a higher rank.",
            f"All four kinds at rank {every['rank']} reach {_score(every)}; the best single kind, {_names(best)} at "
            f"rank {best['rank']}, reaches {_score(best)}.",
            _verdict(every["mean"] - best["mean"], _noise(every, best)),
        )
    q, qv = scores.get(("q",)), scores.get(("q", "v"))
    if q and qv:
        yield (
            "7.1",
            "q and v together do better than q alone.",
            f"q and v at rank {qv['rank']} reach {_score(qv)}; q alone at rank {q['rank']} reaches {_score(q)}.",
            _verdict(qv["mean"] - q["mean"], _noise(q, qv)),
        )
    best = max(rows, key=lambda row: row["mean"])
    if any(not set(row["targets"]) <= set(ATTENTION) for row in rows):
        yield (
            "7.1",
            "(The paper adapts only attention; later work finds the MLP matrices at least as good.)",
            f"The best choice under this budget is {_names(best)} at rank {best['rank']}, with {_score(best)}.",
            "The MLP is among the best." if not set(best["targets"]) <= set(ATTENTION) else "Attention alone is best.",
        )


def _of_ranks(rows: Rows) -> Iterator[tuple[str, str, str, str]]:
    lowest, best = rows[0], max(rows, key=lambda row: row["mean"])
    enough = next(row for row in rows if row["mean"] >= best["mean"] - max(0.01, _noise(row, best)))
    yield (
        "7.2",
        "A very small rank is enough: rank 1 or 2 does as well as rank 64.",
        f"Rank {lowest['rank']} reaches {_score(lowest)}. The best, rank {best['rank']}, reaches {_score(best)}. Rank "
        f"{enough['rank']} is the lowest within the noise of the best.",
        SHOWS if enough["rank"] <= 2 else f"{SHOWS_NOT} Rank {enough['rank']} is needed.",
    )


def _of_subspaces(rows: Rows, pair: Sequence[int]) -> Iterator[tuple[str, str, str, str]]:
    ranks, seeds = ([row for row in rows if row["pair"] == which] for which in ("ranks", "seeds"))
    first, half = (_middle(ranks, "factors", each) for each in ("first", "half"))
    update = _middle(ranks, "inputs", "first")
    yield (
        "7.2",
        "A low and a high rank share the top direction of A (phi above 0.5), and others much less.",
        f"Between ranks {pair[0]} and {pair[1]} from two seeds, the top directions of A share {first:.2f} (chance "
        f"{_middle(ranks, 'factors', 'first_by_chance'):.2f}), half of all directions {half:.2f} (chance "
        f"{_middle(ranks, 'factors', 'half_by_chance'):.2f}); the top input directions of the updates themselves share "
        f"{update:.2f}. Medians over {len(ranks)} layers.",
        _top_verdict(first, half, update),
    )
    by_kind = {
        kind: statistics.mean(
            row["inputs"]["half"] - row["inputs"]["half_by_chance"] for row in seeds if row["kind"] == kind
        )
        for kind in sorted({row["kind"] for row in seeds})
    }
    yield (
        "7.2",
        "Updates from different seeds share some directions beyond chance, in q more than in v.",
        "Beyond chance, the first half of the updates' input directions share "
        + ", ".join(f"{share:+.2f} in {kind}" for kind, share in by_kind.items())
        + f"; the top ones share {_middle(seeds, 'inputs', 'first'):.2f}.",
        _seeds_verdict(by_kind),
    )


def _top_verdict(first: float, half: float, update: float) -> str:
    if first > 0.5 and first > half:
        return SHOWS
    if first > 0.5:
        return "The top direction is shared here; that others are shared less does not show."
    return f"{SHOWS_NOT} It shows for the updates themselves." if update > 0.5 else SHOWS_NOT


def _seeds_verdict(by_kind: dict[str, float]) -> str:
    shared = min(by_kind.values()) > 0.05
    more_in_q = by_kind.get("q", 0.0) > by_kind.get("v", 0.0) + 0.02
    if shared and more_in_q:
        return SHOWS
    return "The overlap shows here; that it is larger in q does not." if shared else SHOWS_NOT


def _of_relation(rows: Rows) -> Iterator[tuple[str, str, str, str]]:
    low, high = (min(row["rank"] for row in rows), max(row["rank"] for row in rows))
    at_low, at_high = ([row for row in rows if row["rank"] == rank] for rank in (low, high))
    alignment = statistics.median(row["alignment"] for row in at_low)
    of_top = statistics.median(row["projection"] / row["own_projection"] for row in at_low)
    yield (
        "7.3",
        "Updates amplify directions that are present in the weight, but not its top ones.",
        f"At rank {low}, the weight has {alignment:.1f} times as much in the updates' directions as in random ones, "
        f"and {of_top:.0%} of what it has in its own top directions.",
        SHOWS if alignment > 1.5 and of_top < 0.5 else SHOWS_NOT,
    )
    factors = [statistics.median(row["amplification"] for row in each) for each in (at_low, at_high)]
    yield (
        "7.3",
        "The amplification is large, and larger at a low rank (21.5 at rank 4, 1.9 at rank 64).",
        f"The median amplification is {factors[0]:.1f} at rank {low} and {factors[1]:.1f} at rank {high}.",
        SHOWS if factors[0] > max(2.0, factors[1]) else SHOWS_NOT,
    )


def _verdict(gain: float, noise: float) -> str:
    if gain > noise:
        return SHOWS
    return f"{SHOWS_NOT} The difference is within the noise of the seeds." if gain > -noise else SHOWS_NOT


def _noise(*rows: dict[str, Any]) -> float:
    """Return two standard errors of the difference between two means."""
    return 2 * sum(row["deviation"] ** 2 / len(row["accuracies"]) for row in rows) ** 0.5


def _middle(rows: Rows, what: str, which: str) -> float:
    return statistics.median(row[what][which] for row in rows)


def _score(row: dict[str, Any]) -> str:
    return f"{row['mean']:.1%} ± {row['deviation']:.1%}"


def _names(row: dict[str, Any]) -> str:
    return " + ".join(row["targets"])


# --- the page


def write_page(numbers: dict[str, Any], pictures: dict[str, Any], output: Path) -> list[dict[str, str]]:
    """Write the page and the pictures, and return the findings."""
    found, figures = findings(numbers), _figures(numbers, pictures)
    for name, (figure, _, _) in figures.items():
        figure.savefig(output / f"{name}.png")
    page = Page(
        "The LoRA paper's section 7, on handwritten digits",
        f"A vision transformer that knows scikit-learn's digits ({numbers['base']['old']:.1%}) is adapted to the same "
        f"digits, inverted and rotated, where it starts at {numbers['base']['new']:.1%}, from {numbers['images']} "
        f"images in {numbers['steps']} steps. All scores are accuracies on 397 test images, mean and standard "
        f"deviation over {len(numbers['seeds'])} seeds of A.",
    )
    page.heading("Findings")
    for each in found:
        page.text(f"{each['section']} — the paper: {each['claim']}")
        page.points([each["found"], each["verdict"]])
    page.heading("7.1 Which matrices under one budget")
    page.text(f"Every choice has at most {numbers['budget']:,} parameters, which determines the rank.")
    _add(page, figures, "budget")
    page.table(list(_score_rows(numbers["7.1 matrices"])), "One parameter budget, spent on different matrices")
    page.heading("7.2 Which rank")
    _add(page, figures, "ranks")
    page.table(list(_score_rows(numbers["7.2 ranks"])), "The same matrices at several ranks")
    _add(page, figures, "phi_ranks", "phi_seeds")
    page.table(
        list(_overlap_rows(numbers["7.2 subspaces"])),
        "phi of the first direction and of half of all, with chance levels",
    )
    page.heading("7.3 The update and its weight")
    page.table(list(_relation_rows(numbers["7.3 relation"])), "As in table 7: the weight in the update's directions")
    _add(page, figures, "effective_rank", "ratio", "amplification", "alignment")
    page.write(output / "section7.html", overwrite=True)
    return found


def _add(page: Page, figures: dict[str, tuple[Any, str, str]], *names: str) -> None:
    page.figures([(as_svg(figures[name][0], name), *figures[name][1:]) for name in names])


def _figures(numbers: dict[str, Any], pictures: dict[str, Any]) -> dict[str, tuple[Any, str, str]]:
    low, high = numbers["pair"]
    budget = [(f"{_names(row)}, rank {row['rank']}", row) for row in numbers["7.1 matrices"]]
    ranks = [(f"rank {row['rank']}", row) for row in numbers["7.2 ranks"]]
    scores = "Accuracy on the new domain, one dot per seed."
    words = "Bars of accuracies with a dot per seed. The numbers are in the table below."
    found = {
        "budget": (_bars(budget, "one budget, different matrices"), words, scores),
        "ranks": (_bars(ranks, "the same matrices, different ranks"), words, scores),
    }
    for what, labels, said in (
        ("ranks", (f"i (rank {low})", f"j (rank {high})"), f"Rank {low} and rank {high}, from two seeds (figure 3)"),
        ("seeds", ("i (one seed)", "j (another)"), f"Two seeds at rank {high}, and two random matrices (figure 4)"),
    ):
        caption = f"{said}: phi(i, j), the overlap of the leading i and j directions of the factors A."
        figure = plot_similarities(pictures["maps"][what], labels=labels)
        found[f"phi_{what}"] = (figure, f"A heat map per layer. {caption} The numbers are in a table.", caption)
    targets = " + ".join(pictures["groups"])
    for metric in ("effective_rank", "ratio", "amplification", "alignment"):
        figure = plot_layers(pictures["widest"], metric)  # type: ignore[arg-type]
        caption = f"Each layer of {targets}, adapted under the budget."
        found[metric] = (figure, f"A heat map by block and kind of layer. {caption}", caption)
    return found


def _bars(rows: list[tuple[str, dict[str, Any]]], name: str) -> Any:
    with new_figure(6.0, 0.7 + 0.32 * len(rows)) as (figure, panels):
        axes = panels[0, 0]
        for at, (_, row) in enumerate(rows):
            axes.barh(at, 100 * row["mean"], height=0.68, color=HUES[0])
            axes.plot(
                [100 * score for score in row["accuracies"]],
                [at] * len(row["accuracies"]),
                "o",
                color=INK,
                markersize=3,
            )
            axes.text(1.5, at, f"{row['mean']:.1%}", va="center", fontsize=8, color="white")
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("accuracy on 397 test images (%)")
        axes.set_title(name)
    return figure


def _score_rows(rows: Rows) -> Iterator[tuple[str, ...]]:
    yield ("matrices", "rank", "parameters", "accuracy", "deviation", "per seed")
    for row in rows:
        scores = ", ".join(f"{score:.1%}" for score in row["accuracies"])
        numbers = (str(row["rank"]), f"{row['parameters']:,}", f"{row['mean']:.1%}", f"{row['deviation']:.1%}")
        yield (_names(row), *numbers, scores)


def _overlap_rows(rows: Rows) -> Iterator[tuple[str, ...]]:
    yield ("layer", "pair", "A: first", "half", "chance", "in: first", "half", "chance", "out: first", "half", "chance")
    for row in rows:
        cells = [
            row[what][which]
            for what in ("factors", "inputs", "outputs")
            for which in ("first", "half", "half_by_chance")
        ]
        yield (row["layer"], row["pair"], *(f"{cell:.2f}" for cell in cells))


def _relation_rows(rows: Rows) -> Iterator[tuple[str, ...]]:
    yield ("layer", "rank", "|W|", "|dW|", "W in dW's directions", "in its own top", "in random ones", "amplification")
    for row in rows:
        keys = ("weight_norm", "update_norm", "projection", "own_projection", "random_projection", "amplification")
        yield (row["layer"], str(row["rank"]), *(f"{row[key]:.2f}" for key in keys))
