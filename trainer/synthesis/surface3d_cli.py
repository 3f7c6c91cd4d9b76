"""Verbs of ``lineward synth3d``: put synthetic defects on scans, and draw what parameters do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.errors import UsageError

app = typer.Typer(
    name="synth3d",
    add_completion=False,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    help="Put a synthetic surface defect on a scan: PLY, PCD, NPZ or TIFF, metres.",
)

_ScansOption = Annotated[list[Path], typer.Option("--in", help="Scan file; repeatable.")]
_SheetOption = Annotated[Path, typer.Option("--out", help="PNG to write.")]
_PresetOption = Annotated[str, typer.Option(help="dent, bump, corrosion, wear or scratch.")]
_SeedOption = Annotated[int, typer.Option(help="Seed of every choice.")]
_SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE of a parameter, such as strength=8x; repeatable.")
]

# Larger than what stands before a depth camera, smaller than a coin in millimetres.
_LARGE_M = 10.0


def _guarded_import() -> None:
    """Fail first, and with the extra's name, where what draws and computes is not installed."""
    from edge.errors import MissingExtraError

    try:
        import cv2  # noqa: F401
        import scipy  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"synth3d needs {error.name}, which is not installed; run: pip install 'lineward[three-d]'"
        ) from error


@app.callback()
def synth3d(
    context: typer.Context,
    source: Annotated[Path | None, typer.Option("--in", help="Scan of a good part.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.")] = None,
    preset: _PresetOption = "dent",
    seed: _SeedOption = 0,
    settings: _SetOption = None,
) -> None:
    """Put a synthetic surface defect on a scan, and write it with its mask, its parameters and a picture."""
    if context.invoked_subcommand is not None:
        return
    if source is None or out is None:
        raise UsageError("synth3d: give a scan with --in FILE and a folder with --out DIR")
    _guarded_import()
    from trainer.synthesis.surface3d_command import settings_for, synthesise

    wanted = settings_for(preset, _parse(settings))
    sample = synthesise(source, out, settings=wanted, name=preset, seed=seed)
    record = sample.defect.record()
    typer.echo(
        f"{sample.files[0]}: {record['points_labelled']} of {record['points_valid']} points, up to "
        f"{1000 * record['largest_displacement_m']:.3g} mm"
    )
    if sample.diagonal > _LARGE_M:
        typer.echo(
            f"note: the part measures {sample.diagonal:.3g} m; if the scan is in millimetres, divide by 1000",
            err=True,
        )
    if sample.defect.below_noise:
        typer.echo(
            f"note: below noise: 95 % of what moved went at most {1000 * sample.defect.reached:.3g} mm, not 4 times "
            f"the noise floor of {1000 * sample.defect.noise.p95:.3g} mm; this is no example of a defect",
            err=True,
        )


@app.command()
def sweep(
    parameter: Annotated[str, typer.Argument(help="scale, strength, octaves, threshold, persistence or aspect.")],
    values: Annotated[list[str], typer.Argument(help="Its values, such as 2 4 8; a strength as 4x or 1%.")],
    source: Annotated[Path, typer.Option("--in", help="Scan of a good part.")],
    out: _SheetOption,
    preset: _PresetOption = "dent",
    seed: _SeedOption = 0,
    settings: _SetOption = None,
) -> None:
    """Draw what one parameter does, a column per value."""
    _guarded_import()
    from trainer.data.images import write_png
    from trainer.synthesis.surface3d_command import settings_for
    from trainer.synthesis.surface3d_command import sweep as draw

    _refuse_other_ending(out)
    wanted = settings_for(preset, _parse(settings))
    write_png(out, draw(source, settings=wanted, parameter=parameter, values=values, seed=seed))
    typer.echo(str(out))


@app.command()
def grid(
    source: _ScansOption,
    out: _SheetOption,
    presets: Annotated[str, typer.Option(help="Presets with commas between; all by default.")] = "",
    seed: _SeedOption = 0,
) -> None:
    """Draw presets on several parts, a row per part."""
    _guarded_import()
    from trainer.data.images import write_png
    from trainer.synthesis.surface3d_command import all_presets
    from trainer.synthesis.surface3d_command import grid as draw

    _refuse_other_ending(out)
    names = tuple(name.strip() for name in presets.split(",")) if presets else all_presets()
    write_png(out, draw(source, presets=names, seed=seed))
    typer.echo(str(out))


def _refuse_other_ending(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: the sheet is a PNG; give a name that ends in .png")


def _parse(given: list[str] | None) -> dict[str, object]:
    settings: dict[str, object] = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals or not name or name in settings:
            raise UsageError(f"--set {one}: give NAME=VALUE, each name once")
        settings[name] = value
    return settings
