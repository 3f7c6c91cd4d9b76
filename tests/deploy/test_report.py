"""The report: complete, self-contained, escaped; and the pictures in it."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from deploy.evaluation import Evaluation, Picture, ScoredImage, Subject, colour_scale, write_json, write_whole
from deploy.heatmap import mask_outline
from deploy.metrics import pixel_metrics
from deploy.report import heatmap_overlay, render_report, write_report
from edge.bundle import Crop
from edge.errors import DataError
from edge.judgement.threshold import Threshold

NASTY = '<script>alert("x")</script>&\'.png'
THRESHOLD = Threshold(5.0, 0.01, 200, 200, budget_supported=True, smallest_supported_alpha=0.005, method="empirical")


def evaluation(**changes):
    rng = np.random.default_rng(0)
    labels = [i % 2 == 1 for i in range(12)]
    images = tuple(
        ScoredImage(f"test/{i}.png", "scratch" if bad else "good", bad, float(i if bad else i / 3), str(i))
        for i, bad in enumerate(labels)
    )
    mask = np.zeros((40, 60), np.bool_)
    mask[10:20, 20:30] = True
    photo = rng.integers(0, 255, (40, 60, 3)).astype(np.uint8)
    heat = rng.random((5, 8)).astype(np.float32) * 8
    one = Evaluation(
        subject=Subject("tile", "memory", "openvino", "int8"),
        threshold=THRESHOLD,
        images=images,
        pixels=pixel_metrics([mask], [rng.random((40, 60))]),
        milliseconds=np.full(12, 2.5),
        background=1.0,
        found=(Picture(images[11], photo, heat, None, mask),),
        missed=(Picture(images[1], photo, heat, Crop(x=5, y=4, w=30, h=20), None),),
        alarming=(Picture(images[10], photo, heat, None, None),),
        notes=("Masks are rough.",),
    )
    return replace(one, **changes)


class Page(HTMLParser):
    """Collects what a reader or a browser would fetch; fails on tags that do not match."""

    void = frozenset({"meta", "img", "br", "!doctype"})

    def __init__(self, text):
        super().__init__()
        self.images, self.tags, self.urls, self.open, self.text = [], set(), [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        self.urls += [value for name, value in attrs if name in {"src", "href", "action", "srcset"}]
        if tag == "img":
            self.images.append(values)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_needs_nothing_from_outside_and_no_scripts():
    page = Page(render_report(evaluation(), title="Tile"))
    assert page.urls
    assert all(url.startswith("data:image/") for url in page.urls)
    assert not page.tags & {"script", "link", "iframe", "object"}


def test_every_picture_has_a_text_and_decodes():
    page = Page(render_report(evaluation(), title="Tile"))
    assert len(page.images) == 2 + 3 + 2 + 2  # two charts; image, map and, where it is known, mask
    for image in page.images:
        assert len(image["alt"]) > 10
        data = np.frombuffer(base64.b64decode(image["src"].split(",")[1]), np.uint8)
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
        shown = int(image["height"]) / int(image["width"])
        assert decoded.shape[0] / decoded.shape[1] == pytest.approx(shown, rel=0.05)


def test_names_from_outside_are_escaped_everywhere():
    one = evaluation()
    images = tuple(replace(image, name=NASTY, label=NASTY) for image in one.images)
    found = tuple(replace(picture, scored=images[11]) for picture in one.found)
    text = render_report(
        replace(one, images=images, found=found, subject=Subject(*[NASTY] * 4), notes=(NASTY,)),
        title=NASTY,
        details={NASTY: {NASTY: NASTY, "list": [NASTY], "deep": {NASTY: 1.0}}},
    )
    assert "<script" not in text
    page = Page(text)
    assert "script" not in page.tags
    assert NASTY in "".join(page.text)
    assert any(NASTY in image["alt"] for image in page.images)


def test_headline_says_what_happened_at_the_threshold():
    text = " ".join("".join(Page(render_report(evaluation(), title="Tile")).text).split())
    assert "4 of 6 defective images found, 0 of 6 good images raised a false alarm" in text
    assert "set from 200 held-out good images for a false-alarm rate of 0.01" in text
    assert "Masks are rough." in text


def test_details_are_flattened_and_empty_ones_left_out():
    details = {"Parity": {"int8": {"shift": 0.03125, "passed": True}, "none": None}, "Provenance": {}}
    text = "".join(Page(render_report(evaluation(), title="Tile", details=details)).text)
    assert "int8 / shift" in text
    assert "0.03125" in text
    assert "yes" in text
    assert "Provenance" not in text


@pytest.mark.parametrize("anomalous", [False, True])
def test_one_class_alone_gives_a_report_without_curve(anomalous):
    images = tuple(replace(image, anomalous=anomalous, score=3.0) for image in evaluation().images)
    one = evaluation(images=images, pixels=None, found=(), missed=(), alarming=())
    page = Page(render_report(one, title="Tile"))
    assert "No ROC curve" in "".join(page.text)
    assert len(page.images) == 1


def test_report_is_written_whole(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, evaluation(), title="Tile")
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_json_has_the_published_keys_and_no_nan(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, evaluation(pixels=None))

    def refuse(constant):
        raise AssertionError(constant)

    figures = json.loads(path.read_text(), parse_constant=refuse)
    assert figures["pixel_auroc"] is None
    assert figures["aupro"] is None
    assert figures["ms_per_image"] == 2.5
    assert figures["per_label"]["scratch"]["images"] == 6


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_kept(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_whole(path, "old")

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deploy.evaluation.os.fsync", full)
    with pytest.raises(DataError, match=r"figures.json: cannot be written \(No space left on device\)"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


def test_a_folder_in_place_of_the_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        write_whole(tmp_path, "text")


GREY = np.full((32, 48, 3), 120, np.uint8)


def test_overlay_leaves_the_background_as_it_is():
    drawn = heatmap_overlay(GREY, np.full((4, 6), 1.0, np.float32), low=1.0, high=3.0)
    np.testing.assert_array_equal(drawn, GREY)


def test_overlay_is_hot_where_the_map_is_high_and_nowhere_else():
    cells = np.zeros((4, 6), np.float32)
    cells[1, 4] = 9.0
    drawn = heatmap_overlay(GREY, cells, low=0.0, high=3.0)
    changed = np.any(drawn != GREY, axis=2)
    assert changed[12, 36]
    assert not changed[:, :16].any()
    assert drawn[12, 36, 2] > drawn[12, 36, 0]  # red above blue


def test_overlay_covers_the_crop_and_dims_the_rest():
    drawn = heatmap_overlay(GREY, np.full((2, 2), 5.0, np.float32), low=0.0, high=1.0, crop=Crop(x=8, y=4, w=16, h=10))
    outside = np.ones((32, 48), np.bool_)
    outside[4:14, 8:24] = False
    assert (drawn[outside] == 40).all()
    assert (drawn[~outside] > 60).any()


def test_overlay_outlines_what_reaches_the_threshold():
    cells = np.zeros((4, 6), np.float32)
    cells[2, 2] = 2.0
    plain = heatmap_overlay(GREY, cells, low=0.0, high=100.0)
    outlined = heatmap_overlay(GREY, cells, low=0.0, high=100.0, threshold=1.0)
    line = np.any(plain != outlined, axis=2)
    assert 10 < line.sum() < 400
    assert not line[20, 20]  # the inside stays free
    np.testing.assert_array_equal(plain, heatmap_overlay(GREY, cells, low=0.0, high=100.0, threshold=2.5))


def test_overlay_takes_minus_infinity_and_leaves_its_input_alone():
    image, cells = GREY.copy(), np.full((4, 6), -np.inf, np.float32)
    np.testing.assert_array_equal(heatmap_overlay(image, cells, low=0.0, high=1.0), GREY)
    np.testing.assert_array_equal(image, GREY)


def test_overlay_refuses_an_empty_scale():
    with pytest.raises(ValueError, match="above low"):
        heatmap_overlay(GREY, np.zeros((2, 2), np.float32), low=1.0, high=1.0)


def test_mask_outline_surrounds_a_defect_of_one_pixel():
    mask = np.zeros((32, 48), np.bool_)
    mask[10, 10] = True
    image = GREY.copy()
    drawn = mask_outline(image, mask)
    np.testing.assert_array_equal(image, GREY)
    assert (drawn[10, 10] == 120).all()
    assert np.any(drawn != 120, axis=2).sum() >= 8


@pytest.mark.parametrize(("background", "threshold"), [(1.0, 5.0), (-8.0, -2.0), (5.0, 5.0), (6.0, 5.0), (0.0, 0.0)])
def test_colour_scale_is_never_empty_and_has_the_threshold_at_two_thirds(background, threshold):
    low, high = colour_scale(evaluation(background=background, threshold=replace(THRESHOLD, value=threshold)))
    assert high > low
    if threshold > background:
        assert (threshold - low) / (high - low) == pytest.approx(2 / 3)


def test_report_has_a_policy_that_forbids_fetching():
    text = render_report(evaluation(), title="Tile")
    assert re.search(r"default-src 'none'; img-src data:", text)
