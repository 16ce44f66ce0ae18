"""One way to open an image: the same pixels from every source, and one line for what cannot be shown."""

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_r1.base import images
from open_r1.base.edits import Edit, split_edit
from open_r1.base.images import BrokenImage, check_image, image_size, open_image

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_photo() -> bytes:
    """A landscape whose EXIF data say that it is to be turned, as phones write portraits."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.fromarray(noise(30, 50, 3)), "JPEG", exif=exif, quality=95)


def palette_with_transparency() -> bytes:
    image = Image.fromarray(noise(20, 20) % 4, mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    return encode(image, "PNG", transparency=3)


PICTURES = {
    "RGBA": encode(Image.fromarray(noise(20, 30, 4)), "PNG"),
    "grey and alpha": encode(Image.fromarray(noise(20, 30, 2), mode="LA"), "PNG"),
    "palette with transparency": palette_with_transparency(),
    "one transparent colour": encode(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
    "16-bit grey": encode(Image.fromarray(RNG.integers(0, 2**16, (20, 30), dtype=np.uint16)), "PNG"),
    "turned by EXIF": rotated_photo(),
    "CMYK": encode(Image.new("CMYK", (20, 30), (9, 80, 200, 30)), "JPEG"),
    "WebP": encode(Image.fromarray(noise(20, 30, 4)), "WEBP", lossless=True),
}


def sources(data: bytes, folder: Path) -> dict[str, object]:
    path = folder / "a picture %41.img"
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    return {
        "path": path,
        "path as text": str(path),
        "URL": path.as_uri(),
        "URL as some write it": f"file://{path}",
        "base64": f"data:image/png;base64,{encoded}",
        "base64 alone": encoded,
        "base64 in lines": base64.encodebytes(data).decode(),
        "bytes": data,
        "datasets, with bytes": {"bytes": data, "path": "elsewhere.png"},
        "datasets, with a path": {"bytes": None, "path": str(path)},
        "PIL": Image.open(io.BytesIO(data)),
        "PIL, decoded": Image.open(io.BytesIO(data)).copy(),
    }


@pytest.mark.parametrize("name", PICTURES)
def test_every_source_gives_the_same_pixels(name, tmp_path):
    assert "%20" in (tmp_path / "a picture").as_uri()
    opened = {source: open_image(value) for source, value in sources(PICTURES[name], tmp_path).items()}
    first = opened["path"]
    assert first.mode == "RGB"
    for source, image in opened.items():
        assert image.size == first.size and image.tobytes() == first.tobytes(), source


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert list(open_image(image).getdata()) == [(255, 255, 255), (10, 20, 30)]
    assert open_image(PICTURES["one transparent colour"]).getpixel((0, 0)) == (255, 255, 255)


def test_16_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 0x4000, 0xFFFF]], dtype=np.uint16)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        assert [pixel[0] for pixel in open_image(image).getdata()] == [0, 0x40, 0xFF]
    small = Image.fromarray(np.array([[0, 200]], dtype=np.int32))  # 8 bits in a wider mode
    assert [pixel[0] for pixel in open_image(small).getdata()] == [0, 200]


DEPTHS = {  # what a sensor or a simulator writes: metres, millimetres, heights above the sea
    "metres": np.linspace(0.4, 9.7, 600, dtype=np.float32),
    "millimetres": np.linspace(412, 4088, 600).astype(np.uint16),
    "heights": np.linspace(-400, 80, 600, dtype=np.float32),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_a_depth_map_keeps_its_greys_and_the_first_is_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "_stretched", [])
    values = DEPTHS[name].astype(np.float64)
    expected = np.rint((values - values.min()) / (values.max() - values.min()) * 255).reshape(20, 30)
    data = encode(Image.fromarray(DEPTHS[name].reshape(20, 30)), "TIFF")
    for source, value in sources(data, tmp_path).items():
        pixels = np.asarray(open_image(value))
        assert (np.ptp(pixels, axis=2) == 0).all() and np.abs(pixels[..., 0] - expected).max() <= 1, source
    (line,) = capsys.readouterr().err.splitlines()
    spread = f"{values.min():g} to {values.max():g}"
    assert line.startswith(f"warning: image {tmp_path}/a picture %41.img: its values go from {spread}; such images are")


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0, 0.25, 1.0], [0, 64, 255]),  # the greys of 0..1
        ([3.0, 99.6, 200.0], [3, 100, 200]),  # the greys of 0..255
        ([np.nan, 2.0, 12.0], [0, 0, 255]),
        ([-np.inf, 2.0, 12.0, np.inf], [0, 0, 255, 255]),
        ([np.nan, np.nan, np.inf], [0, 0, 0]),
        ([1.0, 1.0, 1.0], [255, 255, 255]),
        ([7.5, 7.5, 7.5], [128, 128, 128]),
    ],
)
def test_greys_of_floats(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F" and [pixel[0] for pixel in open_image(image).getdata()] == expected


def test_photos_are_turned_upright():
    photo = PICTURES["turned by EXIF"]
    stored = Image.open(io.BytesIO(photo))
    assert open_image(photo).tobytes() == stored.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert stored.size == (50, 30) and image_size(photo) == (30, 50)  # height and width as stored
    start = photo.index(b"Exif\0\0") + 6
    assert open_image(photo[:start] + b"\xff" * 8 + photo[start + 8 :]).size == (50, 30)  # damaged EXIF data


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of any size, and nothing behind it."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 99) + b"IDAT"


CUT = encode(Image.fromarray(noise(200, 200, 3)), "JPEG")
NO_FORMAT = "corrupt image, or none of JPEG, PNG, WEBP, GIF, BMP, TIFF"
BROKEN = {
    "empty": (b"", NO_FORMAT),
    "JPEG, cut": (CUT[: len(CUT) // 2], "corrupt image"),
    "PNG, cut": (PICTURES["RGBA"][:-400], "corrupt image"),
    "200 megapixels": (png_header(20_000, 10_000), f"image over {images.MAX_PIXELS} pixels"),
    "70 megapixels": (png_header(10_000, 7_000), f"image over {images.MAX_PIXELS} pixels"),
    "thin": (encode(Image.new("RGB", (2010, 10)), "PNG"), "image aspect ratio over 200"),
    "another program's": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_FORMAT),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_shown_is_one_line(name, tmp_path):
    data, reason = BROKEN[name]
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    for look in (open_image, check_image):  # before the first step, and whenever it is used
        with pytest.raises(BrokenImage) as caught:
            look(str(path))
        assert str(caught.value) == f"image {path}: {reason}"
    with pytest.raises(BrokenImage) as caught:
        open_image(data)
    assert str(caught.value) == reason and caught.value.reason == reason.partition(",")[0]


def test_what_is_no_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # which is not waited for
    for source in (str(tmp_path / "pipe"), str(tmp_path), "nowhere.png", "https://example.org/a.png"):
        with pytest.raises(BrokenImage, match=f"^image {source}: no such file$"):
            open_image(source)
    with pytest.raises(BrokenImage, match=r"^missing image$"):
        open_image(None)


@pytest.mark.parametrize("name", PICTURES)
def test_the_check_takes_and_refuses_what_decoding_does(name, tmp_path):
    """Of files cut anywhere: none passes and cannot be opened; the whole one passes, also where a program wrote on."""
    path, data, verdicts = tmp_path / "x", PICTURES[name], []
    for length in [*range(0, len(data), max(1, len(data) // 23)), len(data)]:
        path.write_bytes(data[:length])
        try:
            check_image(path)
        except BrokenImage:
            verdicts.append(False)
            continue
        open_image(path)
        verdicts.append(True)
    assert verdicts[-1] and not any(verdicts[: len(verdicts) // 2])
    path.write_bytes(data + b"\0" * 100)
    check_image(path)
    assert open_image(path).tobytes() == open_image(data).tobytes()


def test_the_check_decodes_no_whole_jpeg_and_png(tmp_path, monkeypatch):
    """15,000 images are checked in seconds."""
    (tmp_path / "a.jpg").write_bytes(CUT)
    (tmp_path / "a.png").write_bytes(PICTURES["RGBA"])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    check_image(tmp_path / "a.jpg")
    check_image(tmp_path / "a.png")


# --- edits behind a path ------------------------------------------------------------------------------------------

EDITS = {
    "#xywh=4,2,24,12": lambda pixels: pixels,
    "#xywh=4,2,24,12&gap=6,0,9,5": lambda pixels: with_grey(pixels, 6, 0, 9, 5),
    "#xywh=4,2,24,12&strips=2,0,1": lambda pixels: np.hstack([pixels[:, 16:], pixels[:, :8], pixels[:, 8:16]]),
    "#xywh=4,2,24,12&transpose=rotate_90": np.rot90,
    "#xywh=4,2,24,12&transpose=flip_left_right": np.fliplr,
    "#xywh=4,2,24,12&reduce=3": lambda pixels: pixels.reshape(4, 3, 8, 3, 3).mean((1, 3)),
    "#xywh=4,2,24,12&gap=0,0,24,1&strips=1,0&transpose=rotate_180&reduce=1": lambda pixels: np.rot90(
        np.hstack([with_grey(pixels, 0, 0, 24, 1)[:, 12:], with_grey(pixels, 0, 0, 24, 1)[:, :12]]), 2
    ),
}


def with_grey(pixels: np.ndarray, x: int, y: int, w: int, h: int) -> np.ndarray:
    pixels = pixels.copy()
    pixels[y : y + h, x : x + w] = 128
    return pixels


@pytest.mark.parametrize("edit", EDITS)
def test_a_picture_is_edited_when_it_is_opened(edit, tmp_path):
    path, pixels = tmp_path / "a photo.png", noise(20, 30, 3)
    Image.fromarray(pixels).save(path)
    expected = EDITS[edit](pixels[2:14, 4:28])
    for source in (f"{path}{edit}", f"{path.as_uri()}{edit}", {"bytes": None, "path": f"{path}{edit}"}):
        opened = np.asarray(open_image(source))
        assert np.abs(opened - expected).max() <= 1 and image_size(source) == opened.shape[:2]
    check_image(f"{path}{edit}")
    assert split_edit(f"{path}{edit}") == (str(path), Edit(**vars(split_edit(f"{path}{edit}")[1])))
    assert str(split_edit(f"{path}{edit}")[1]) == edit.removesuffix("&reduce=1")


def test_a_box_is_one_of_the_upright_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURES["turned by EXIF"])  # stored as 50 x 30
    box = f"{tmp_path}/a.jpg#xywh=5,30,20,20"
    assert open_image(box).tobytes() == open_image(tmp_path / "a.jpg").crop((5, 30, 25, 50)).tobytes()
    check_image(box)
    with pytest.raises(BrokenImage, match="its edit does not fit the picture"):
        check_image(f"{tmp_path}/a.jpg#xywh=30,5,20,20")


@pytest.mark.parametrize(
    "edit, reason",
    {
        "#xywh=0,0,31,20": images.OUTSIDE,
        "#xywh=29,0,2,2": images.OUTSIDE,
        "#xywh=0,0,0,5": images.OUTSIDE,
        "#xywh=0,0,9,9&gap=5,5,5,5": images.OUTSIDE,
        "#xywh=0,0,9,9&strips=0,0,1": images.OUTSIDE,
        "#xywh=0,0,9,9&strips=1,2": images.OUTSIDE,
        "#xywh=0,0,2,9&strips=1,2,0": images.OUTSIDE,
        "#xywh=0,0,1,300": "image aspect ratio over 200",
        "#xywh=-1,0,9,9": "no such file",  # another form is a part of the file's name
        "#xywh=0,0,9": "no such file",
        "#xywh=0,0,9,9&reduce=0": "no such file",
        "#xywh=0,0,9,9&transpose=blur": "no such file",
        "#xywh=0,0,9,9&reduce=2&gap=0,0,1,1": "no such file",
    }.items(),
)
def test_an_edit_that_cannot_be_made_is_one_line(edit, reason, tmp_path):
    name = str(tmp_path / "x.png")
    Image.fromarray(noise(300 if "300" in edit else 20, 30, 3)).save(name)
    for look in (open_image, check_image, image_size):
        with pytest.raises(BrokenImage) as caught:
            look(name + edit)
        assert str(caught.value) == f"image {name}{edit}: {reason}"
