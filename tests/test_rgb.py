"""One definition of an image as pixels: every road from a file to a model gives the same numbers."""

import io
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from lgvit_hf.data.datasets import load_unlabelled
from lgvit_hf.data.processing import ProcessedImages, channels_of, make_processor, open_processor
from lgvit_hf.export.infer import INFER, write_infer
from lgvit_hf.serving.device.pixels import pixel_settings, prepare
from lgvit_hf.serving.device.rgb import IMAGE_FORMATS, MAX_PIXELS, as_rgb, check_resized, read_image
from lgvit_hf.serving.predictor import Predictor, open_image
from lgvit_hf.serving.whole_model import Whole
from tests.seeds import rng
from tests.tiny import IMAGE_SIZE, tiny_model

pytestmark = pytest.mark.version_independent


def colours(seed=0, size=(20, 30)):
    return rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def written(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return written(image, exif=exif)


def with_profile(image):
    return written(image, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


RGB = Image.fromarray(colours())
GREY = np.asarray(RGB.convert("L"))
ALPHA = Image.fromarray(np.dstack([colours(), rng(1).integers(0, 256, (20, 30), dtype=np.uint8)]))
WHITE = Image.new("RGBA", RGB.size, "white")
# a file, and the same picture as anybody would paint it in RGB
PICTURES = {
    "rgb": (written(RGB), RGB),
    "bmp": (written(RGB, "BMP"), RGB),
    "ppm": (written(RGB, "PPM"), RGB),
    "tga": (written(RGB, "TGA"), RGB),
    "grey": (written(Image.fromarray(GREY)), Image.fromarray(GREY).convert("RGB")),
    "16 bits": (written(Image.fromarray(GREY.astype(np.uint16) * 257)), Image.fromarray(GREY).convert("RGB")),
    "16 bits, TIFF": (
        written(Image.fromarray((GREY.astype(np.uint16) * 257).astype(">u2")), "TIFF"),
        Image.fromarray(GREY).convert("RGB"),
    ),
    "black and white": (written(RGB.convert("1")), RGB.convert("1").convert("RGB")),
    "palette": (written(RGB.quantize(16)), RGB.quantize(16).convert("RGB")),
    "gif": (written(RGB.quantize(16), "GIF"), RGB.quantize(16).convert("RGB")),
    "alpha": (written(ALPHA), Image.alpha_composite(WHITE, ALPHA).convert("RGB")),
    "grey and alpha": (
        written(ALPHA.convert("LA")),
        Image.alpha_composite(WHITE, ALPHA.convert("LA").convert("RGBA")).convert("RGB"),
    ),
    "cmyk": (written(RGB.convert("CMYK"), "TIFF"), RGB.convert("CMYK").convert("RGB")),
    "turned": (turned(RGB), Image.fromarray(np.rot90(np.asarray(RGB), -1))),
    "damaged EXIF": (written(RGB, exif=b"Exif\0\0ML\0*\0\0\0\x08"), RGB),
    "16 bits, PPM": (
        b"P5 30 20 65535 " + (GREY.astype(np.uint16) * 257).astype(">u2").tobytes(),
        Image.fromarray(GREY).convert("RGB"),
    ),
    "profile": (with_profile(RGB), RGB),
}
every_picture = pytest.mark.parametrize("picture", PICTURES)


@every_picture
def test_as_anybody_would_paint_it(picture):
    file, painted = PICTURES[picture]
    found = read_image(file)
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(painted))
    assert np.array_equal(np.asarray(as_rgb(found)), np.asarray(painted))  # once more changes nothing
    assert np.array_equal(np.asarray(as_rgb(found, 1)), np.asarray(painted.convert("L")))


@pytest.fixture(scope="module", params=[3, 1], ids=["colour", "grey"])
def model_folder(request, tmp_path_factory):
    """A checkpoint for images of three channels or of one, and files of every picture."""
    folder = tmp_path_factory.mktemp("rgb")
    tiny_model("vit", exit_positions=[3], exit_types="linear", num_channels=request.param).save_pretrained(folder)
    make_processor(IMAGE_SIZE, request.param).save_pretrained(folder)
    (folder / "images").mkdir()
    for number, (file, _) in enumerate(PICTURES.values()):
        (folder / "images" / f"{number:02}.png").write_bytes(file)  # pillow looks at what is in a file
    return folder


def test_every_road_gives_the_same_pixels(model_folder):
    processor = open_processor(model_folder)
    channels = channels_of(processor)
    predictor, whole = Predictor(model_folder), Whole(model_folder)
    settings = pixel_settings(processor.to_dict(), channels)
    training = ProcessedImages(load_unlabelled(str(model_folder / "images")), processor)
    for number, (picture, (file, painted)) in enumerate(PICTURES.items()):
        seen = np.asarray(painted if channels == 3 else painted.convert("L")).reshape(*painted.size[::-1], channels)
        expected = processor(seen, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        roads = {
            "training": training[number]["pixel_values"].numpy(),
            "Predictor": predictor.pixel_values(file),
            "Predictor, open": predictor.pixel_values(Image.open(io.BytesIO(file))),
            "serve": whole.pixels(read_image(file)),
            "device, infer.py": prepare(read_image(file), settings),
        }
        for road, found in roads.items():
            np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=f"{picture}, {road}")
    answers = predictor.images([file for file, _ in PICTURES.values()])
    assert len(answers["label"]) == len(PICTURES)


def test_infer_reads_images_as_everybody_does(tmp_path):
    write_infer(tmp_path, make_processor(IMAGE_SIZE), 3)
    assert (tmp_path / "infer.py").read_text() == INFER
    code = "import sys; from lgvit_pixels.rgb import read_image; print(read_image(sys.argv[1]).size)"
    (tmp_path / "photo.png").write_bytes(turned(RGB))
    run = [sys.executable, "-c", code, "photo.png"]
    assert subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "(20, 30)\n"


def test_infer_is_left_out_where_it_could_not_follow(tmp_path):
    processor = make_processor(IMAGE_SIZE)
    processor.do_resize = False
    with pytest.warns(UserWarning, match="infer.py is left out"):
        write_infer(tmp_path, processor, 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("F", (4, 4)), "mode 'F' have no known range"),
        (Image.new("I", (4, 4)), "mode 'I' have no known range"),
        (Image.new("L", (40_000, 1)), "40000 x 1 pixels; at most 50,000,000"),
    ],
    ids=["floats", "32 bits", "side"],
)
def test_what_has_no_rgb_is_refused(image, reason, tmp_path):
    image.save(tmp_path / "image.tif")
    file = (tmp_path / "image.tif").read_bytes()
    with pytest.raises(ValueError, match=reason):
        as_rgb(image)
    for read in (read_image, open_image):
        with pytest.raises(ValueError, match=f"no readable image: .*{reason}"):
            read(file)
    with pytest.raises(ValueError, match="image.tif is no readable image"):
        open_image(tmp_path / "image.tif")


def test_pixels_are_counted_before_they_are_decoded():
    header = bytearray(written(Image.new("L", (8, 8))))
    side = int(MAX_PIXELS**0.5) + 1
    header[16:24] = side.to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match=f"{side} x {side} pixels"):
        read_image(bytes(header))


def test_a_thin_image_does_not_become_a_huge_one():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    images = ProcessedImages([], processor)
    with pytest.raises(ValueError, match="1 x 20000 pixels; with a shortest edge of 224"):
        images.pixels(Image.new("RGB", (1, 20_000)))
    assert images.pixels(Image.new("RGB", (10, 160))).shape == (3, 224, 224)
    check_resized(Image.new("L", (1, 16)), 224)
    # to a height and a width any shape may go
    assert ProcessedImages([], make_processor(16)).pixels(Image.new("RGB", (1, 20_000))).shape == (3, 16, 16)


def test_damaged_files_are_refused_with_a_sentence():
    whole = written(RGB)
    for damaged in (b"", b"text", whole[:50], whole[: len(whole) // 2], whole[:12] + b"\xff" + whole[13:]):
        with pytest.raises(ValueError, match="^no readable image: "):
            read_image(damaged)
    with pytest.raises(ValueError, match="nowhere.png is no readable image: No such file"):
        open_image("nowhere.png")


def test_formats_that_run_other_programs_are_not_opened():
    assert "EPS" not in IMAGE_FORMATS
    with pytest.raises(ValueError, match="none of PNG"):
        read_image(written(RGB, "EPS"))
