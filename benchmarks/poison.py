"""What poisoned updates cost a fleet, and what the gate finds: with and without it, on folders split by condition.

The boxes of a fleet see conditions of one product. The trainer knew half of them: its bank is the gate's reference, its
held-out images with synthetic defects are the canaries. Poisoners send noise, rows times 100, noise with inflated
counts, or patches with real defects of every condition, which no canary was made of; half of the defective images are
theirs, the others are judged. Run: ``python -m benchmarks.poison [--data FOLDER ...] [--keep FOLDER] [--json FILE]``;
generated webs where no folder is given, on which the gate's limits were chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._poison import draw_fleet, generated_clients, open_clients
from benchmarks._setting import Goal, heading, print_goals
from deploy.aggregator.aggregate import AggregateSettings, aggregate
from deploy.aggregator.gates import examine_all
from deploy.metrics import image_auroc
from trainer.evaluation.fleet_embed import generic_embedder
from trainer.evaluation.fleet_judge import squared_distances
from trainer.evaluation.fleet_poison import Poison

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from benchmarks._poison import Fleet
    from deploy.aggregator.gates import Examination
    from edge.federation.update import MemoryUpdate
    from trainer.evaluation.fleet_embed import Embedder

    Single = npt.NDArray[np.float32]
    Line = dict[str, Any]

FALL = 0.02
FLEETS = ((6, 1), (7, 2))
SHARES = (1.0, 0.5, 0.1)


def honest_auroc(fleet: Fleet, bank: Single, embedder: Embedder) -> float:
    """Return the mean I-AUROC of honest boxes on their own images, with their own memory and the fleet's."""
    found = []
    for number, (client, own) in enumerate(zip(fleet.clients, fleet.honest, strict=True)):
        if number in fleet.liars:
            continue
        images = np.concatenate([client.good, client.bad[1::2]])
        squared = squared_distances(images, np.concatenate([own.rows, bank]))
        labels = np.arange(len(images)) >= len(client.good)
        found.append(image_auroc(labels, embedder.judge.scores(squared)))
    return float(np.mean([value for value in found if value is not None]))


def examined(fleet: Fleet, sent: Sequence[MemoryUpdate]) -> tuple[Examination, ...]:
    """Examine all updates of a fleet."""
    return examine_all(sent, reference=fleet.reference, canaries=fleet.canaries)


def cost(fleet: Fleet, embedder: Embedder, seed: int) -> list[Line]:
    """Merge with and without the gate for every poison; the honest boxes alone are the control."""
    rng = np.random.default_rng((seed, 1))

    def auroc(updates: Sequence[MemoryUpdate]) -> float:
        return honest_auroc(fleet, aggregate(updates, settings=AggregateSettings(), seed=0).rows, embedder)

    alone = auroc([one for number, one in enumerate(fleet.honest) if number not in fleet.liars])
    lines: list[Line] = []
    for kind in Poison:
        sent = fleet.sent(kind, 1.0, rng)
        passed = [one for one, found in zip(sent, examined(fleet, sent), strict=True) if found.accepted]
        names = {one.box for one in passed}
        caught = [fleet.honest[liar].box not in names for liar in fleet.liars]
        clean = len(passed) == len(sent) - len(fleet.liars) and all(caught)
        lines.append({
            "kind": kind.value, "alone": alone, "open": auroc(sent), "gated": alone if clean else auroc(passed),
            "caught": sum(caught), "liars": len(caught),
        })  # fmt: skip
    return lines


def detection(fleet: Fleet, seed: int) -> list[Line]:
    """Examine one update of defect rows at every share, and every honest update."""
    rng = np.random.default_rng((seed, 2))
    lines: list[Line] = []
    for share in (0.0, *SHARES):
        sent = fleet.sent(Poison.DEFECTS if share else None, share, rng)
        for number, found in enumerate(examined(fleet, sent)):
            if (share > 0) == (number in fleet.liars) or share == 0:
                lines.append({
                    "share": share, "known": fleet.known[number], "flagged": not found.accepted,
                    "reasons": [reason.split()[0] for reason in found.reasons], "figures": found.figures,
                })  # fmt: skip
    return lines


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    z = 1.959964
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def report_cost(lines: Sequence[Line]) -> list[Goal]:
    """Print what every poison cost."""
    print("Mean I-AUROC of the honest boxes (own memory and the fleet's), over scenes and seeds.\n")
    print("| boxes | poison | without it | no gate | with the gate | falls, no gate | falls, gate (worst) | caught |")
    print(f"|{'---|' * 8}")
    goals = []
    for boxes, liars in FLEETS:
        for kind in Poison:
            some = [line for line in lines if line["kind"] == kind.value and line["boxes"] == boxes]
            if not some:
                continue
            alone, free, gated = (np.array([line[name] for line in some]) for name in ("alone", "open", "gated"))
            caught = sum(line["caught"] for line in some)
            print(
                f"| {liars} of {boxes} | {kind.value} | {alone.mean():.3f} | {free.mean():.3f} | {gated.mean():.3f} | "
                f"{(alone - free).mean():+.3f} | {(alone - gated).mean():+.3f} ({(alone - gated).max():+.3f}) | "
                f"{caught} of {liars * len(some)} |"
            )
            limit = FALL if kind is not Poison.DEFECTS else math.nan
            name = f"I-AUROC lost to {liars} of {boxes} with {kind.value}"
            goals.append(Goal(name, float((alone - gated).mean()), limit, False, f"worst {(alone - gated).max():.3f}"))
            goals.append(Goal(f"{name}, no gate", float((alone - free).mean()), math.nan, False, ""))
    return goals


def report_detection(lines: Sequence[Line]) -> list[Goal]:
    """Print how often defect rows and honest boxes are flagged, with intervals."""
    print("\nUpdates flagged by the gate, 95 % intervals by Wilson.\n")
    print("| scene | rows with real defects | boxes | flagged | share | interval |\n|---|---|---|---|---|---|")
    goals = []
    scenes = list(dict.fromkeys(line["scene"] for line in lines))
    for scene in [*scenes, "all"]:
        for share in (0.0, *SHARES):
            for known in (True, False) if not share else (None,):
                some = [
                    line
                    for line in lines
                    if line["share"] == share and scene in {"all", line["scene"]} and known in {None, line["known"]}
                ]
                if not some:
                    continue
                hits = sum(bool(line["flagged"]) for line in some)
                low, high = wilson(hits, len(some))
                what = f"{share:.0%}" if share else f"honest, condition {'known' if known else 'unseen'}"
                print(f"| {scene} | {what} | {len(some)} | {hits} | {hits / len(some):.3f} | {low:.3f} to {high:.3f} |")
                if scene == "all":
                    spread = f"{low:.3f} to {high:.3f}, {len(some)} updates"
                    goals.append(Goal(f"flagged: {what}", hits / len(some), math.nan, bool(share), spread))
    return goals


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Line]]:
    """Measure and print; return the raw lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", help="folders in MVTec layout with conditions in meta.csv")
    parser.add_argument("--seeds", type=int, default=20, help="draws of boxes, poisoners and known conditions")
    parser.add_argument("--cost-seeds", type=int, default=3, help="of these, how many are merged and judged")
    parser.add_argument("--seed", type=int, default=0, help="of the generated webs")
    parser.add_argument("--keep", type=Path, help="folder for embeddings, which a second run reads")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    heading("poison")
    embedder = generic_embedder()
    if options.data:
        scenes = {folder.resolve().name: open_clients(folder, embedder, options.keep) for folder in options.data}
    else:
        scenes = generated_clients(embedder, options.seed)
    costs: list[Line] = []
    found: list[Line] = []
    for name, clients in scenes.items():
        for boxes, liars in FLEETS:
            if len(clients) < boxes:
                continue
            for seed in range(options.seeds):
                fleet = draw_fleet(name, clients, boxes=boxes, liars=liars, seed=seed, space=embedder.embedding_id)
                about = {"scene": name, "boxes": boxes, "seed": seed}
                found += [about | line for line in detection(fleet, seed)]
                if seed < options.cost_seeds:
                    costs += [about | line for line in cost(fleet, embedder, seed)]
            print(f"  {name}, {liars} of {boxes}: {options.seeds} seeds", file=sys.stderr, flush=True)
    goals = report_cost(costs)
    goals += report_detection(found)
    print()
    print_goals(goals)
    if options.json:
        options.json.write_text(json.dumps({"cost": costs, "detection": found}), encoding="utf-8")
    return {"cost": costs, "detection": found}


if __name__ == "__main__":
    main()
