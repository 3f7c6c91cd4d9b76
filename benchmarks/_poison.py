"""Fleets for the poison benchmark: boxes by condition, what the trainer knew of them, and what poisoners have.

It must not know gates or figures.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import cv2
import numpy as np

from benchmarks._fleet import open_folder
from benchmarks._setting import quiet
from benchmarks._updates import make_update
from deploy.aggregator.canaries import Canaries
from edge.memory.bank import MemoryBank
from edge.memory.reduce import reduce_anchor
from edge.memory.search import nearest
from trainer.data.folder import load_mask
from trainer.data.images import load_image
from trainer.evaluation.fleet_embed import SIDE
from trainer.evaluation.fleet_poison import Poison, poisoned
from trainer.evaluation.fleet_scene import KNOWN_DEFECTS, UNKNOWN_DEFECTS, make_sites
from trainer.features import load_canvases
from trainer.synthesis.image2d import FAMILIES, make_defects

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from edge.federation.update import MemoryUpdate
    from trainer.data.folder import Sample
    from trainer.evaluation.fleet_embed import Embedder

    Half = npt.NDArray[np.float16]
    Single = npt.NDArray[np.float32]
    Masks = npt.NDArray[np.bool_]

ROWS, REFERENCE_ROWS = 512, 1024
ALARM = 0.99  # quantile of held-out good patches' distances, above which one alarms
COVERED = 0.5  # of a patch, from which on it shows a defect
_HELD, _TRAINER = 0.2, 0.2
_DEFECTS_EACH = 10  # on each held-out image, one of each family
_MOST_HELD, _MOST_TEST, _LEAST_TRAIN, _LEAST_BAD = 6, 24, 12, 4
_BOXES, _WEBS = 7, 3
_PATCHES = 12_000
_IMAGES = {"learn": 20, "commissioning": 6, "canary_good": 6, "good": 10}


@dataclass(frozen=True)
class Client:
    """What one box sees, and what of it the trainer has where it knew that condition.

    Attributes:
        name: of the condition.
        frames: of its memory.
        bank: what it would send, reduced from its good frames.
        trainer: float16 [T, L, D], good frames of the trainer's bank.
        held: float16 [H, L, D], good frames of the canaries.
        canary: float32 [n, D], patches of synthetic defects on held frames.
        good: float16 [G, L, D], to judge.
        bad: float16 [B, L, D], of which every other one is the poisoner's.
        defects: float32 [k, D] for each of ``bad``.
    """

    name: str
    frames: int
    bank: MemoryBank
    trainer: Half
    held: Half
    canary: Single
    good: Half
    bad: Half
    defects: tuple[Single, ...]


@dataclass(frozen=True)
class Fleet:
    """A draw: who is there, who lies, what the trainer knew.

    Attributes:
        product: name of the scene.
        clients: the boxes.
        liars: numbers of the poisoners.
        known: for each box, whether the trainer knew its condition.
        honest: what each box would send.
        reference: the trainer's bank.
        canaries: the trainer's.
        taught: float32 [n, D], rows of real defects that poisoners have.
    """

    product: str
    clients: tuple[Client, ...]
    liars: tuple[int, ...]
    known: tuple[bool, ...]
    honest: tuple[MemoryUpdate, ...]
    reference: MemoryBank
    canaries: Canaries
    taught: Single

    def sent(self, kind: Poison | None, share: float, rng: np.random.Generator) -> list[MemoryUpdate]:
        """Return what arrives where poisoners send ``kind``; ``share`` of a defects' update's rows are defects."""
        sent = list(self.honest)
        for liar in self.liars if kind is not None else ():
            honest = self.honest[liar]
            spoilt = poisoned(honest, kind, defects=self.taught, rng=rng) if kind else honest
            if kind is Poison.DEFECTS and share < 1:
                drawn = rng.permutation(len(spoilt.rows))[: max(1, round(share * len(honest.rows)))]
                rows = np.concatenate([spoilt.rows[drawn], honest.rows[len(drawn) :]])
                spoilt = replace(
                    honest, rows=rows, support=honest.support[: len(rows)], frames=honest.frames[: len(rows)]
                )
            sent[liar] = spoilt
        return sent


def bank_of(frames: Half, size: int) -> MemoryBank:
    """Reduce at most 12,000 patches of frames to a bank whose counts are patches."""
    patches = frames.reshape(-1, frames.shape[-1])
    drawn = np.sort(np.random.default_rng(0).permutation(len(patches))[:_PATCHES])
    rows = patches[drawn].astype(np.float32)
    ones = np.ones(len(rows), np.float32)
    return reduce_anchor(MemoryBank(rows, ones, ones), size, min_frames=1)


def draw_fleet(product: str, clients: Sequence[Client], *, boxes: int, liars: int, seed: int, space: str) -> Fleet:
    """Draw boxes, poisoners and the half of the conditions that the trainer knew."""
    rng = np.random.default_rng((seed, boxes))
    chosen = tuple(clients[index] for index in rng.permutation(len(clients))[:boxes])
    known = np.zeros(len(chosen), bool)
    known[rng.permutation(len(chosen))[: (len(chosen) + 1) // 2]] = True
    seen = [client for client, one in zip(chosen, known, strict=True) if one]
    reference = bank_of(np.concatenate([client.trainer for client in seen]), REFERENCE_ROWS)
    held = np.concatenate([client.held for client in seen])
    good = held.reshape(-1, held.shape[-1]).astype(np.float32)
    good = good[rng.permutation(len(good))[:4000]]
    defect = np.concatenate([client.canary for client in seen])
    defect = defect[rng.permutation(len(defect))[:2000]]
    threshold = float(np.sqrt(np.quantile(nearest(good, reference.rows)[0], ALARM)))
    return Fleet(
        product=product,
        clients=chosen,
        liars=tuple(rng.permutation(len(chosen))[:liars].tolist()),
        known=tuple(known.tolist()),
        honest=tuple(_update(client, product, number, space) for number, client in enumerate(chosen)),
        reference=reference,
        canaries=Canaries(space, product, defect, good, threshold),
        taught=np.concatenate([rows for client in chosen for rows in client.defects[::2]]),
    )


def _update(client: Client, product: str, number: int, space: str) -> MemoryUpdate:
    return make_update(
        client.bank.rows,
        client.bank.support,
        number=number,
        product=product,
        subclass=client.name,
        embedding_id=space,
        n_frames=client.frames,
    )


def open_clients(folder: Path, embedder: Embedder, keep: Path | None) -> list[Client]:
    """Make a client of each condition of a folder with enough images."""
    read = open_folder(folder, embedder, keep)
    trained = np.array([sample.condition for sample in read.train_samples])
    tested = np.array([sample.condition for sample in read.test_samples])
    bad = np.array([sample.anomalous for sample in read.test_samples])
    names = [
        str(name)
        for name in np.unique(trained)
        if (trained == name).sum() >= _LEAST_TRAIN and (bad & (tested == name)).sum() >= _LEAST_BAD
    ]
    parts = {name: _parted(np.flatnonzero(trained == name)) for name in names}
    held = [index for name in names for index in parts[name][0]]
    embed = partial(_canary_rows, [read.train_samples[index] for index in held], embedder)
    canary = _kept(keep, f"canary-{read.name}-{embedder.embedding_id[:12]}-{len(held)}", embed)
    cells, rows = canary[:, -1].astype(np.float32), canary[:, :-1].astype(np.float32)
    clients = []
    for name in names:
        first, second, rest = parts[name]
        chosen = np.isin(np.array(held)[cells.astype(int)], first)
        wrong = np.flatnonzero(bad & (tested == name))[:_MOST_TEST]
        fine = np.flatnonzero(~bad & (tested == name))[:_MOST_TEST]
        clients.append(
            Client(
                name=name,
                frames=len(rest),
                bank=bank_of(read.train[rest], ROWS),
                trainer=read.train[second],
                held=read.train[first],
                canary=rows[chosen],
                good=read.test[fine],
                bad=read.test[wrong],
                defects=tuple(_defect_rows(read.test[index], _mask(read.test_samples[index])) for index in wrong),
            )
        )
    return clients


def _parted(index: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
    """Cut a condition's training images: held out for canaries, the trainer's, the box's."""
    drawn = np.random.default_rng(len(index)).permutation(index)
    held = min(_MOST_HELD, round(_HELD * len(index)))
    trainer = held + round(_TRAINER * len(index))
    return drawn[:held], drawn[held:trainer], drawn[trainer:]


def _canary_rows(samples: Sequence[Sample], embedder: Embedder) -> Half:
    """Return patches of synthetic defects float16 [n, D + 1]; the last column is the image's number (below 2048)."""
    canvases = load_canvases(samples, embedder.judge.preprocessing, progress=quiet, what="")
    return canary_rows(np.repeat(canvases, _DEFECTS_EACH, 0), embedder, _DEFECTS_EACH)


def canary_rows(canvases: npt.NDArray[np.uint8], embedder: Embedder, each: int) -> Half:
    """Put a defect of each family in turn on canvases, of which ``each`` consecutive ones are one image."""
    defective, masks = make_defects(canvases, seed=5, families=tuple(FAMILIES), size=(0.03, 0.2))
    found = []
    for number, (frame, mask) in enumerate(zip(embedder(defective), masks, strict=True)):
        rows = _defect_rows(frame, mask)
        found.append(np.column_stack([rows, np.full(len(rows), number // each)]).astype(np.float16))
    return np.concatenate(found)


def _mask(sample: Sample) -> Masks:
    mask = load_mask(sample, load_image(sample.path).shape[:2]).astype(np.uint8)
    return cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST).astype(np.bool_)


def _defect_rows(frame: Half, mask: Masks) -> Single:
    """Return the patches that a defect covers by half; where it is smaller, the one that it covers most."""
    side = math.isqrt(len(frame))
    cell = mask.shape[0] // side
    covered = mask.reshape(side, cell, side, cell).mean((1, 3)).ravel()
    return frame[covered >= min(COVERED, covered.max())].astype(np.float32)


def generated_clients(embedder: Embedder, seed: int) -> dict[str, list[Client]]:
    """Make a fleet of each kind of generated web; poisoners have all families of defects, canaries every other."""
    scenes: dict[str, list[Client]] = defaultdict(list)
    for site in make_sites(_BOXES * _WEBS, seed=seed, products=_WEBS):
        good = {split: embedder(site.good(split, _IMAGES[split])) for split in ("learn", "commissioning", "good")}
        canvases = site.good("canary_good", _IMAGES["canary_good"])
        images, masks = site.defective("defective", 20, UNKNOWN_DEFECTS)
        bad = embedder(images)
        known, where = site.defective("canary_defective", 3 * _IMAGES["canary_good"], KNOWN_DEFECTS)
        scenes[site.product].append(
            Client(
                name=str(site.condition),
                frames=len(good["learn"]),
                bank=bank_of(good["learn"], ROWS),
                trainer=good["commissioning"],
                held=embedder(canvases),
                canary=np.concatenate([_defect_rows(f, m) for f, m in zip(embedder(known), where, strict=True)]),
                good=good["good"],
                bad=bad,
                defects=tuple(_defect_rows(frame, mask) for frame, mask in zip(bad, masks, strict=True)),
            )
        )
        print(f"  drew {site.product} {site.condition}", file=sys.stderr, flush=True)
    return dict(scenes)


def _kept(keep: Path | None, name: str, make: Callable[[], Half]) -> Half:
    if keep is None:
        return make()
    path = keep / f"{name}.npy"
    if not path.exists():
        keep.mkdir(parents=True, exist_ok=True)
        np.save(path, make())
    return np.load(path)
