"""Decoding: defined conversions, and no damaged file passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DataError
from trainer.data.images import load_image, load_mask_file

if TYPE_CHECKING:
    from pathlib import Path

PICTURE = np.random.default_rng(0).integers(0, 255, (24, 36, 3)).astype(np.uint8)
FORMATS = ("png", "jpg", "bmp", "tif", "webp")


def encoded(extension: str, image: np.ndarray = PICTURE, *options: int) -> bytes:
    done, data = cv2.imencode(f".{extension}", image, options)
    assert done
    return data.tobytes()


@pytest.mark.parametrize("extension", FORMATS)
def test_image_whole_file_loads(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{extension}"
    path.write_bytes(encoded(extension))
    image = load_image(path)
    assert image.shape == PICTURE.shape
    assert image.dtype == np.uint8
    if extension in {"png", "bmp", "tif"}:
        np.testing.assert_array_equal(image, PICTURE)


@pytest.mark.parametrize("extension", FORMATS)
@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_image_truncated_anywhere_is_refused(
    extension: str, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    data = encoded(extension)
    path = tmp_path_factory.getbasetemp() / f"cut.{extension}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=rf"cut\.{extension}: not a readable image"):
        load_image(path)


def test_image_progressive_jpeg_truncated_is_refused(tmp_path: Path) -> None:
    data = encoded("jpg", PICTURE, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    load_image(path)
    path.write_bytes(data[:-2])
    with pytest.raises(DataError, match="truncated"):
        load_image(path)


@settings(max_examples=40, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True))
def test_image_png_with_one_flipped_byte_is_refused(tmp_path_factory: pytest.TempPathFactory, where: float) -> None:
    data = bytearray(encoded("png"))
    data[int(where * len(data))] ^= 0x20
    path = tmp_path_factory.getbasetemp() / "flip.png"
    path.write_bytes(bytes(data))
    with pytest.raises(DataError):
        load_image(path)


@pytest.mark.parametrize("data", [b"", b"hello, world", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_image_that_is_none_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.png: not a readable image"):
        load_image(path)


def test_image_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_image(tmp_path / "gone.png")


def test_image_conversions_are_as_defined(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encoded("png", PICTURE[..., 0]))
    np.testing.assert_array_equal(load_image(path), np.repeat(PICTURE[..., :1], 3, axis=2))
    path.write_bytes(encoded("png", np.dstack([PICTURE, np.zeros((24, 36), np.uint8)])))
    np.testing.assert_array_equal(load_image(path), PICTURE)
    deep = np.random.default_rng(1).integers(0, 65535, (24, 36)).astype(np.uint16)
    path.write_bytes(encoded("png", deep))
    np.testing.assert_array_equal(load_image(path)[..., 0], deep // 256)
    tif = tmp_path / "x.tif"
    tif.write_bytes(encoded("tif", deep))
    np.testing.assert_array_equal(load_image(tif)[..., 0], deep // 256)


def test_mask_counts_every_value_above_zero_and_middle_grey_in_jpeg(tmp_path: Path) -> None:
    truth = np.zeros((24, 36), np.uint8)
    truth[8:16, 8:24] = 1
    path = tmp_path / "m.png"
    path.write_bytes(encoded("png", truth))
    np.testing.assert_array_equal(load_mask_file(path, (24, 36)), truth > 0)
    path.write_bytes(encoded("png", np.dstack([truth] * 3 + [np.full_like(truth, 255)])))
    np.testing.assert_array_equal(load_mask_file(path, (24, 36)), truth > 0)
    lossy = tmp_path / "m.jpg"
    lossy.write_bytes(encoded("jpg", truth * 255))
    np.testing.assert_array_equal(load_mask_file(lossy, (24, 36)), truth > 0)
