"""The evaluation protocol: where pixels are compared, what is undefined, what is kept to be drawn."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.evaluation import Subject
from deploy.metrics import pixel_metrics
from edge.bundle import Crop, Pooling, Preprocessing
from edge.errors import DataError, EngineError
from edge.judgement.threshold import Threshold, fit_threshold
from trainer.data.folder import Sample
from trainer.evaluation.protocol import LabelledImage, enlarge_map, evaluate

SIZE = Preprocessing(height=64, width=64)
SUBJECT = Subject("tile", "brightness", "torch", "float32")
THRESHOLD = Threshold(100.0, 0.01, 200, 200, budget_supported=True, smallest_supported_alpha=0.005, method="empirical")
KEYS = {
    "image_auroc",
    "image_ap",
    "image_f1",
    "pixel_auroc",
    "aupro",
    "fpr_at_threshold",
    "recall_at_threshold",
    "ms_per_image",
}


def brightness(canvas):
    """Judge by light: cells of 8 x 8 pixels, the defect of these tests is bright."""
    return canvas.mean(axis=2).reshape(8, 8, 8, 8).mean(axis=(1, 3)).astype(np.float32)


def picture(value=0, *, shape=(128, 192), spot=None):
    image = np.full((*shape, 3), value, np.uint8)
    mask = np.zeros(shape, np.bool_)
    if spot is not None:
        y, x, light = spot
        mask[y : y + 32, x : x + 48] = True
        image[mask] = light
    return image, mask


def good(name, value=0, **options):
    return LabelledImage.from_arrays(name, picture(value, **options)[0], None)


def bad(name, light, *, masked=True, label="spot", y=32, x=48):
    image, mask = picture(spot=(y, x, light))
    one = LabelledImage.from_arrays(name, image, mask, label=label)
    return one if masked else LabelledImage(name, label, True, name, "", one.load, None)


def run(images, *, judge=brightness, preprocessing=SIZE, threshold=THRESHOLD, **options):
    return evaluate(
        judge,
        images,
        preprocessing=preprocessing,
        pooling=Pooling(),
        threshold=threshold,
        subject=SUBJECT,
        **options,
    )


def test_figures_of_a_detector_that_sees_every_defect():
    figures = run([good("a"), good("b", 20), bad("c", 200), bad("d", 90)]).figures()
    assert figures.keys() >= KEYS
    assert figures["image_auroc"] == figures["image_ap"] == figures["image_f1"] == 1.0
    assert figures["recall_at_threshold"] == 0.5
    assert figures["fpr_at_threshold"] == 0.0
    assert figures["pixel_auroc"] > 0.98
    assert figures["aupro"] > 0.95
    assert figures["ms_per_image"] > 0
    assert (figures["n_good"], figures["n_defective"], figures["n_regions"]) == (2, 2, 2)


def test_pixel_figures_are_taken_at_the_resolution_of_each_image():
    images = [good("a", shape=(100, 70)), bad("b", 200), bad("c", 150, y=60, x=90)]
    found = run(images)
    assert found.pixels.anomalous_pixels == 2 * 32 * 48
    assert found.pixels.good_pixels == 100 * 70 + 2 * (128 * 192 - 32 * 48)


def test_enlarged_map_is_bilinear_between_cell_centres():
    cells = np.array([[0.0, 8.0]], np.float32)
    # Centres lie at 2 and 6 of 8 pixels; pixel i has its own centre at i + 0.5.
    expected = np.clip((np.arange(8) + 0.5 - 2) / 4, 0, 1) * 8
    np.testing.assert_allclose(enlarge_map(cells, (3, 8), None), np.tile(expected, (3, 1)), atol=1e-6)


def test_pixels_outside_the_crop_rank_lowest():
    crop = Crop(x=4, y=2, w=8, h=6)
    enlarged = enlarge_map(np.full((2, 2), -5.0, np.float32), (10, 20), crop)
    assert (enlarged[2:8, 4:12] == -5.0).all()
    assert np.isneginf(enlarged).sum() == 200 - 48


def test_a_defect_outside_the_crop_is_missed_in_pixels_and_score():
    preprocessing = Preprocessing(height=64, width=64, crop=Crop(x=0, y=0, w=96, h=128))
    found = run([good("a"), bad("in", 200, x=24), bad("out", 200, x=120)], preprocessing=preprocessing)
    assert [image.score >= 100 for image in found.images] == [False, True, False]
    _, inside = picture(spot=(32, 24, 1))
    _, outside = picture(spot=(32, 120, 1))
    maps = [np.where(np.arange(192) < 96, m, -np.inf) for m in (inside * 0.0, inside * 1.0, outside * 0.0)]
    best = pixel_metrics([inside & False, inside, outside], maps)
    assert found.pixels.auroc <= best.auroc < 0.8


def test_figures_are_null_without_masks():
    found = run([good("a"), bad("b", 200, masked=False)])
    figures = found.figures()
    assert figures["pixel_auroc"] is figures["aupro"] is None
    assert figures["image_auroc"] == 1.0
    assert any("no masks" in note for note in found.notes)


def test_defects_without_a_mask_beside_others_are_left_out_of_pixels():
    found = run([good("a"), bad("b", 200), bad("c", 200, masked=False)])
    assert found.pixels.anomalous_pixels == 32 * 48
    assert found.pixels.good_pixels == 2 * 128 * 192 - 32 * 48
    assert any("1 of 2 defective images have no mask" in note for note in found.notes)


def test_figures_are_null_where_a_class_is_absent():
    only_good = run([good("a"), good("b", 150)]).figures()
    assert only_good["image_auroc"] is only_good["aupro"] is only_good["recall_at_threshold"] is None
    assert only_good["fpr_at_threshold"] == 0.5
    only_bad = run([bad("a", 200), bad("b", 50)]).figures()
    assert only_bad["image_auroc"] is only_bad["fpr_at_threshold"] is None
    assert only_bad["recall_at_threshold"] == 0.5
    assert only_bad["aupro"] is not None  # good pixels are there: those outside the masks


def test_a_score_at_the_threshold_is_an_alarm():
    figures = run([good("a", 100), bad("b", 100)]).figures()
    assert figures["fpr_at_threshold"] == figures["recall_at_threshold"] == 1.0
    assert figures["per_label"]["good"]["flagged"] == figures["per_label"]["spot"]["flagged"] == 1


def test_per_label_counts_and_compares_with_good_images():
    table = run([good("a"), bad("b", 200), bad("c", 50, label="stain"), bad("d", 0, label="stain")]).per_label()
    assert list(table) == ["good", "spot", "stain"]
    assert table["good"] == {"anomalous": False, "images": 1, "flagged": 0, "median_score": 0.0, "image_auroc": None}
    assert table["spot"]["flagged"] == 1
    assert table["stain"] == {
        "anomalous": True,
        "images": 2,
        "flagged": 0,
        "median_score": 25.0,
        "image_auroc": 0.75,
    }


def test_pictures_are_the_strongest_found_the_faintest_missed_and_the_highest_good():
    images = [good("g1", 5), good("g2", 250), good("g3", 50)]
    images += [bad(f"b{light}", light) for light in (240, 160, 110, 80, 40, 20)]
    found = run(images, pictures=2)
    assert [one.scored.name for one in found.found] == ["b240", "b160"]
    assert [one.scored.name for one in found.missed] == ["b20", "b40"]
    assert [one.scored.name for one in found.alarming] == ["g2", "g3"]
    assert found.found[0].mask.sum() == 32 * 48
    assert found.alarming[0].mask is None
    assert found.found[0].anomaly_map.shape == (8, 8)


def test_maps_are_copied_so_that_an_engine_may_fill_its_buffer_again():
    buffer = np.empty((8, 8), np.float32)

    def reuse(canvas):
        buffer[:] = brightness(canvas)
        return buffer

    images = [good("a"), bad("b", 200), bad("c", 60)]
    assert run(images, judge=reuse).pixels == run(images).pixels


def test_the_first_judgement_is_not_timed():
    canvases = []

    def record(canvas):
        canvases.append(canvas)
        return brightness(canvas)

    found = run([good("a"), bad("b", 9)], judge=record)
    assert len(canvases) == 3
    assert found.milliseconds.shape == (2,)
    assert (found.milliseconds > 0).all()


def test_unsupported_budget_is_noted():
    threshold = fit_threshold(np.arange(20, dtype=np.float32), None, 0.01)
    found = run([good("a"), bad("b", 200)], threshold=threshold)
    assert found.figures()["budget_supported"] is False
    assert any("extrapolated from 20" in note for note in found.notes)


def test_progress_reaches_its_end():
    calls = []
    run([good("a"), bad("b", 200)], progress=lambda *call: calls.append(call))
    assert ("judging test images", 2, 2) in calls
    assert ("comparing pixels", 2, 2) in calls


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(DataError, match="test/good"):
        run([])


def test_an_image_smaller_than_the_crop_is_refused_by_name():
    preprocessing = Preprocessing(height=64, width=64, crop=Crop(x=0, y=0, w=500, h=128))
    with pytest.raises(DataError, match=r"small: frame is 192x128"):
        run([good("small")], preprocessing=preprocessing)


def test_a_nan_in_a_map_is_refused_by_name():
    with pytest.raises(EngineError, match=r"broken: .*NaN"):
        run([good("broken")], judge=lambda _: np.full((8, 8), np.nan, np.float32))


def test_a_sample_without_mask_has_none_to_load(tmp_path):
    sample = Sample(tmp_path / "0.png", "test", "spot", True, None, "cam1", "g7")
    image = LabelledImage.from_sample(sample)
    assert image.load_mask is None
    assert (image.group, image.condition) == ("g7", "cam1")
    clean = LabelledImage.from_sample(Sample(tmp_path / "1.png", "test", "good", False, None, "", "g"))
    assert not clean.load_mask((3, 4)).any()
