"""Deploy's verbs of the ``lineward`` command. They must not need torch: a bundle is verified where it will run."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads the annotation at run time)
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edge.bundle import Bundle, Engine, Precision


def verify(bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")]) -> None:
    """Check hashes and moments, then run the golden frames on each calibrated engine that is installed here."""
    from rich.console import Console
    from rich.table import Table

    from edge.adaptation.reference import described, read_reference
    from edge.bundle import Bundle
    from edge.errors import GateError
    from edge.inference.engines import supports

    opened = Bundle.open(bundle)
    manifest = opened.manifest
    table = Table(title=f"{opened.path}  {manifest.method} / {manifest.product}")
    for column in ("engine", "precision", "golden frames", "largest error", "tolerance", "result"):
        table.add_column(column)
    for precision in dict.fromkeys(precision for _, precision in opened.calibrated()):
        read_reference(opened, precision)
    missed: list[str] = []
    ran = 0
    for engine, precision in opened.calibrated():
        names = (engine.value, precision.value, str(manifest.golden.count))
        if not supports(engine, precision):
            table.add_row(*names, "", "", "not available here")
            continue
        ran += 1
        tolerance = manifest.golden.tolerance.get(f"{engine.value}_{precision.value}", float("nan"))
        error, problem = _golden(opened, engine, precision)
        if problem:
            missed.append(problem)
        shown = "" if error is None else f"{error:.3g}"
        table.add_row(*names, shown, f"{tolerance:.3g}", "[red]missed[/red]" if problem else "[green]ok[/green]")
    table.caption = described(manifest)
    Console().print(table)
    # Whole, as thresholds from outside have to name it; a line of its own is never wrapped.
    typer.echo(f"bundle {opened.id}")
    if missed:
        raise GateError(f"{bundle}: golden frames missed: {'; '.join(missed)}; export the bundle again")
    if not ran:
        raise GateError(f"{bundle}: no calibrated engine is installed here, so nothing was proved; install one of them")


def _golden(bundle: Bundle, engine: Engine, precision: Precision) -> tuple[float | None, str]:
    """Return the golden error where the pair itself ran, and what went wrong, empty if nothing."""
    from edge.errors import EngineError
    from edge.inference.detector import Detector

    try:
        status = Detector.open(bundle, engine=engine, precision=precision).status
    except EngineError as error:
        return None, str(error)
    if (status.engine, status.precision) != (engine, precision):
        # The detector fell back, as a box would; verifying this pair means that the pair itself must pass.
        return None, status.fallback_reason
    return status.golden_max_error, ""
