"""From a trained trunk and head to a verified bundle: export, quantise, prove, calibrate, write, rename into place.

It must not know how a method was trained; of data it sees held-out and declared-good canvases and a defect callback.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from deploy.embedding import embedding_ids
from deploy.export import export_head, tap_shapes
from deploy.moments import reference_images, reference_of
from deploy.parity import (
    LEAST_GOOD_IMAGES,
    Jitter,
    MakeDefects,
    ParityReport,
    ParityRules,
    PathScores,
    Sample,
    draw_sample,
    judge,
    require,
)
from deploy.progress import Progress, no_progress
from deploy.quantize import quantize_head
from deploy.running import GraphPair, Judged, pool_all, torch_judged
from deploy.state import empty_state, state_entries, stored_state
from deploy.trunks import TrunkFiles, build_trunk_files
from edge.adaptation.reference import tensors_of
from edge.bundle import (
    MANIFEST,
    Bundle,
    Calibration,
    DepthLayout,
    Engine,
    Golden,
    Graph,
    Inputs,
    Manifest,
    Modality,
    Pooling,
    Precision,
    Provenance,
    SignalLayout,
    manifest_bytes,
    sha256_file,
)
from edge.errors import BundleError, DataError, EngineError, UsageError
from edge.inference.engines import available_engines, supports
from edge.inference.sessions import PRODUCT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

Canvases = npt.NDArray[Any]
Pair = tuple[Engine, Precision]

TRUNK, TRUNK_INT8, HEAD, HEAD_INT8 = "trunk.onnx", "trunk.int8.onnx", "head.onnx", "head.int8.onnx"
STATE, COMMISSIONING, GOLDEN = "state.safetensors", "commissioning.npz", "golden/frames.npz"
MOMENTS = "moments.safetensors"
_OWN_FILES = {MANIFEST, TRUNK, TRUNK_INT8, HEAD, HEAD_INT8, STATE, COMMISSIONING, GOLDEN, MOMENTS}
# Maps compared cell by cell with torch, golden frames of each kind, images that head ranges are measured on.
_COMPARED, _GOLDEN_EACH, _RANGE_IMAGES = 16, 3, 32
# Golden tolerances. float32: what the gate allows between engines. Others: a tenth of the good scores' interquartile
# range, well under the shift that the gate refuses (0.25), above what another processor's rounding gives.
_FLOAT_TOLERANCE, _ROUNDED_TOLERANCE = 1e-3, 0.1


@dataclass(frozen=True)
class BundleRequest:
    """What a bundle is made from.

    Attributes:
        trunk: the shared trunk, in eval mode, on the CPU; see :func:`deploy.export.export_trunk`.
        head: the method's head, in eval mode, on the CPU; see :func:`deploy.export.export_head`. One whose banks a
            box may replace has an attribute ``memory_layout``, an :class:`edge.bundle.MemoryLayout`; one of several
            experts has ``subclasses``, the name of each.
        method: its name.
        product: name of the product, or of all together.
        products: their names where there are several. ``holdout_subclasses`` then says which one each held-out image
            shows, and there are at least 6 of each.
        preprocessing: from frame to network inputs.
        provenance: where the data and weights came from.
        holdout: uint8 [n, canvas_height, canvas_width, 3] RGB, good images that nothing was fitted on, n >= 6.
        groups: one name per held-out image; images of one group are not independent.
        holdout_subclasses: one name per held-out image, for a head of several experts.
        reference: uint8 [k, ...] canvases that the method learned from, to measure the experts' moments on; where there
            are none, the held-out ones serve.
        reference_subclasses: one name per such canvas, for a head of several experts; without names its bundle has no
            moments.
        make_defects: see :data:`deploy.parity.MakeDefects`.
        modality: what the canvases are; of signals and depth maps ``trunk_files`` must be given.
        signal: layout of a signal.
        depth: layout of a depth map.
        jitter: makes the copies that the gate needs of other modalities than images.
        commissioning: uint8 [m, ...] canvases of images declared good; their embeddings go into the bundle. m may
            be 0; a head without embeddings ignores them.
        commissioning_groups: one name per commissioning image; images of one group are not independent. Without any,
            each image is a group of its own.
        commissioning_products: which product each shows, where there are several.
        pooling: from map to score.
        trunk_files: built before; None builds them from ``generic`` in the cache.
        generic: uint8 [k, H, W, 3], the fixed generic set; needed where ``trunk_files`` is None.
        precisions: wanted. bfloat16 is left out where the processor lacks it.
        optional: precisions that are left out, with the figures in the manifest, where the gate refuses them; the
            others must pass.
        engines: None takes every engine that is installed.
        metrics: figures for the manifest.
        attachments: further files of the bundle, such as report.html, by name.
        rules: limits of the parity gate.
        seed: of the jitter in the gate.
        created: None takes the present.
        progress: called with (what is being done, steps done, steps in all).
    """

    trunk: nn.Module
    head: nn.Module
    method: str
    product: str
    preprocessing: Inputs
    provenance: Provenance
    holdout: Canvases
    groups: Sequence[str]
    make_defects: MakeDefects
    modality: Modality = Modality.IMAGE
    signal: SignalLayout | None = None
    depth: DepthLayout | None = None
    jitter: Jitter | None = None
    products: Sequence[str] = ()
    holdout_subclasses: Sequence[str] = ()
    reference: Canvases = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))
    reference_subclasses: Sequence[str] = ()
    commissioning: Canvases = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))
    commissioning_groups: Sequence[str] = ()
    commissioning_products: Sequence[str] = ()
    pooling: Pooling = field(default_factory=Pooling)
    trunk_files: TrunkFiles | None = None
    generic: Canvases | None = None
    precisions: Sequence[Precision] = (Precision.FLOAT32, Precision.BFLOAT16, Precision.INT8)
    optional: Sequence[Precision] = (Precision.BFLOAT16,)
    engines: Sequence[Engine] | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    rules: ParityRules = field(default_factory=ParityRules)
    seed: int = 0
    created: datetime | None = None
    progress: Progress = no_progress


def pack(request: BundleRequest, out: Path) -> Bundle:
    """Make a bundle.

    It is built in a folder beside ``out``, synced to disk and renamed; on any failure nothing is left behind.
    An int8 head that the gate refuses is replaced once by a float32 head on the int8 trunk.

    Args:
        request: see :class:`BundleRequest`.
        out: folder to make; may exist if it is empty.

    Returns:
        The bundle, opened and verified.

    Raises:
        UsageError: ``out`` exists and is not empty, or no engine or precision is left to run.
        DataError: a canvas has another size than the preprocessing says, or the modules do not export.
        GateError: the parity gate refused; the message has the figures.
        BundleError: the folder cannot be written.
    """
    out = Path(out)
    _refuse_existing(out)
    _check(request)
    pairs = _pairs(request)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            _Packer(request, work, pairs).run()
            _sync(work)
            work.chmod(0o755)
            work.rename(out)
            _sync_folder(out.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise BundleError(
            f"{out}: cannot be written ({error.strerror or error}); free space or choose another folder"
        ) from error
    return Bundle.open(out)


class _Packer:
    """One packing run, in the folder ``work``."""

    def __init__(self, request: BundleRequest, work: Path, pairs: Sequence[Pair]) -> None:
        self.request, self.work, self.pairs = request, work, tuple(pairs)
        self.steps, self.done = 5 + 2 * len(pairs), 0
        self.products = tuple(request.products)
        self.subclasses: tuple[str, ...] = self.products or tuple(getattr(request.head, "subclasses", ("",)))
        self.shown = self._indices(request.holdout_subclasses)
        self.images = None
        if request.modality is Modality.IMAGE:  # moments are of colours and of the shared trunk's taps
            self.images = reference_images(
                self.subclasses,
                (request.reference, request.reference_subclasses),
                (request.holdout, request.holdout_subclasses),
            )

    def run(self) -> None:
        request = self.request
        self._step("trunk")
        self._write_graphs()
        self._step("defects of low contrast")
        reference_pair = self._open(next(pair for pair in self.pairs if pair[1] is Precision.FLOAT32))
        sample = draw_sample(
            request.holdout,
            request.make_defects,
            # Held-out images, or defects on them in turn.
            lambda canvases: pool_all(reference_pair.maps(canvases, self._in_turn(len(canvases))), request.pooling),
            rules=request.rules,
            seed=request.seed,
            copies=request.jitter,
            products=self.shown,
        )
        self._step("torch")
        reference = self._scores(
            lambda canvases, products: torch_judged(
                request.trunk, request.head, canvases, request.preprocessing, products=products
            ),
            sample,
        )
        report, kept = self._prove(sample, reference)
        calibrations = [self._calibrate(pair) for pair in kept]
        golden = self._write_golden(kept, sample, report.good_iqr)
        commissioning = self._write_commissioning(kept)
        self._write_moments(kept)
        self._write_manifest(
            report=report, kept=kept, calibrations=calibrations, golden=golden, commissioning=commissioning
        )

    def _indices(self, names: Sequence[str]) -> npt.NDArray[np.int64] | None:
        return np.array([self.products.index(name) for name in names], np.int64) if self.products else None

    def _in_turn(self, count: int) -> npt.NDArray[np.int64] | None:
        """Return which product each of ``count`` rows shows that are held-out images over and over."""
        return None if self.shown is None else np.resize(self.shown, count)

    def _step(self, what: str) -> None:
        self.request.progress(what, self.done, self.steps)
        self.done = min(self.done + 1, self.steps)

    def _write_graphs(self) -> None:
        request, work = self.request, self.work
        files = request.trunk_files
        if files is None:
            if request.generic is None:
                raise UsageError("neither trunk files nor a generic set to make them from; give one of the two")
            files = build_trunk_files(request.trunk, request.generic)
        shutil.copyfile(files.float32, work / TRUNK)
        shapes = tap_shapes(request.trunk, request.preprocessing.tile_shape, request.preprocessing.dtype)
        export_head(request.head, work / HEAD, tap_shapes=shapes)
        if request.head.state_names:
            save_file(stored_state(request.head), work / STATE)
        for name, content in request.attachments.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(content)
        if any(precision is Precision.INT8 for _, precision in self.pairs):
            shutil.copyfile(files.int8, work / TRUNK_INT8)

    def _quantize_head(self) -> bool:
        """Write head.int8.onnx; False where it holds nothing in int8."""
        request = self.request
        shutil.copyfile(self.work / HEAD, self.work / HEAD_INT8)
        engine = Engine.ONNXRUNTIME if Engine.ONNXRUNTIME in available_engines() else self.pairs[0][0]
        source = self._open((engine, Precision.INT8))
        good = request.commissioning if len(request.commissioning) else request.holdout
        plain = request.make_defects(1.0)
        shown = self._indices(request.commissioning_products) if len(request.commissioning) else self.shown
        # Of several products all take part: a range that one never reaches says nothing of another.
        images = [
            *_evenly(good, shown, _RANGE_IMAGES), *_evenly(plain, self._in_turn(len(plain)), _RANGE_IMAGES // 2)
        ]  # fmt: skip
        names = quantize_head(
            self.work / HEAD,
            self.work / HEAD_INT8,
            [source.kept_inputs(image, product) for image, product in images],
            state_names=tuple(request.head.state_names),
            float_ops=tuple(getattr(request.head, "float_ops", ())),
        )
        return bool(names)

    def _prove(self, sample: Sample, reference: PathScores) -> tuple[ParityReport, list[Pair]]:
        request = self.request
        scores = {pair: self._measure(pair, sample) for pair in self.pairs if pair[1] is not Precision.INT8}
        int8 = [pair for pair in self.pairs if pair[1] is Precision.INT8]
        int8_head = bool(int8) and self._quantize_head()
        while True:
            scores |= {pair: self._measure(pair, sample) for pair in int8}
            report = judge(
                sample, reference, scores, rules=request.rules, optional=request.optional, int8_head=int8_head
            )
            refused = any(path.refusals for path in report.paths if path.precision is Precision.INT8)
            if not (refused and int8_head):
                break
            shutil.copyfile(self.work / HEAD, self.work / HEAD_INT8)
            int8_head = False
        require(report)
        kept = [pair for pair in self.pairs if f"{pair[0].value} {pair[1].value}" not in report.dropped]
        if int8 and not any(precision is Precision.INT8 for _, precision in kept):
            (self.work / TRUNK_INT8).unlink()
            (self.work / HEAD_INT8).unlink()
        return report, kept

    def _measure(self, pair: Pair, sample: Sample) -> PathScores:
        self._step(f"parity {pair[0].value} {pair[1].value}")
        return self._scores(self._open(pair).judged, sample)

    def _scores(self, judged: Callable[[Canvases, npt.NDArray[np.int64] | None], Judged], sample: Sample) -> PathScores:
        good, defective = judged(sample.good, sample.good_products), judged(sample.defective, sample.defect_products)
        return PathScores(
            good=pool_all(good.maps, self.request.pooling),
            defective=pool_all(defective.maps, self.request.pooling),
            maps=good.maps[:_COMPARED],
            routes=good.routes,
        )

    def _open(self, pair: Pair) -> GraphPair:
        engine, precision = pair
        int8 = precision is Precision.INT8
        return GraphPair(
            self.work / (TRUNK_INT8 if int8 else TRUNK),
            self.work / (HEAD_INT8 if int8 else HEAD),
            engine=engine,
            precision=precision,
            taps=self.request.head.tap_names,
            preprocessing=self.request.preprocessing,
            map_stride=self.request.head.map_stride,
            takes_product=bool(getattr(self.request.head, "takes_product", False)),
        )

    def _calibrate(self, pair: Pair) -> Calibration:
        self._step(f"calibrate {pair[0].value} {pair[1].value}")
        maps = self._open(pair).maps(self.request.holdout, self.shown)
        name = f"calibration/{pair[0].value}-{pair[1].value}.npz"
        half = maps.astype(np.float16)
        if not np.isfinite(half).all():
            raise DataError(
                f"{name}: anomaly maps reach {np.abs(maps).max():.3g}, beyond float16 (65504); scale the head's map"
            )
        self._save(
            name,
            scores=pool_all(maps, self.request.pooling),
            maps=half,
            groups=np.array(self.request.groups, np.str_),
            **self._named(self.request.holdout_subclasses),
        )
        return Calibration(engine=pair[0], precision=pair[1], file=name, count=len(maps))

    def _write_golden(self, kept: Sequence[Pair], sample: Sample, iqr: float) -> Golden:
        self._step("golden frames")
        kinds = ((self.request.holdout, self.shown), (sample.defective, sample.defect_products))
        drawn = [_spread(*kind) for kind in kinds]
        canvases = np.concatenate([canvas[rows] for (canvas, _), rows in zip(kinds, drawn, strict=True)])
        shown = [products[rows] for (_, products), rows in zip(kinds, drawn, strict=True) if products is not None]
        products = np.concatenate(shown) if shown else None
        scores = {pair: pool_all(self._open(pair).maps(canvases, products), self.request.pooling) for pair in kept}
        tolerance = {}
        for pair, values in scores.items():
            # Engines that run one file differ by the order of their sums: their difference is the noise to allow.
            peers = [other for key, other in scores.items() if key[1] is pair[1]]
            noise = max(float(np.abs(values - other).max()) for other in peers)
            if pair[1] is Precision.FLOAT32:
                allowed = max(_FLOAT_TOLERANCE * float(np.abs(values).max()), 2 * noise)
            else:
                allowed = max(_ROUNDED_TOLERANCE * iqr, 2 * noise)
            tolerance[_key(pair)] = allowed
        named = {} if products is None else {PRODUCT: products}
        self._save(
            GOLDEN, canvas=canvases, **{f"score_{_key(pair)}": values for pair, values in scores.items()}, **named
        )
        return Golden(file=GOLDEN, count=len(canvases), tolerance=tolerance)

    def _write_commissioning(self, kept: Sequence[Pair]) -> str | None:
        """Embeddings of images declared good, float16 [m, tiles, L, D], one array per precision; and their groups."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for precision in dict.fromkeys(precision for _, precision in kept):
            runner = self._open(next(pair for pair in kept if pair[1] is precision))
            if not runner.has_embedding or not len(self.request.commissioning):
                return None
            shown = self._indices(self.request.commissioning_products)
            arrays[f"embedding_{precision.value}"] = runner.embeddings(self.request.commissioning, shown)
        names = self.request.commissioning_groups or [str(index) for index in range(len(self.request.commissioning))]
        own = self._named(self.request.commissioning_products)
        self._save(COMMISSIONING, groups=np.array(names, np.str_), **own, **arrays)
        return COMMISSIONING

    def _write_moments(self, kept: Sequence[Pair]) -> None:
        """Write what each expert was trained on, as each precision shows it: taps of int8 are others than float32's."""
        self._step("moments")
        if self.images is None:
            return
        tensors: dict[str, npt.NDArray[np.float32]] = {}
        for precision in dict.fromkeys(precision for _, precision in kept):
            runner = self._open(next(pair for pair in kept if pair[1] is precision))
            tensors |= tensors_of(reference_of(self.images, runner.moments), precision)
        save_file(tensors, self.work / MOMENTS)

    def _named(self, products: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Return the array of products of a file; none where there is one product."""
        return {"products": np.array(products, np.str_)} if self.products else {}

    def _save(self, name: str, **arrays: npt.NDArray[Any]) -> None:
        (self.work / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(self.work / name, allow_pickle=False, **arrays)

    def _write_manifest(
        self,
        *,
        report: ParityReport,
        kept: Sequence[Pair],
        calibrations: Sequence[Calibration],
        golden: Golden,
        commissioning: str | None,
    ) -> None:
        request, work = self.request, self.work
        int8 = any(precision is Precision.INT8 for _, precision in kept)
        states = tuple(request.head.state_names)
        trunks = {pair[1]: work / (TRUNK_INT8 if pair[1] is Precision.INT8 else TRUNK) for pair in kept}
        ids = embedding_ids(trunks, work / HEAD, states, request.preprocessing)
        # From here on the state is in its own file alone: a box puts it into the graphs it opens.
        for path in (work / HEAD, work / HEAD_INT8):
            if path.exists():
                empty_state(path, states)
        files = {
            path.relative_to(work).as_posix(): sha256_file(path) for path in sorted(work.rglob("*")) if path.is_file()
        }
        manifest = Manifest(
            method=request.method,
            product=request.product,
            modality=request.modality,
            signal=request.signal,
            depth=request.depth,
            preprocessing=request.preprocessing,
            trunk=Graph(float32=TRUNK, int8=TRUNK_INT8 if int8 else None, id=files[TRUNK]),
            head=Graph(float32=HEAD, int8=HEAD_INT8 if int8 else None, id=files[HEAD]),
            taps=tuple(request.head.tap_names),
            map_stride=request.head.map_stride,
            state=state_entries(request.head),
            state_file=STATE if states else None,
            pooling=request.pooling,
            embedding_id=ids,
            calibration=tuple(calibrations),
            commissioning_file=commissioning,
            moments_file=MOMENTS if self.images else None,
            subclasses=self.subclasses,
            products=self.products,
            takes_product=bool(getattr(request.head, "takes_product", False)),
            product_state=tuple(getattr(request.head, "product_state", ())),
            memory=getattr(request.head, "memory_layout", None),
            golden=golden,
            parity=report.model_dump(mode="json"),
            metrics=dict(request.metrics),
            provenance=self._provenance(),
            created=request.created or datetime.now(timezone.utc),
            files=files,
        )
        (work / MANIFEST).write_bytes(manifest_bytes(manifest))

    def _provenance(self) -> Provenance:
        if self.images is None:
            return self.request.provenance
        found = {"moments_from": self.images.source, "moments_images": len(self.images.seen)}
        return self.request.provenance.model_copy(update=found)


def _key(pair: Pair) -> str:
    return f"{pair[0].value}_{pair[1].value}"


def _spread(canvases: Canvases, products: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64]:
    """Return which rows are golden frames: a few of all, and at least one of each product."""
    kinds = np.zeros(len(canvases), np.int64) if products is None else products
    known = np.unique(kinds)
    each = -(-_GOLDEN_EACH // len(known))
    own = [np.flatnonzero(kinds == one) for one in known]
    return np.sort(
        np.concatenate([rows[np.unique(np.linspace(0, len(rows) - 1, each).round().astype(int))] for rows in own])
    )


def _evenly(canvases: Canvases, products: npt.NDArray[np.int64] | None, most: int) -> list[tuple[Canvases, int]]:
    """Return canvases with the product of each: the first of them, or of several products the first of each."""
    if products is None:
        return [(canvas, 0) for canvas in canvases[:most]]
    known = np.unique(products)
    each = -(-most // len(known))
    rows = np.concatenate([np.flatnonzero(products == one)[:each] for one in known])
    return [(canvases[row], int(products[row])) for row in rows]


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists already; a bundle is never changed in place, give a new folder")


def _check(request: BundleRequest) -> None:
    expected, dtype = request.preprocessing.canvas_shape, request.preprocessing.dtype
    for what in ("holdout", "commissioning", "reference"):
        canvases: Canvases = getattr(request, what)
        if what != "holdout" and not len(canvases):
            continue
        if canvases.dtype != dtype or canvases.shape[1:] != expected:
            raise DataError(f"{what} canvases are {canvases.dtype} {canvases.shape}, expected {dtype} [n, {expected}]")
    if len(request.groups) != len(request.holdout):
        raise DataError(f"{len(request.groups)} groups for {len(request.holdout)} held-out images; give one each")
    if request.commissioning_groups and len(request.commissioning_groups) != len(request.commissioning):
        raise DataError(
            f"{len(request.commissioning_groups)} groups for {len(request.commissioning)} commissioning images; give "
            "one each, or none"
        )
    _check_products(request)
    for name in request.attachments:
        if name in _OWN_FILES or ".." in name:
            raise UsageError(f"attachment {name!r}: that name belongs to the bundle; choose another")


def _check_products(request: BundleRequest) -> None:
    products, head = tuple(request.products), request.head
    if not products:
        if getattr(head, "takes_product", False) or getattr(head, "product_state", ()):
            raise DataError("the head takes products, but the bundle is for one; name its products")
        return
    own = tuple(getattr(head, "subclasses", ())) or products
    if len(set(products)) < len(products) or own != products:
        raise DataError(f"products {', '.join(products)} are not those of the head: {', '.join(own)}; train again")
    for what, labels, canvases in (
        ("held-out", request.holdout_subclasses, request.holdout),
        ("commissioning", request.commissioning_products, request.commissioning),
    ):
        if len(labels) != len(canvases):
            raise DataError(f"{len(labels)} products for {len(canvases)} {what} images; give one each")
        unknown = sorted(set(labels) - set(products))
        if unknown:
            raise DataError(f"{what} images of {unknown[0]!r}, which the bundle does not serve; train again with it")
    for name in products:
        count = list(request.holdout_subclasses).count(name)
        if count < LEAST_GOOD_IMAGES:
            raise DataError(
                f"{count} held-out good images of {name!r}; the parity gate needs at least {LEAST_GOOD_IMAGES} of "
                "each product, hold out more"
            )


def _pairs(request: BundleRequest) -> list[Pair]:
    engines = available_engines() if request.engines is None else tuple(request.engines)
    if not engines:
        raise EngineError("no inference engine is installed; run: pip install 'lineward[deploy]'")
    if Precision.FLOAT32 not in request.precisions:
        raise UsageError("precision float32 cannot be left out: it is what boxes fall back to")
    return [
        (engine, precision)
        for precision in dict.fromkeys(request.precisions)
        for engine in engines
        if precision is not Precision.BFLOAT16 or supports(engine, precision)
    ]


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
