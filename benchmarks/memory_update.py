"""What a box may do to its memory: reduce it, feed it behind a gate, and judge by what it learned round after round.

Every folder is embedded once by the fleet memory's shared generator. Three questions follow: what I-AUROC a reduced
memory keeps, what a feed with defective frames costs with the gate and without, and whether the false-alarm rate stays
where it was calibrated over ten rounds of a memory that feeds itself. Run: ``python benchmarks/memory_update.py
[--data FOLDER ...] [--json FILE]``; generated webs where no folder is given, on which the settings were chosen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks._images import generated_folders
from benchmarks._memory import Pool, area, auroc, open_embedder, open_product, rate_interval, raw_bank, scar, thinned
from benchmarks._setting import Goal, heading, print_goals, spread
from edge.judgement.threshold import MIN_TAIL_SCORES, fit_threshold
from edge.memory.drift import good_distance, measure_drift
from edge.memory.dynamic import DynamicMemory, DynamicSettings
from edge.memory.gate import MIN_SCORES, FrameGate
from edge.memory.reduce import coreset, reduce_anchor, reduce_positional

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from benchmarks._memory import Frames, Product, Rows

QUESTIONS = ("reduction", "feeding", "rounds")
KINDS = ("commissioning", "selected")
SIZES = ("2.5%", "0.6%", "98", "49")
RANDOM_DRAWS = 5
REDUCED_IMAGES = 40  # so that one row a position is 2.5 % of all rows
DYNAMIC_ROWS = 512
FED, DEFECTIVE = 200, 10
PATIENCE = (500, 50)
"""As set, and so that a memory can take up a new look within 200 frames."""
ROUNDS, ALPHA = 10, 0.05
MIN_FRAMES = 8.0
_JUDGED = 60  # good and defective images each, to judge a fed memory by


@dataclass(frozen=True)
class Reduced:
    """One reduced memory of one product.

    Attributes:
        product: its name.
        kind: ``full``, ``anchor``, ``positional``, ``random`` (mean of five draws) or ``coreset``.
        size: one of ``SIZES``, or ``all``.
        rows: of the bank.
        share: of the raw rows.
        auroc: I-AUROC.
        loss: I-AUROC of the full bank less this one's.
    """

    product: str
    kind: str
    size: str
    rows: int
    share: float
    auroc: float
    loss: float


def reduction(product: Product, *, most_test: int, seed: int) -> Iterator[Reduced]:
    """Reduce the raw rows of 40 training images in every way (check A1)."""
    train = np.array(thinned(product.train, REDUCED_IMAGES), np.float32)
    test = (thinned(product.good, most_test // 2), thinned(product.bad, most_test // 2))
    rows = train.reshape(-1, train.shape[2])
    raw = raw_bank(rows)
    full = auroc(product, *test, rows)
    yield Reduced(product.name, "full", "all", len(rows), 1.0, full, 0.0)

    def judged(kind: str, size: str, banks: Sequence[Rows]) -> Reduced:
        found = float(np.mean([auroc(product, *test, bank) for bank in banks]))
        return Reduced(product.name, kind, size, len(banks[0]), len(banks[0]) / len(rows), found, full - found)

    rng = np.random.default_rng(seed)
    for size, count in zip(SIZES, (round(0.025 * len(rows)), round(0.006 * len(rows)), 98, 49), strict=True):
        yield judged("anchor", size, [reduce_anchor(raw, count, min_frames=1, seed=seed).rows])
        yield judged("coreset", size, [rows[coreset(rows, count, seed=seed)]])
        yield judged("random", size, [rows[rng.choice(len(rows), count, replace=False)] for _ in range(RANDOM_DRAWS)])
    yield judged("positional", SIZES[0], [reduce_positional(train, min_frames=MIN_FRAMES).rows])


@dataclass(frozen=True)
class Fed:
    """A memory after 200 frames, 10 of them defective.

    Attributes:
        product: its name.
        seed: of the split and order.
        defects: ``real`` (the folder's, all different) or ``scar`` (one that recurs at one place).
        patience: frames that a row must be idle before a new look may have it; 500 is usual.
        arm: ``gate``, ``off`` (every frame feeds) or ``clean`` (every good frame and no other).
        before: I-AUROC of the memory before.
        after: afterwards.
        fed: frames that fed it.
        fed_bad: defective ones among them.
        drift: see :class:`edge.memory.drift.Drift`.
        leaving: share of its rows that 8 frames stand behind.
    """

    product: str
    seed: int
    defects: str
    patience: int
    arm: str
    before: float
    after: float
    fed: int
    fed_bad: int
    drift: float
    leaving: float


def feeding(product: Product, *, seed: int) -> Iterator[Fed]:
    """Feed 200 frames of which 5 % are defective, with the gate and without (check A6)."""
    rng = np.random.default_rng((seed, 6))
    order = rng.permutation(len(product.train))
    marked, rest = order[: _JUDGED + DEFECTIVE], order[_JUDGED + DEFECTIVE :]
    if _too_few(product, len(rest) + len(product.good), "feeding"):
        return
    scarred = product.embed(scar(product.canvases[marked], np.random.default_rng((seed, 7))))
    pool = Pool.cut(np.concatenate([product.train[rest], product.good]), rng)
    base = reduce_anchor(raw_bank(pool.fit), DYNAMIC_ROWS, min_frames=1).rows
    bad = product.bad[rng.permutation(len(product.bad))]
    for defects, some in (("real", bad), ("scar", scarred)):
        line = _Line.of(product, pool, base, some[:DEFECTIVE], rng)
        good, judged = pool.held[:_JUDGED], some[DEFECTIVE:][:_JUDGED]
        before = auroc(product, good, judged, base)
        for patience in PATIENCE:
            for arm, admitted in line.arms.items():
                memory = DynamicMemory.begin(base, DynamicSettings(patience=patience))
                for place in np.flatnonzero(admitted):
                    memory.feed(line.frames[place].astype(np.float32))
                bank = memory.bank
                yield Fed(
                    *(product.name, seed, defects, patience, arm, before, auroc(product, good, judged, bank.rows)),
                    fed=int(np.sum(admitted)),
                    fed_bad=int(np.sum(admitted & line.defective)),
                    drift=measure_drift(bank.rows, base, line.unit).value,
                    leaving=float(np.mean(bank.frames >= MIN_FRAMES)),
                )


def _too_few(product: Product, good: int, what: str) -> bool:
    few = Pool.share(good) < max(MIN_SCORES, MIN_TAIL_SCORES)
    if few:
        print(f"SKIPPED {what} of {product.name}: {good} good images leave too few to calibrate on", flush=True)
    return few


@dataclass(frozen=True)
class _Line:
    """What passes the camera: float16 [200, L, D], which of it is defective, and which of it feeds in each arm."""

    frames: Frames
    defective: npt.NDArray[np.bool_]
    arms: dict[str, npt.NDArray[np.bool_]]
    unit: float

    @classmethod
    def of(cls, product: Product, pool: Pool, base: Rows, bad: Frames, rng: np.random.Generator) -> _Line:
        good = pool.stream[np.arange(FED - len(bad)) % len(pool.stream)]
        order = rng.permutation(FED)
        frames, defective = np.concatenate([good, bad])[order], (np.arange(FED) >= len(good))[order]
        gate = FrameGate(product.scores(pool.commissioning, base), None)
        admitted = np.array([gate.admits(score) for score in product.scores(frames, base)])
        arms = {"gate": admitted, "off": np.full(FED, True), "clean": ~defective}
        return cls(frames, defective, arms, good_distance(pool.commissioning.astype(np.float32), base))


@dataclass(frozen=True)
class Round:
    """A memory that feeds itself, after so many rounds.

    Attributes:
        product: its name.
        calibrated: ``commissioning`` (declared good) or ``selected`` (the control: frames chosen by their score).
        round: 0 is before the first.
        threshold: raw.
        alarms: false alarms on held-out good images.
        held: those images.
        calibration: scores that the threshold stands on.
        auroc: I-AUROC on held-out good and defective images.
        drift: from the first bank, see :class:`edge.memory.drift.Drift`.
    """

    product: str
    calibrated: str
    round: int
    threshold: float
    alarms: int
    held: int
    calibration: int
    auroc: float
    drift: float


def self_feeding(product: Product, *, seed: int) -> Iterator[Round]:
    """Ten rounds of: score, gate, feed, recalibrate, switch; and the same recalibrated on what the gate let in."""
    rng = np.random.default_rng((seed, 10))
    if _too_few(product, len(product.train) + len(product.good), "rounds"):
        return
    pool = Pool.cut(np.concatenate([product.train, product.good]), rng)
    base = reduce_anchor(raw_bank(pool.fit), DYNAMIC_ROWS, min_frames=1).rows
    unit = good_distance(pool.commissioning.astype(np.float32), base)
    for calibrated in KINDS:
        memory, bank, chosen = DynamicMemory.begin(base), base, pool.commissioning
        for number in range(ROUNDS + 1):
            scores = product.scores(chosen, bank)
            threshold = fit_threshold(scores, None, ALPHA).value
            held, bad = product.scores(pool.held, bank), product.scores(product.bad[:_JUDGED], bank)
            yield Round(
                *(product.name, calibrated, number, threshold, int(np.sum(held >= threshold)), len(held), len(scores)),
                auroc=area(held, bad),
                drift=measure_drift(bank, base, unit).value,
            )
            gate = FrameGate(scores, None)
            frames = pool.round(number, ROUNDS)
            admitted = [f for f, score in zip(frames, product.scores(frames, bank), strict=True) if gate.admits(score)]
            for frame in admitted:
                memory.feed(frame.astype(np.float32))
            bank = memory.bank.rows
            if calibrated == "selected":
                chosen = np.concatenate([chosen, np.array(admitted, np.float16).reshape(-1, *frames.shape[1:])])
                chosen = chosen[-len(pool.commissioning) :]


def print_reduction(found: Sequence[Reduced]) -> None:
    """Print A1, and the means over products."""
    print("\nReduced memory, loss of I-AUROC against all rows:\n")
    print("| product | kind | rows | share | I-AUROC | loss |")
    print("|---" * 6 + "|")
    for one in found:
        print(f"| {one.product} | {one.kind} | {one.rows} | {one.share:.4f} | {one.auroc:.4f} | {one.loss:+.4f} |")
    for size in SIZES:
        for kind in ("anchor", "coreset", "random", "positional"):
            losses = losses_of(found, kind, size)
            if losses:
                mean, worst = np.mean(losses), max(losses)
                print(f"| mean of {len(losses)} | {kind} | {size} | | | {mean:+.4f} (worst {worst:+.4f}) |")


def losses_of(found: Sequence[Reduced], kind: str, size: str) -> list[float]:
    """Return the losses of one kind at one of ``SIZES``, one for each product."""
    return [one.loss for one in found if (one.kind, one.size) == (kind, size)]


def print_feeding(found: Sequence[Fed]) -> None:
    """Print A6: the change of each arm against the memory before, means over seeds."""
    print("\nAfter 200 frames, 10 defective: change of I-AUROC (range), defective frames that fed, drift:\n")
    print("| product | defects | patience | before | gate | off | clean | bad fed by gate | drift | leaving |")
    print("|---" * 10 + "|")
    products = dict.fromkeys(one.product for one in found)
    for defects in ("real", "scar"):
        for patience in PATIENCE:
            for name in (*products, "all"):
                some = [one for one in found if (one.defects, one.patience) == (defects, patience)]
                some = [one for one in some if name in ("all", one.product)]
                arms = [[one for one in some if one.arm == arm] for arm in ("gate", "off", "clean")]
                change = [[one.after - one.before for one in part] for part in arms]
                cells = " | ".join(f"{np.mean(c):+.4f} ({min(c):+.3f} to {max(c):+.3f})" for c in change)
                drift = " / ".join(f"{np.mean([one.drift for one in part]):.2f}" for part in arms)
                fed_bad, fed, leaving, before = (
                    float(np.mean([getattr(one, key) for one in arms[0]]))
                    for key in ("fed_bad", "fed", "leaving", "before")
                )
                print(
                    f"| {name} | {defects} | {patience} | {before:.4f} | {cells} | {fed_bad:.1f} of {fed:.0f} "
                    f"| {drift} | {leaving:.2f} |"
                )


def print_rounds(found: Sequence[Round]) -> None:
    """Print the false-alarm rate over the rounds, all products together."""
    print(f"\nFalse-alarm rate of a memory that feeds itself, budget {ALPHA:.0%}:\n")
    print("| round | commissioning set | 95 % interval | selected by score (control) | I-AUROC | control | drift |")
    print("|---" * 7 + "|")
    for number in range(ROUNDS + 1):
        ours, control = ([one for one in found if (one.round, one.calibrated) == (number, kind)] for kind in KINDS)
        rates = [rate(part) for part in (ours, control)]
        areas = [np.mean([one.auroc for one in part]) for part in (ours, control)]
        low, high = rate_interval([(one.held, one.calibration) for one in ours], ALPHA)
        print(
            f"| {number} | {rates[0]:.4f} | {low:.4f} to {high:.4f} | {rates[1]:.4f} | {areas[0]:.4f} "
            f"| {areas[1]:.4f} | {max(one.drift for one in ours):.2f} |"
        )


def rate(rounds: Sequence[Round]) -> float:
    """Return the false-alarm rate over products."""
    return sum(one.alarms for one in rounds) / sum(one.held for one in rounds)


def goals(found: dict[str, list]) -> list[Goal]:
    """Return the figures that have a goal."""
    wanted: list[Goal] = []
    reduced, fed, rounds = found["reduction"], found["feeding"], found["rounds"]
    if reduced:
        for kind, size, limit in (("anchor", "2.5%", 0.010), ("positional", "2.5%", 0.010), ("anchor", "0.6%", 0.03)):
            losses = losses_of(reduced, kind, size)
            wanted.append(Goal(f"{kind} {size}: worst loss of a product", max(losses), limit, False, spread(losses)))
        for size in ("98", "49"):
            gain = np.subtract(losses_of(reduced, "random", size), losses_of(reduced, "anchor", size))
            name = f"anchor over random at {size} rows"
            wanted.append(Goal(name, float(gain.mean()), 0.0, True, spread(gain.tolist())))
    for defects in ("real", "scar") if fed else ():
        for patience in PATIENCE:
            arms = {
                arm: [o for o in fed if (o.defects, o.patience, o.arm) == (defects, patience, arm)]
                for arm in ("gate", "off", "clean")
            }
            loss = [one.before - one.after for one in arms["gate"]]
            told = f"{defects}, patience {patience}"
            wanted.append(Goal(f"{told}: loss with the gate", float(np.mean(loss)), 0.02, False, spread(loss)))
            more = [c.after - o.after for c, o in zip(arms["clean"], arms["off"], strict=True)]
            wanted.append(Goal(f"{told}: lost to defects without", float(np.mean(more)), np.nan, True, spread(more)))
    if rounds:
        kept = [rate([o for o in rounds if (o.round, o.calibrated) == (n, KINDS[0])]) for n in range(ROUNDS + 1)]
        first = [(o.held, o.calibration) for o in rounds if (o.round, o.calibrated) == (0, KINDS[0])]
        high = rate_interval(first, ALPHA)[1]
        wanted.append(Goal("false-alarm rate, worst of ten rounds", max(kept), high, False, spread(kept)))
        last = rate([o for o in rounds if (o.round, o.calibrated) == (ROUNDS, KINDS[1])])
        wanted.append(Goal("the same, control", last, high, True, "shows that the figure can fail"))
    return wanted


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, object]]]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders in MVTec layout")
    parser.add_argument("--size", type=int, help="224, or 128 on generated webs")
    parser.add_argument("--most", type=int, default=360, help="most training images of a folder, and test images")
    parser.add_argument("--test", type=int, default=120, help="most test images for the reduction, half of them good")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of splits and orders")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    parser.add_argument("--json", type=Path, help="file for every figure")
    options = parser.parse_args(argv)
    heading("memory_update")
    found: dict[str, list] = {name: [] for name in QUESTIONS}

    def run(folders: Sequence[Path], size: int) -> None:
        embed, layout = open_embedder()
        for folder in folders:
            product = open_product(folder, embed, layout, size=size, most=options.most)
            for name, part in answers(product, options.only, seeds=options.seeds, test=options.test).items():
                found[name] += part
            if options.json:  # after each folder: what is done stays if a later one fails
                options.json.write_text(json.dumps(as_dicts(found)))

    missing = [str(folder) for folder in options.data if not folder.is_dir()]
    if missing:
        print(f"SKIPPED, no such folder: {', '.join(missing)}", flush=True)
    present = [folder for folder in options.data if folder.is_dir()]
    if present:
        run(present, options.size or 224)
    elif not options.data:
        with generated_folders(train=options.most, test=options.most) as folders:
            run(folders, options.size or 128)
    report(found)
    return as_dicts(found)


def answers(product: Product, only: Sequence[str], *, seeds: Sequence[int], test: int) -> dict[str, list]:
    """Answer the questions for one product."""
    found: dict[str, list] = {}
    if "reduction" in only:
        found["reduction"] = list(reduction(product, most_test=test, seed=seeds[0]))
    if "feeding" in only:
        found["feeding"] = [one for seed in seeds for one in feeding(product, seed=seed)]
    if "rounds" in only:
        found["rounds"] = list(self_feeding(product, seed=seeds[0]))
    return found


def report(found: dict[str, list]) -> None:
    """Print every table that has figures, and the goals."""
    for name, show in zip(QUESTIONS, (print_reduction, print_feeding, print_rounds), strict=True):
        if found[name]:
            show(found[name])
    print()
    print_goals(goals(found))


def as_dicts(found: dict[str, list]) -> dict[str, list[dict[str, object]]]:
    """Return every figure as plain values."""
    return {name: [asdict(one) for one in part] for name, part in found.items()}


if __name__ == "__main__":
    main()
