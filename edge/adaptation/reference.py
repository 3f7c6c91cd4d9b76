"""The reference moments of a bundle: how they are laid out in its file, and reading them back, checked.

It must not know how they were measured nor what they are compared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from edge.adaptation.moments import DETAIL, IMAGE, Moments, Reference
from edge.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt

    from edge.bundle import Bundle, Manifest, Precision

    Tensors = Mapping[str, npt.NDArray[Any]]

_COLOURS, _WHITE = 3, 255.0


def tensors_of(reference: Reference, precision: Precision) -> dict[str, npt.NDArray[np.float32]]:
    """Return what the file holds of one precision.

    Returns:
        ``<precision>/mean/<name>`` and ``<precision>/std/<name>`` float32 [E, C] for each name that is measured, and
        ``<precision>/usual`` float32 [E]; where the reference says them, ``<precision>/spread_mean/<name>`` and
        ``<precision>/spread_std/<name>`` float32 [E, C], and ``<precision>/images`` float32 [E].
    """
    of = precision.value
    found = {f"{of}/usual": np.array(reference.usual, np.float32)}
    for name in reference.moments[0].mean:
        found[f"{of}/mean/{name}"] = np.stack([np.float32(one.mean[name]) for one in reference.moments])
        found[f"{of}/std/{name}"] = np.stack([np.float32(one.std[name]) for one in reference.moments])
        if reference.spread:
            found[f"{of}/spread_mean/{name}"] = np.stack([np.float32(one.mean[name]) for one in reference.spread])
            found[f"{of}/spread_std/{name}"] = np.stack([np.float32(one.std[name]) for one in reference.spread])
    if reference.spread:
        found[f"{of}/images"] = np.array(reference.images, np.float32)
    return found


def read_reference(bundle: Bundle, precision: Precision) -> Reference | None:
    """Read what a bundle's experts were trained on, as one precision shows it.

    Args:
        bundle: a verified bundle.
        precision: whose taps will be corrected.

    Returns:
        The reference; None where the bundle was packed without moments.

    Raises:
        BundleError: the file is damaged, lacks the precision, or does not fit the manifest.
    """
    manifest = bundle.manifest
    if manifest.moments_file is None:
        return None
    path = bundle.file(manifest.moments_file)
    try:
        tensors = load(path.read_bytes())
    # Of a damaged header safetensors raises its own error, of a type that numpy lacks or a wrong size what numpy does.
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path}: not a readable safetensors file ({error}); fetch the bundle again") from error
    return _Reading(path, tensors, precision.value).reference(manifest.taps, manifest.subclasses or ("",))


def described(manifest: Manifest) -> str:
    """Say in a few words what a bundle lets cameras follow."""
    if manifest.moments_file is None:
        return "no moments: cameras cannot follow their light"
    names = [name for name in manifest.subclasses if name]
    of = f"{len(names)} sub-classes ({', '.join(names)})" if names else "one product"
    provenance = manifest.provenance
    if provenance.moments_from is None:
        return f"moments of {of}"
    seen = {"training": "training", "holdout": "held-out"}[provenance.moments_from]
    return f"moments of {of}, from {provenance.moments_images} {seen} images"


class _Reading:
    def __init__(self, path: Path, tensors: Tensors, of: str) -> None:
        self._path, self._tensors, self._of = path, tensors, of

    def reference(self, taps: tuple[str, ...], subclasses: tuple[str, ...]) -> Reference:
        experts, start = len(subclasses), f"{self._of}/mean/"
        if not any(key.startswith(f"{self._of}/") for key in self._tensors):
            held = ", ".join(sorted({key.partition("/")[0] for key in self._tensors})) or "nothing"
            raise BundleError(
                f"{self._path}: no moments of precision {self._of}, only {held}; export the bundle again with it"
            )
        names = dict.fromkeys(
            (IMAGE, *taps, *sorted(key[len(start) :] for key in self._tensors if key.startswith(start)))
        )
        means = {name: self._get(f"mean/{name}", experts) for name in names}
        stds = {name: self._get(f"std/{name}", experts) for name in names}
        usual = self._get("usual", experts, columns=False)
        for name, mean in means.items():
            if mean.shape != stds[name].shape:
                raise self._misfit(f"mean/{name} is {list(mean.shape)}, std/{name} {list(stds[name].shape)}")
            if (stds[name] < 0).any():
                raise self._misfit(f"std/{name} has values below 0")
        if means[IMAGE].shape[1] != _COLOURS or (means[IMAGE] < 0).any() or (means[IMAGE] > _WHITE).any():
            raise self._misfit(f"mean/{IMAGE} is not [{experts}, {_COLOURS}] of grey levels 0 .. {_WHITE:g}")
        if DETAIL in stds and stds[DETAIL].shape[1] != 1:
            raise self._misfit(f"std/{DETAIL} is {list(stds[DETAIL].shape)}, not [{experts}, 1]")
        if (usual <= 0).any():
            raise self._misfit("usual has values that are not above 0")
        moments = tuple(
            Moments({name: mean[i] for name, mean in means.items()}, {name: std[i] for name, std in stds.items()})
            for i in range(experts)
        )
        spread, images = self._spread(means, experts)
        return Reference(moments, tuple(float(one) for one in usual), subclasses, spread, images)

    def _spread(self, means: Tensors, experts: int) -> tuple[tuple[Moments, ...], tuple[int, ...]]:
        if f"{self._of}/images" not in self._tensors:
            return (), ()
        found = {}
        for kind in ("spread_mean", "spread_std"):
            for name, mean in means.items():
                values = found[kind, name] = self._get(f"{kind}/{name}", experts)
                if values.shape != mean.shape or (values < 0).any():
                    raise self._misfit(f"{kind}/{name} is not {list(mean.shape)} of values of at least 0")
        images = self._get("images", experts, columns=False)
        if (images < 1).any():
            raise self._misfit("images has values below 1")
        spread = tuple(
            Moments(*({name: found[kind, name][i] for name in means} for kind in ("spread_mean", "spread_std")))
            for i in range(experts)
        )
        return spread, tuple(int(one) for one in images)

    def _get(self, name: str, experts: int, *, columns: bool = True) -> npt.NDArray[np.float32]:
        values = self._tensors.get(f"{self._of}/{name}")
        if values is None:
            raise self._misfit(f"{name} is missing")
        # A width of 0 would correct nothing without a word.
        if values.dtype != np.float32 or values.ndim != 1 + columns or len(values) != experts or not values.size:
            wanted = f"[{experts}, channels]" if columns else f"[{experts}]"
            raise self._misfit(f"{name} is {values.dtype} {list(values.shape)}, not float32 {wanted}")
        if not np.isfinite(values).all():
            raise self._misfit(f"{name} has values that are not finite")
        return values

    def _misfit(self, what: str) -> BundleError:
        return BundleError(f"{self._path}: {self._of}/{what}; export the bundle again")
