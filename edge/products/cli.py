"""`lineward prompt`: a product file from one good image. Imports wait until the verb is called."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer needs it at run time)
from typing import Annotated

import typer

from edge.errors import UsageError


def prompt(
    bundle: Annotated[Path, typer.Option(help="Folder of a bundle for several products.", show_default=False)],
    product: Annotated[str, typer.Option(help="Name of the product, none of the bundle's.", show_default=False)],
    image: Annotated[Path, typer.Option(help="One good image, as the camera shows it.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Product file to write; an earlier one is replaced.", show_default=False)],
    good: Annotated[Path | None, typer.Option(help="Folder of good images to calibrate with.")] = None,
    engine: Annotated[str | None, typer.Option(help="onnxruntime or openvino; what the box will take.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or int8; what the box will take.")] = None,
) -> None:
    """Teach a bundle one more product by one good image; a box takes the file in without new training."""
    from edge.bundle import Bundle, Engine, Precision
    from edge.inference.detector import Detector
    from edge.products.product_file import write_product
    from edge.products.prompt import make_product

    try:
        wanted = None if engine is None else Engine(engine), None if precision is None else Precision(precision)
    except ValueError as error:
        raise UsageError(f"prompt: {error}; see `lineward prompt --help`") from error
    detector = Detector.open(Bundle.open(bundle), engine=wanted[0], precision=wanted[1])
    made = make_product(detector, product, image, good)
    write_product(out, made)
    size = sum(row.nbytes for row in made.state.values())
    runs = f"{made.engine.value} {made.precision.value}"
    typer.echo(f"{out}: {product} for bundle {made.bundle[:12]}, a prompt of {size / 1000:.0f} kB from {image.name}")
    if made.calibration is None:
        typer.echo("without --good its thresholds will be borrowed from the bundle's own products")
    else:
        scores = made.calibration.scores
        typer.echo(f"{len(scores)} good images score {scores.min():.4g} to {scores.max():.4g} on {runs}")
