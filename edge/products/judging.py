"""The judges of a camera whose bundle is for several products: one each, from that product's own good scores.

It must not know frames; what a product lacks of scores it borrows, and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.cameras import make_judge
from edge.errors import DataError
from edge.judgement.threshold import fit_threshold

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge.bundle import CalibrationScores
    from edge.inference.detector import Detector
    from edge.judgement.threshold import RunTimeThreshold
    from edge.judgement.verdicts import Judge
    from edge.products.product_file import ProductFile
    from edge.settings import CameraSettings


def product_judges(
    camera: CameraSettings,
    detector: Detector,
    given: Callable[[str, str], RunTimeThreshold | None],
    added: Sequence[ProductFile] | None = None,
) -> tuple[Judge, ...]:
    """Make the judges of one camera, of the bundle's products and of those from files.

    Args:
        camera: its settings.
        detector: of a bundle for several products.
        given: the threshold that a camera was given at run time for a product.
        added: products from files; those that the detector judges already where None.

    Raises:
        BundleError: the bundle has no scores of one of its products.
        DataError: they cannot give a threshold.
        SettingsError: the mask of the camera's region of interest cannot be used.
    """
    bundle, status = detector.bundle, detector.status
    calibration = bundle.calibration(status.engine, status.precision)
    own = {name: calibration.of(name) for name in bundle.manifest.products}

    def make(name: str, scores: CalibrationScores, file: str = "", remark: str = "") -> Judge:
        outside = camera.threshold
        if outside is not None and outside.product not in (None, name):
            # It is another product's, which is no reason to warn of it here.
            outside = None
        its = camera.model_copy(update={"threshold": outside})
        run_time = given(camera.name, name)
        return make_judge(its, bundle, scores, run_time=run_time, product=name, product_file=file, remark=remark)

    found = [make(name, scores) for name, scores in own.items()]
    for one in detector.added if added is None else added:
        scores, why = _scores_of(one, detector, camera.alpha)
        if scores is not None:
            found.append(make(one.product, scores, one.digest))
            continue
        highest = {name: fit_threshold(its.scores, its.groups, camera.alpha).value for name, its in own.items()}
        lender = max(highest, key=highest.__getitem__)
        remark = (
            f"its thresholds are those of {lender}, the highest of the bundle's products: {why}; make its file again "
            "with --good and a folder of good images"
        )
        found.append(make(one.product, own[lender], one.digest, remark))
    return tuple(found)


def _scores_of(added: ProductFile, detector: Detector, alpha: float) -> tuple[CalibrationScores | None, str]:
    """Return scores that can be judged by, or why there are none."""
    scores, status = added.calibration, detector.status
    if scores is None:
        return None, "its file has no scores"
    if (added.engine, added.precision) != (status.engine, status.precision):
        return None, (
            f"the scores in its file are of {added.engine.value} {added.precision.value}, and {status.engine.value} "
            f"{status.precision.value} judges"
        )
    try:
        fit_threshold(scores.scores, scores.groups, alpha)
    except DataError as error:
        return None, str(error)
    return scores, ""
