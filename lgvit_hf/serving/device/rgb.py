"""The one definition of an image file as pixels: upright, eight bits, opaque RGB or grey. Needs numpy and pillow.

Training, `Predictor`, `lgvit predict`, services, split parts and `infer.py` all read images by it:

- EXIF's orientation is applied, then dropped; EXIF that cannot be read counts as none;
- of an animation or a file of several pages the first picture is taken;
- 16 bits per channel are scaled to 8 (divided by 257); numbers without a known range (32 bits, floats) are refused;
- what is transparent is laid over white;
- palettes, black and white, CMYK, YCbCr and HSV become RGB as pillow converts them; colour profiles are not applied;
- a model of one channel gets the luminance of the RGB image (ITU-R 601-2).
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

# raster formats whose decoders run no other program, as that of EPS does
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")
Image.init()  # pillow knows no more than five of them before
MAX_PIXELS = 50_000_000
MAX_SIDE = 32_768
# pixels times scans of a JPEG, each of which goes over the whole picture; usual are 10 or fewer
MAX_SCANNED = 10 * MAX_PIXELS
# of a resized image, in squares of its shortest edge: a thin image must not become a huge one
MAX_ASPECT = 16
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_MODES = {1: "L", 3: "RGB"}


class TooLarge(ValueError):
    """An image that would take too long, or too much memory, to decode."""


def read_image(
    source: bytes | str | Path, max_pixels: int = MAX_PIXELS, max_scanned: int = MAX_SCANNED
) -> Image.Image:
    """The picture in an image file, as `as_rgb` gives it.

    Args:
        source (`bytes`, `str` or `Path`): What the file holds, or where it is.
        max_pixels (`int`, *optional*, defaults to 50 million): Of a file that is decoded, if less than usual.
        max_scanned (`int`, *optional*, defaults to 500 million): Pixels times scans of a JPEG, if less than usual.

    Raises:
        TooLarge: It has more pixels, or scans (of a JPEG), than are decoded.
        ValueError: It is none of `IMAGE_FORMATS`, is damaged or empty, too large, or of a mode that has no RGB.

    Example:

        >>> read_image(b"GIF89a")
        Traceback (most recent call last):
        ...
        ValueError: no readable image: not an image, or none of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM, ...
    """
    if source == b"":
        raise ValueError("no readable image: the file is empty")
    try:
        # pillow warns of what is refused here anyway
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=IMAGE_FORMATS) as opened:
                check_size(opened)
                _check_work(opened, max_pixels, max_scanned)
                return as_rgb(opened)
    except TooLarge as error:
        raise TooLarge(f"no readable image: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"no readable image: not an image, or none of {', '.join(IMAGE_FORMATS)}") from None
    # pillow's decoders raise errors of many kinds on damaged files
    except Exception as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        )
        raise ValueError(f"no readable image: {' '.join(str(reason).split())[:200]}") from error


def check_size(image: Image.Image) -> None:
    """Raise `ValueError` for an image with too many pixels, or none, before they are decoded."""
    width, height = image.size
    if not width or not height:
        raise ValueError(f"it has {width} x {height} pixels")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"it has {width} x {height} pixels; at most {MAX_PIXELS:,} are taken, and {MAX_SIDE:,} on one side"
        )


def _check_work(image: Image.Image, max_pixels: int, max_scanned: int) -> None:
    """Raise `TooLarge` for a file whose decoding would take more than its bytes tell."""
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise TooLarge(f"it has {image.width} x {image.height} pixels; at most {max_pixels:,} are left to decode")
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.fp is not None:
        position = image.fp.tell()
        image.fp.seek(0)
        scans = image.fp.read().count(b"\xff\xda")
        image.fp.seek(position)
        most = min(max_scanned, 10 * max_pixels)
        if pixels * scans > most:
            raise TooLarge(f"it has {pixels:,} pixels in {scans} scans; at most {most:,} together are decoded")


def as_rgb(image: Image.Image, num_channels: int = 3) -> Image.Image:
    """An open image as a model sees it, by the rules at the top of this file.

    Args:
        image (`PIL.Image.Image`): Of any mode.
        num_channels (`int`, *optional*, defaults to 3): 3 for RGB, 1 for grey.

    Raises:
        ValueError: It is too large, or of a mode that has no RGB.

    Example:

        >>> as_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
        >>> as_rgb(Image.fromarray(np.full((1, 1), 65535, np.uint16))).getpixel((0, 0))
        (255, 255, 255)
    """
    check_size(image)
    # their decoders give 16 bits as mode I, and a copy has no format
    sixteen_bits = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = _upright(image)
    if sixteen_bits:
        image = _eight_bits(image)
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range: save it with 8 or 16 bits per channel")
    elif image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    rgb = image.convert("RGB").convert(_MODES[num_channels])
    rgb.info = {}  # an orientation, once applied, must not be applied again
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    """The picture as EXIF turns it; EXIF that is damaged says nothing, as in browsers."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    # pillow's readers of it raise errors of many kinds
    except Exception:
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values from {values.min()} to {values.max()} are not of 16 bits")
    # 65535 is 255 x 257: the nearest of the 256 levels
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def check_resized(image: Image.Image, shortest_edge: int) -> None:
    """Raise `ValueError` for an image that would become huge when its shortest edge is made `shortest_edge` long.

    Example:

        >>> check_resized(Image.new("L", (1, 5000)), 224)
        Traceback (most recent call last):
        ...
        ValueError: it has 1 x 5000 pixels; with a shortest edge of 224 its sides may be at most 16 to 1
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(
            f"it has {image.width} x {image.height} pixels; with a shortest edge of {shortest_edge} its sides may be "
            f"at most {MAX_ASPECT} to 1"
        )
