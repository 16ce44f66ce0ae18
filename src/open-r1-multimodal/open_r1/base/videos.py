"""Reads evenly spaced frames of a video, as images; a damaged or endless file is a broken image."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_r1.base.images import CORRUPT, MAX_PIXELS, TOO_LARGE, BrokenImage, ImageSource, image_size, open_image

# A file's suffix -> how it is read. FFmpeg would guess, and follow playlists to other files and addresses.
FORMATS = {".mp4": "mp4", ".mov": "mov", ".m4v": "mp4", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi"}
MAX_FRAMES = 32  # what the benchmarks of videos are asked with, by default
LONGEST = 2**17  # frames of a file, 73 minutes at 30 a second
TOO_MANY = f"video over {LONGEST} frames"
CACHED = 4  # videos whose frames are kept decoded, since many questions are about one video
HASHED_BYTES = 2**20


@dataclass(frozen=True)
class Video:
    """A video file, of which a model sees at most `max_frames` frames, evenly spaced from the first to the last."""

    path: str
    max_frames: int = MAX_FRAMES


@lru_cache(maxsize=4096)
def video_digest(video: Video) -> str:
    """SHA-256 of the file's size, its first MiB and the number of frames that are shown of it."""
    with open(video.path, "rb") as file:
        start = file.read(HASHED_BYTES)
    return hashlib.sha256(f"{Path(video.path).stat().st_size} {video.max_frames} ".encode() + start).hexdigest()


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; what PyAV raises inside becomes `BrokenImage`."""
    import av  # a quarter of a second that images can do without

    try:
        with av.open(path, format=FORMATS[Path(path).suffix.lower()]) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise BrokenImage(TOO_LARGE, path)
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, IndexError, ValueError) as error:  # IndexError: there are sounds alone
        raise BrokenImage(CORRUPT.replace("image", "video"), path) from error


@lru_cache(maxsize=4096)
def _shape(path: str) -> tuple[int, int, int]:
    """How many frames there are, their height and their width; counted without decoding, for a header may lie."""
    with _opened(path) as (container, stream):
        count = 0
        for packet in container.demux(stream):
            count += packet.size > 0
            if count > LONGEST:
                raise BrokenImage(TOO_MANY, path)
        return count, stream.height, stream.width


@lru_cache(maxsize=CACHED)
def _frames(video: Video) -> list[Image.Image]:
    count, _, _ = _shape(video.path)
    wanted = set(np.linspace(0, count - 1, min(count, video.max_frames), dtype=int).tolist())
    with _opened(video.path) as (container, stream):
        decoded = enumerate(container.decode(stream))
        images = [frame.to_image() for number, frame in decoded if number in wanted]
    if not images:
        raise BrokenImage(CORRUPT.replace("image", "video"), video.path)
    return images


def pictures(source: ImageSource | Video | None) -> list[Image.Image]:
    """What a model sees of an image or a video, in RGB: one picture, or its frames. Raises BrokenImage."""
    return list(_frames(source)) if isinstance(source, Video) else [open_image(source)]


def picture_sizes(source: ImageSource | Video | None) -> list[tuple[int, int]]:
    """Height and width of each of `pictures`, from headers. Raises BrokenImage."""
    if not isinstance(source, Video):
        return [image_size(source)]
    count, height, width = _shape(source.path)
    return [(height, width)] * min(count, source.max_frames)
