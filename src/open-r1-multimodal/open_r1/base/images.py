"""Opens, measures and refuses images from any source (path, bytes, PIL), as the pixels that a model sees.

A source is a path, a `file://` URL, base64 (a `data:` URL, or bare), encoded bytes, a `{"bytes", "path"}` mapping (how
`datasets` stores an image) or a PIL image. The same picture gives the same pixels from each of them. Behind a path may
stand how the picture is edited (`edits.py`).
"""

import base64
import io
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from open_r1.base.edits import Edit, split_edit
from open_r1.base.errors import FileMistake, printable

ImageSource = str | os.PathLike[str] | bytes | Mapping[str, Any] | Image.Image

# A format's name in Pillow -> the extension of its files. MPO is a JPEG with more pictures behind the first. Pillow
# reads more formats, some of them by running other programs (EPS): not on files from a data set.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
FORMATS = [name for name in EXTENSIONS if name != "MPO"]  # Pillow opens an MPO as a JPEG

STORED = "open_r1_images"  # a folder in the cache of `datasets`, see `open_r1.running.data.store_image`

# The largest photos of today's phones and cameras; a progressive JPEG takes about 10 bytes a pixel to decode, 640 MiB
# at this size. Larger is a decompression bomb or a poster; the model looks at 0.4 megapixels.
MAX_PIXELS = 2**26
BRIGHT = 128  # a largest value from here to 255 means greys of 0..255 in a wider type; distances in metres stay below
SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations that change width and height
MAX_ASPECT_RATIO = 200  # Qwen2-VL's image processor raises above it

# What Pillow raises on damaged files of the formats above.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

# How JPEG, PNG, WEBP, GIF and TIFF begin in base64. A path that begins like one of them has a dot in it.
_BASE64 = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "SUkqA", "TU0AK")

# How a file of these formats ends; one that is cut off does not.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_TAIL = 4096  # bytes in which to look for the end; some programs write zeros or notes behind it

# Why an image is refused, short enough to be counted by.
CORRUPT = "corrupt image"
TOO_LARGE = f"image over {MAX_PIXELS} pixels"
TOO_LONG = f"image aspect ratio over {MAX_ASPECT_RATIO}"
OUTSIDE = "its edit does not fit the picture"
# Behind CORRUPT where no format is recognised, as of a whole AVIF, or of Git LFS's pointer under the image's name.
UNKNOWN = f", or none of {', '.join(FORMATS)}"


class BrokenImage(FileMistake):
    """An image that cannot be shown to a model. The message is one line and names the file, if it is one."""

    def __init__(self, reason: str, name: str | None = None, hint: str = ""):
        self.reason = reason
        super().__init__((f"image {name}: {reason}" if name else reason) + hint)


@contextmanager
def opened(source: ImageSource | None) -> Iterator[Image.Image]:
    """The image as it is stored, with its header read, its bounds and its edit checked.

    What Pillow raises in the block becomes `BrokenImage`.
    """
    if source is None:
        raise BrokenImage("missing image")
    name, data = image_name(source), image_bytes(source)
    try:
        if isinstance(source, Image.Image):
            _check_bounds(source.size, name)
            yield source
            return
        path, edit = split_edit(name or "")
        if data is None and not Path(path).is_file():  # a pipe would be waited for
            raise BrokenImage("no such file", name or "without a name")
        file = io.BytesIO(data) if data is not None else Path(path)
        with Image.open(file, formats=FORMATS) as image:
            _check_bounds(image.size, name)
            if edit and not edit.fits(*upright_size(image)):
                raise BrokenImage(OUTSIDE, name)
            if edit:
                _check_bounds(edit.size, name)
            yield image
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, met while it reads the header
        raise BrokenImage(TOO_LARGE, name) from error
    except UnidentifiedImageError as error:
        raise BrokenImage(CORRUPT, name, UNKNOWN) from error
    except DECODE_ERRORS as error:
        raise BrokenImage(getattr(error, "strerror", None) or CORRUPT, name) from error


def is_stored(path: Path) -> bool:
    """Whether a file is an image that a run took out of its data set: `STORED` has it under the digest of its bytes."""
    return path.parent.name == STORED and path.is_file() and sha256(path.read_bytes()).hexdigest() == path.stem


def open_image(source: ImageSource | None) -> Image.Image:
    """Decode an image whole, as `to_rgb` does, and edit it, or raise BrokenImage; no file stays open."""
    with opened(source) as image:
        picture = to_rgb(image, image_name(source))
    edit = image_edit(source)
    return edit.apply(picture) if edit else picture


def image_size(source: ImageSource | None) -> tuple[int, int]:
    """Height and width as stored, or as edited, from the header.

    EXIF rotation would change no count of tokens but SmolVLM's, by the ends of its rows of tiles; and to look for it
    decodes a PNG.
    """
    with opened(source) as image:
        edit = image_edit(source)
        width, height = edit.size if edit else image.size
        return height, width


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image as `to_rgb` turns it upright."""
    return image.size[::-1] if orientation(image) in SIDEWAYS else image.size


def check_image(path: str) -> None:
    """Raise BrokenImage if `open_image` would; decodes only when the last bytes leave that open."""
    with opened(path) as image:
        end = _ENDS.get("JPEG" if image.format == "MPO" else image.format)
        with open(image_file(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            is_whole = end is not None and end in file.read()
        if not is_whole:
            image.load()


def to_rgb(image: Image.Image, name: str | None = None) -> Image.Image:
    """An opened image, decoded, upright, in RGB; what is transparent becomes white, wider greys are put into 8 bits."""
    name = name or image_name(image)
    image.load()
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow would clip it
        image = Image.fromarray(to_8_bits(np.asarray(image), name))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """How an image is to be turned upright, as EXIF data number it; 1: not at all."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:  # damaged EXIF data say nothing; the picture is there without them
        return 1


def to_8_bits(greys: np.ndarray, name: str | None = None) -> np.ndarray:
    """Greys (H, W) of any type as bytes: 0..1 and 0..255 keep their scale, others (distances) fill black to white.

    NaN (nothing measured) becomes black, infinity as the most or the least.
    """
    values = np.array(greys, dtype=np.float64)
    is_finite = np.isfinite(values)
    if not is_finite.any():
        return np.zeros(values.shape, dtype=np.uint8)
    low, high = values.min(where=is_finite, initial=np.inf), values.max(where=is_finite, initial=-np.inf)
    np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    if low >= 0 and high <= 1:
        low, high = 0, 1
    elif low >= 0 and BRIGHT <= high <= 255:
        low, high = 0, 255
    elif low == high and greys.dtype == np.uint16:  # one grey alone has no range: its type's is taken
        low, high = 0, 65535
    elif low == high:  # the same distance everywhere
        return np.full(values.shape, BRIGHT, dtype=np.uint8)
    else:
        say_that_ranges_are_stretched(name, low, high)
    values -= low
    values *= 255 / (high - low)
    return values.round().astype(np.uint8)


_stretched: list[str] = []  # the first image that this process scaled by its own range


def say_that_ranges_are_stretched(name: str | None, low: float, high: float) -> None:
    """Warn, once in a process, that images are scaled by their own range, with the name of the first one."""
    if _stretched:
        return
    _stretched.append(printable(name or "without a name"))
    print(
        f"warning: image {_stretched[0]}: its values go from {low:g} to {high:g}; "
        "such images are scaled by their own range, to 0..255",
        file=sys.stderr,
        flush=True,
    )


def local_path(reference: str) -> str:
    """The path that a `file://` URL, percent-encoded or not, stands for; a path stays what it is."""
    if not reference.startswith("file://"):
        return reference
    plain = reference.removeprefix("file://")
    try:
        return plain if os.path.exists(plain) else url2pathname(urlsplit(reference).path)
    except ValueError as error:
        raise BrokenImage(f"not a URL of a file ({error})", reference) from error


def image_bytes(source: ImageSource) -> bytes | None:
    """The encoded bytes that a source carries; None when it names a file or is a PIL image."""
    if isinstance(source, Mapping):
        return source.get("bytes")
    if isinstance(source, bytes):
        return source
    if is_base64(source):
        text = source.partition(",")[2] if source.startswith("data:") else source
        try:
            return base64.b64decode("".join(text.split()), validate=True)  # some programs break its lines
        except ValueError as error:
            raise BrokenImage("not an image in base64", f"{source[:32]}...") from error
    return None


def is_base64(source: ImageSource) -> bool:
    """Whether a source is a text that holds the image itself, and no path."""
    if not isinstance(source, str):
        return False
    return source.startswith("data:") or (source.startswith(_BASE64) and "." not in source)


def image_name(source: ImageSource) -> str | None:
    """The path of the file that an image is or was opened from, where it is known, with the edit behind it."""
    if isinstance(source, Mapping):
        return source.get("path")
    if isinstance(source, Image.Image):
        return getattr(source, "filename", None) or None
    if isinstance(source, bytes) or is_base64(source):
        return None
    path, edit = split_edit(os.fspath(source))
    return f"{local_path(path)}{edit or ''}"


def image_file(reference: str | os.PathLike[str]) -> str:
    """The path of the file alone, of a reference that is no URL."""
    return split_edit(os.fspath(reference))[0]


def image_edit(source: ImageSource) -> Edit | None:
    """What is done to an image when it is opened, if anything is."""
    return split_edit(image_name(source) or "")[1]


def _check_bounds(size: tuple[int, int], name: str | None) -> None:
    if math.prod(size) > MAX_PIXELS:  # known before any pixel is decoded
        raise BrokenImage(TOO_LARGE, name)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise BrokenImage(TOO_LONG, name)
