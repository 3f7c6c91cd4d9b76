from __future__ import annotations

import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from conftest import SIZE, make_defects, textures
from onnx import numpy_helper
from safetensors.numpy import load_file
from toys import ToyMemoryHead, ToyPbasHead, ToyTrunk
from typer.testing import CliRunner

import deploy.pack as packing
from deploy import trunks
from deploy.cli import verify
from deploy.embedding import embedding_ids
from deploy.pack import BundleRequest, pack
from deploy.parity import ParityRules
from deploy.running import torch_maps
from deploy.trunks import TrunkFiles, build_trunk_files
from edge.adaptation.measure import measure_taps
from edge.adaptation.reference import read_reference
from edge.bundle import Bundle, Engine, Pooling, Precision, Preprocessing, Provenance, load_arrays
from edge.errors import BundleError, DataError, GateError, UsageError
from edge.inference.detector import Detector
from edge.inference.onnx_file import read_initialisers
from edge.memory.rows import decode_rows, round_rows

if TYPE_CHECKING:
    from pathlib import Path

RULES = ParityRules(good_samples=200, defect_samples=100)


@pytest.fixture(scope="module")
def request_(trunk: ToyTrunk, memory_head: ToyMemoryHead, trunk_files: TrunkFiles) -> BundleRequest:
    return BundleRequest(
        trunk=trunk, head=memory_head, method="memory", product="cloth",
        preprocessing=Preprocessing(height=SIZE, width=SIZE), pooling=Pooling(cells=2),
        provenance=Provenance(
            data_sha256="0" * 64, seed=0, preset="quick", train_images=16, calibration_images=32, versions={}
        ),
        holdout=textures(32, seed=2), groups=[f"g{i}" for i in range(32)], make_defects=make_defects,
        reference=textures(20, seed=4),
        commissioning=textures(6, seed=1), commissioning_groups=("a", "a", "b", "b", "c", "c"),
        trunk_files=trunk_files, rules=RULES,
        precisions=(Precision.FLOAT32, Precision.INT8), attachments={"report.html": b"<p>"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(request_: BundleRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pack(request_, tmp_path_factory.mktemp("packed") / "bundle")


def test_pack_writes_what_a_box_opens(bundle: Bundle) -> None:
    assert bundle.manifest.parity["passed"]
    assert {path.name for path in bundle.path.parent.iterdir()} == {"bundle"}
    assert len(bundle.calibrated()) == 4
    for engine, precision in bundle.calibrated():
        detector = Detector.open(bundle, engine=engine, precision=precision, threads=1)
        assert (detector.status.engine, detector.status.precision) == (engine, precision)
        calibration = bundle.calibration(engine, precision)
        assert calibration.maps.shape == (32, SIZE // 8, SIZE // 8)
        assert calibration.groups.tolist() == [f"g{i}" for i in range(32)]


def test_pack_gives_each_numerics_class_its_own_embeddings_and_id(bundle: Bundle) -> None:
    ids = bundle.manifest.embedding_id
    assert ids.keys() == {Precision.FLOAT32, Precision.INT8}
    assert ids[Precision.FLOAT32] != ids[Precision.INT8]
    rows = load_arrays(bundle.file("commissioning.npz"))
    assert rows["embedding_float32"].shape == rows["embedding_int8"].shape == (6, 1, 64, 40)


def test_pack_measures_what_the_experts_were_trained_on_as_each_precision_shows_it(
    request_: BundleRequest, bundle: Bundle, trunk: ToyTrunk
) -> None:
    provenance, references = bundle.manifest.provenance, {}
    assert (bundle.manifest.subclasses, provenance.moments_from, provenance.moments_images) == (("",), "training", 20)
    for precision in (Precision.FLOAT32, Precision.INT8):
        found = read_reference(bundle, precision)
        assert found is not None
        references[precision] = found.moments[0]
        assert tuple(found.moments[0].mean) == ("image", "s8", "s16", "detail")
        assert 0 < found.usual[0] < 2
    with torch.no_grad():
        taps = trunk(torch.from_numpy(request_.reference))
    direct = np.stack([measure_taps({"s8": one[None].numpy()}).mean["s8"] for one in taps[2]]).mean(0)
    whole, rounded = (references[precision].mean for precision in references)
    np.testing.assert_allclose(whole["s8"], direct, rtol=1e-3, atol=1e-4)
    assert np.array_equal(whole["image"], rounded["image"])
    assert not np.array_equal(whole["s8"], rounded["s8"])


def test_pack_names_the_groups_of_what_it_commissions_with(request_: BundleRequest, bundle: Bundle) -> None:
    assert load_arrays(bundle.file("commissioning.npz"))["groups"].tolist() == ["a", "a", "b", "b", "c", "c"]
    with pytest.raises(DataError, match="5 groups for 6 commissioning images"):
        pack(dataclasses.replace(request_, commissioning_groups=["a"] * 5), bundle.path.parent / "other")


def test_embedding_id_ignores_the_bank_and_sees_the_projection(
    request_: BundleRequest, bundle: Bundle, tmp_path: Path
) -> None:
    def changed(name: str) -> str:
        model = onnx.load(bundle.file("head.onnx"))
        for tensor in model.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), 7, np.float32), name))
        onnx.save(model, tmp_path / "h.onnx")
        files = {Precision.FLOAT32: bundle.file("trunk.onnx")}
        states = request_.head.state_names
        return embedding_ids(files, tmp_path / "h.onnx", states, request_.preprocessing)[Precision.FLOAT32]

    model = onnx.load(bundle.file("head.onnx"))
    other = next(t.name for t in model.graph.initializer if t.name not in request_.head.state_names and 40 in t.dims)
    assert changed("bank") == changed("none") == bundle.manifest.embedding_id[Precision.FLOAT32]
    assert changed(other) != changed("none")


def test_pack_keeps_the_state_in_its_own_file_alone(request_: BundleRequest, bundle: Bundle) -> None:
    state = load_file(bundle.file("state.safetensors"))
    assert np.array_equal(state["bank"], request_.head.get_buffer("bank").numpy())
    for name in ("head.onnx", "head.int8.onnx"):
        found = read_initialisers(bundle.file(name).read_bytes())
        assert {one for one, tensor in found.items() if tensor.is_hollow} == set(request_.head.state_names)


def test_pack_stores_rows_in_int8_where_the_head_asks(
    request_: BundleRequest, memory_head: ToyMemoryHead, bundle: Bundle, tmp_path: Path
) -> None:
    rows = torch.from_numpy(round_rows(memory_head.get_buffer("bank").numpy()))
    head = ToyMemoryHead(rows, memory_head.get_buffer("scale"), memory_head.get_buffer("centre"))
    head.int8_state = ("bank",)
    packed = pack(dataclasses.replace(request_, head=head, precisions=(Precision.FLOAT32,)), tmp_path / "b")
    assert [(entry.name, entry.stored.value) for entry in packed.manifest.state] == [
        ("bank", "int8"),
        ("bank_norms", "float32"),
    ]
    stored = load_file(packed.file("state.safetensors"))
    assert stored["bank"].dtype == np.int8
    assert np.array_equal(decode_rows(stored["bank"], stored["bank.scale"]), rows.numpy())
    smaller = bundle.file("state.safetensors").stat().st_size - packed.file("state.safetensors").stat().st_size
    assert smaller > 0.7 * rows.numpy().nbytes
    # The same images through the same trunk: the same moments, to the last bit.
    known, again = load_file(bundle.file("moments.safetensors")), load_file(packed.file("moments.safetensors"))
    assert again.keys() == {name for name in known if name.startswith("float32/")}
    assert all(np.array_equal(known[name], again[name]) for name in again)
    canvas = request_.holdout[3]
    expected = torch_maps(request_.trunk, head, canvas[None], request_.preprocessing)[0]
    for engine in (Engine.ONNXRUNTIME, Engine.OPENVINO):
        detector = Detector.open(packed, engine=engine, precision=Precision.FLOAT32, threads=1)
        np.testing.assert_allclose(detector.map_of_canvas(canvas), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("names", "words"), [(("bank",), "not in steps of int8"), (("blur",), "int8_state names blur, not in state_names")]
)
def test_pack_refuses_an_int8_state_that_a_box_would_read_otherwise(
    request_: BundleRequest, memory_head: ToyMemoryHead, tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    head = ToyMemoryHead(*(memory_head.get_buffer(name) for name in ("bank", "scale", "centre")))
    head.int8_state = names
    with pytest.raises(DataError, match=words):
        pack(dataclasses.replace(request_, head=head), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_pack_refuses_a_folder_with_content(request_: BundleRequest, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        pack(request_, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_pack_refuses_canvases_of_another_size(request_: BundleRequest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holdout"):
        pack(dataclasses.replace(request_, holdout=textures(32, seed=2, size=96)), tmp_path / "b")
    with pytest.raises(DataError, match="reference"):
        pack(dataclasses.replace(request_, reference=textures(2, seed=2, size=96)), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def _eightfold_scales(source: Path, target: Path) -> None:
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scale"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(8), tensor.name))
    target.write_bytes(model.SerializeToString())


def test_pack_refuses_a_broken_quantisation_with_exit_code_4_and_leaves_nothing(
    request_: BundleRequest, trunk_files: TrunkFiles, tmp_path: Path
) -> None:
    _eightfold_scales(trunk_files.int8, tmp_path / "broken.onnx")
    broken = dataclasses.replace(trunk_files, int8=tmp_path / "broken.onnx")
    with pytest.raises(GateError, match=r"int8.*limit.*--precision float32") as caught:
        pack(dataclasses.replace(request_, trunk_files=broken), tmp_path / "out" / "b")
    assert caught.value.exit_code == 4
    assert not list((tmp_path / "out").iterdir())


def test_pack_float32_alone_passes_where_int8_is_broken(
    request_: BundleRequest, trunk: ToyTrunk, trunk_files: TrunkFiles, tmp_path: Path
) -> None:
    broken = dataclasses.replace(trunk_files, int8=tmp_path / "missing.onnx")
    request = dataclasses.replace(
        request_, trunk_files=broken, precisions=(Precision.FLOAT32,), head=ToyPbasHead(), method="pbas",
        reference=request_.reference[:0],
    )  # fmt: skip
    bundle = pack(request, tmp_path / "b")
    assert bundle.manifest.head.int8 is None
    assert bundle.manifest.commissioning_file is None
    assert bundle.manifest.provenance.moments_from == "holdout"
    assert read_reference(bundle, Precision.FLOAT32) is not None
    assert {precision for _, precision in bundle.calibrated()} == {Precision.FLOAT32}


def test_pack_falls_back_to_a_float_head_when_its_int8_is_refused(
    request_: BundleRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(source: Path, target: Path, *_args: object, **_kwargs: object) -> tuple[str, ...]:
        model = onnx.load(source)
        for tensor in model.graph.initializer:
            if tensor.name == "blur":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, "blur"))
        target.write_bytes(model.SerializeToString())
        return ("ruined",)

    monkeypatch.setattr(packing, "quantize_head", ruin)
    request = dataclasses.replace(request_, engines=(Engine.ONNXRUNTIME,))
    bundle = pack(request, tmp_path / "b")
    assert bundle.manifest.parity["int8_head"] is False
    assert bundle.file("head.int8.onnx").read_bytes() == bundle.file("head.onnx").read_bytes()


def test_pack_leaves_nothing_when_the_disk_is_full(
    request_: BundleRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "export_head", full)
    with pytest.raises(BundleError, match="No space left"):
        pack(request_, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def _verify(path: Path) -> tuple[BaseException | None, str]:
    import typer

    app = typer.Typer()
    app.command()(verify)
    result = CliRunner().invoke(app, [str(path)])
    return result.exception, result.output


def test_verify_accepts_a_packed_bundle(bundle: Bundle) -> None:
    error, output = _verify(bundle.path)
    assert "moments of one product, from 20 training images" in " ".join(output.split())
    assert error is None
    assert output.count("ok") == 4
    assert f"bundle {bundle.id}" in output.splitlines()


def test_verify_refuses_a_damaged_file_with_exit_code_3(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    shutil.copytree(bundle.path, copy)
    content = bytearray((copy / "head.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "head.onnx").write_bytes(content)
    error, _ = _verify(copy)
    assert isinstance(error, BundleError)
    assert error.exit_code == 3
    assert "head.onnx" in str(error)


def test_verify_refuses_missed_golden_frames_with_exit_code_4(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge.inference import detector as box

    honest = box.pool_score
    monkeypatch.setattr(box, "pool_score", lambda *args: honest(*args) * 1.5)
    error, _ = _verify(bundle.path)
    assert isinstance(error, GateError)
    assert error.exit_code == 4


def test_build_trunk_files_takes_what_is_cached_and_mends_what_is_damaged(
    trunk: ToyTrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEWARD_CACHE", str(tmp_path))
    generic = textures(4, seed=3)
    first = build_trunk_files(trunk, generic)
    assert tmp_path in first.int8.parents
    made = []
    honest = trunks.export_trunk
    monkeypatch.setattr(trunks, "export_trunk", lambda *a, **k: (made.append(1), honest(*a, **k))[1])
    assert build_trunk_files(trunk, generic) == first
    assert not made
    first.int8.write_bytes(b"damaged")
    assert build_trunk_files(trunk, generic) == first
    assert len(made) == 1
    assert first.int8.read_bytes() != b"damaged"
    with torch.no_grad():
        other = ToyTrunk(seed=1)
    assert build_trunk_files(other, generic).id != first.id
    assert not list((tmp_path / "trunks").glob(".*"))


def test_put_in_place_the_second_of_two_builders_takes_the_first_ones_files(
    trunk_files: TrunkFiles, tmp_path: Path
) -> None:
    works = [tmp_path / ".building-a", tmp_path / ".building-b"]
    for work in works:
        shutil.copytree(trunk_files.float32.parent, work)
    target = tmp_path / "key"
    barrier = threading.Barrier(2)

    def finish(work: Path) -> TrunkFiles:
        barrier.wait(10)
        return trunks._put_in_place(work, target)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(finish, works)
    assert first == second == TrunkFiles(target / "trunk.onnx", target / "trunk.int8.onnx", trunk_files.id)
    assert sum(work.exists() for work in works) == 1
