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
from open_r1.base.images import BrokenImage, check_image, image_size, open_image
from open_r1.evaluate import answering

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
    "RGB": encode(Image.fromarray(noise(20, 30, 3)), "PNG"),
    "RGBA": encode(Image.fromarray(noise(20, 30, 4)), "PNG"),
    "grey and alpha": encode(Image.fromarray(noise(20, 30, 2), mode="LA"), "PNG"),
    "palette with transparency": palette_with_transparency(),
    "one transparent colour": encode(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
    "16-bit grey": encode(Image.fromarray(RNG.integers(0, 2**16, (20, 30), dtype=np.uint16)), "PNG"),
    "16-bit TIFF": encode(Image.fromarray(RNG.integers(0, 2**16, (20, 30), dtype=np.uint16)), "TIFF"),
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


def test_evaluation_opens_images_as_training_does():
    assert answering.open_image is images.open_image


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


DEPTHS = {  # what a sensor or a simulator writes: metres, millimetres, disparities, heights above the sea
    "metres": np.linspace(0.4, 9.7, 600, dtype=np.float32),
    "metres in whole numbers": np.arange(60, dtype=np.int32).repeat(10),
    "millimetres": np.linspace(412, 4088, 600).astype(np.uint16),
    "millimetres in 32 bits": np.linspace(412, 70_000, 600).astype(np.int32),
    "heights": np.linspace(-400, 80, 600, dtype=np.float32),
    "kilometres of a sky": np.linspace(1e30, 3e38, 600, dtype=np.float32),
}


def depth_file(name: str) -> bytes:
    return encode(Image.fromarray(DEPTHS[name].reshape(20, 30)), "TIFF")


@pytest.fixture
def unwarned(monkeypatch):
    """As in a process that has stretched no image yet."""
    monkeypatch.setattr(images, "_stretched", [])


@pytest.mark.parametrize("name", DEPTHS)
def test_a_depth_map_keeps_its_greys_from_every_source(name, tmp_path, unwarned, capsys):
    values = DEPTHS[name].astype(np.float64)
    expected = np.rint((values - values.min()) / (values.max() - values.min()) * 255).reshape(20, 30)
    for source, value in sources(depth_file(name), tmp_path).items():
        pixels = np.asarray(open_image(value))
        assert (np.ptp(pixels, axis=2) == 0).all() and np.abs(pixels[..., 0] - expected).max() <= 1, source
    assert capsys.readouterr().err.count("scaled by their own range") == 1


def test_the_first_stretched_image_is_named_and_no_other(tmp_path, unwarned, capsys):
    for name in ("a.tif", "b.tif"):
        (tmp_path / name).write_bytes(depth_file("metres"))
        open_image(tmp_path / name)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: image {tmp_path}/a.tif: its values go from 0.4 to 9.7; such images are scaled")


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0, 0.25, 1.0], [0, 64, 255]),  # the greys of 0..1
        ([0.0, 0.25, 0.5], [0, 64, 128]),
        ([3.0, 99.6, 200.0], [3, 100, 200]),  # the greys of 0..255
        ([np.nan, 2.0, 12.0], [0, 0, 255]),
        ([-np.inf, 2.0, 12.0], [0, 0, 255]),
        ([2.0, 12.0, np.inf], [0, 255, 255]),
        ([np.nan, np.nan, np.inf], [0, 0, 0]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
        ([1.0, 1.0, 1.0], [255, 255, 255]),
        ([7.5, 7.5, 7.5], [128, 128, 128]),
    ],
)
def test_greys_of_floats(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F" and [pixel[0] for pixel in open_image(image).getdata()] == expected


def test_photos_are_turned_upright():
    stored = Image.open(io.BytesIO(PICTURES["turned by EXIF"]))
    assert stored.size == (50, 30) and open_image(PICTURES["turned by EXIF"]).size == (30, 50)
    assert open_image(PICTURES["turned by EXIF"]).tobytes() == stored.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert image_size(PICTURES["turned by EXIF"]) == (30, 50)  # height and width as stored


def test_damaged_exif_data_do_not_matter():
    data = PICTURES["turned by EXIF"]
    start = data.index(b"Exif\0\0") + 6
    broken = data[:start] + b"\xff" * 8 + data[start + 8 :]
    assert open_image(broken).size == (50, 30)


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of any size, and nothing behind it."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 99) + b"IDAT"


CUT = encode(Image.fromarray(noise(200, 200, 3)), "JPEG")
BROKEN = {
    "empty": (b"", "corrupt image"),
    "text": (b"not an image", "corrupt image"),
    "JPEG, cut": (CUT[: len(CUT) // 2], "corrupt image"),
    "PNG, cut": (PICTURES["RGBA"][:-400], "corrupt image"),
    "WebP, cut": (PICTURES["WebP"][:-400], "corrupt image"),
    "200 megapixels": (png_header(20_000, 10_000), f"image over {images.MAX_PIXELS} pixels"),
    "70 megapixels": (png_header(10_000, 7_000), f"image over {images.MAX_PIXELS} pixels"),
    "thin": (encode(Image.new("RGB", (2010, 10)), "PNG"), "image aspect ratio over 200"),
    "another program's": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "corrupt image"),
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
    assert str(caught.value) == reason == caught.value.reason


@pytest.mark.parametrize("source", [None, "nowhere.png", ".", "https://example.org/a.png"])
def test_what_is_no_file_is_one_line(source):
    with pytest.raises(BrokenImage) as caught:
        open_image(source)
    assert "\n" not in str(caught.value) and (source is None or source in str(caught.value))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BrokenImage, match="pipe: no such file"):
        open_image(tmp_path / "pipe")


@pytest.mark.parametrize("name", PICTURES)
def test_what_passes_the_check_can_be_opened(name, tmp_path):
    for tail in (b"", b"\0" * 100):  # some programs write on
        (tmp_path / "x").write_bytes(PICTURES[name] + tail)
        check_image(tmp_path / "x")
        assert open_image(tmp_path / "x").tobytes() == open_image(PICTURES[name]).tobytes()
        assert image_size(tmp_path / "x") == Image.open(io.BytesIO(PICTURES[name])).size[::-1]


@pytest.mark.parametrize("name", PICTURES)
def test_the_check_takes_and_refuses_what_decoding_does(name, tmp_path):
    """Of files cut anywhere: none passes and cannot be opened, and the whole one passes."""
    data, verdicts = PICTURES[name], []
    for length in [*range(0, len(data), max(1, len(data) // 23)), len(data)]:
        (tmp_path / "x").write_bytes(data[:length])
        try:
            check_image(tmp_path / "x")
        except BrokenImage:
            verdicts.append(False)
            continue
        open_image(tmp_path / "x")
        verdicts.append(True)
    assert verdicts[-1] and not any(verdicts[: len(verdicts) // 2])


def test_the_check_decodes_no_whole_jpeg_and_png(tmp_path, monkeypatch):
    """15,000 images are checked in seconds."""
    (tmp_path / "a.jpg").write_bytes(CUT)
    (tmp_path / "a.png").write_bytes(PICTURES["RGBA"])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    check_image(tmp_path / "a.jpg")
    check_image(tmp_path / "a.png")
