"""Which engine, precision and accelerator to try for a bundle, in which order, and how exact each must be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge.bundle import Bundle, Engine, Precision
from edge.errors import BundleError, MissingExtraError
from edge.inference.engines import Accelerator, Provider, available_engines

# Of the good scores' interquartile range, as bundles promise for int8 and bfloat16.
_FLOAT16_TOLERANCE = 0.1


def choose(bundle: Bundle, engine: Engine | None, precision: Precision | None) -> tuple[Engine, Precision]:
    """Fill in what was left open.

    Raises:
        MissingExtraError: no engine, or not the one asked for, is installed.
        BundleError: the bundle was not calibrated for the pair.
    """
    installed = available_engines()
    if not installed or (engine is not None and engine not in installed):
        wanted = "no inference engine" if engine is None else engine.value
        extra = "box-cpu" if engine is Engine.ONNXRUNTIME else "box-openvino"
        raise MissingExtraError(
            f"{wanted if engine is None else f'{wanted} not'} installed; run: pip install 'lineward[{extra}]'"
        )
    calibrated = bundle.calibrated()
    for candidate in installed if engine is None else (engine,):
        for numerics in (Precision.INT8, Precision.FLOAT32) if precision is None else (precision,):
            if (candidate, numerics) in calibrated:
                return candidate, numerics
    asked = " ".join(choice.value for choice in (engine, precision) if choice is not None) or "an installed engine"
    pairs = ", ".join(f"{one.value} {other.value}" for one, other in calibrated)
    raise BundleError(
        f"{bundle.path}: not calibrated for {asked}, only for {pairs}; choose one of these or export again"
    )


def attempts(
    bundle: Bundle, requested: tuple[Engine, Precision], accelerator: Accelerator
) -> list[tuple[tuple[Engine, Precision], Accelerator]]:
    """The requested pair on what was asked for and below, then float32 of the same engine, then of the other."""
    processor = Accelerator()
    ladder = [accelerator]
    if accelerator.float16:
        ladder.append(replace(accelerator, float16=False))
    if accelerator.provider is Provider.TENSORRT:
        ladder.append(Accelerator(Provider.CUDA))
    ladder += [processor] if accelerator != processor else []
    others = [engine for engine in available_engines() if engine is not requested[0]]
    fallbacks = [(engine, Precision.FLOAT32) for engine in (requested[0], *others)]
    pairs = [pair for pair in fallbacks if pair != requested and pair in bundle.calibrated()]
    return [(requested, one) for one in ladder] + [(pair, processor) for pair in pairs]


def tolerance(bundle: Bundle, pair: tuple[Engine, Precision], accelerator: Accelerator) -> float:
    """How far a golden score may be from the promised one, in raw score units; NaN where none is promised."""
    promised = bundle.manifest.golden.tolerance.get(key(*pair), float("nan"))
    if not accelerator.float16:
        return promised
    lower, upper = np.quantile(bundle.calibration(*pair).scores, (0.25, 0.75))
    return max(promised, _FLOAT16_TOLERANCE * float(upper - lower))


def key(engine: Engine, precision: Precision) -> str:
    """Return the name that a manifest has for a pair."""
    return f"{engine.value}_{precision.value}"
