"""Edits of a picture, written behind its path and made when it is opened: `photo.jpg#xywh=0,0,320,240&reduce=2`.

So one photo on disk is many images of many questions. `xywh` is the box of W3C's Media Fragments; the others are ours,
each at most once and in this order:

    #xywh=X,Y,W,H       the part of the upright picture that is kept; all that follows is about this part
    &gap=X,Y,W,H        a box of it becomes grey
    &strips=2,0,1       it is cut into as many equal columns, which stand in this order
    &transpose=NAME     it is turned or mirrored, by a name of Pillow's `Image.Transpose`, as `rotate_90`
    &reduce=N           N x N pixels become one

All numbers are pixels. Edits come with a data set and are not trusted: an image whose edit leaves the picture
(`Edit.fits`) is refused when it is opened.
"""

import re
from dataclasses import dataclass

from PIL import Image

Region = tuple[int, int, int, int]  # x, y, width, height
GREY = (128, 128, 128)
_BOX = r"\d{1,6},\d{1,6},\d{1,6},\d{1,6}"
_EDIT = re.compile(
    rf"#xywh=(?P<box>{_BOX})(?:&gap=(?P<gap>{_BOX}))?(?:&strips=(?P<strips>\d(?:,\d)+))?"
    rf"(?:&transpose=(?P<transpose>{'|'.join(name.lower() for name in Image.Transpose.__members__)}))?"
    r"(?:&reduce=(?P<reduce>[1-9]\d?))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Edit:
    """What is done to a picture, in the order of the attributes; see the file's docstring."""

    box: Region
    gap: Region | None = None
    strips: tuple[int, ...] = ()
    transpose: str | None = None
    reduce: int = 1

    def __str__(self) -> str:
        """The edit as it stands behind a path."""
        parts = [("gap", join(self.gap)), ("strips", join(self.strips)), ("transpose", self.transpose)]
        parts.append(("reduce", str(self.reduce) if self.reduce > 1 else None))
        return f"#xywh={join(self.box)}" + "".join(f"&{name}={value}" for name, value in parts if value)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what comes out."""
        width, height = (-(-side // self.reduce) for side in self.box[2:])
        is_on_its_side = self.transpose in ("rotate_90", "rotate_270", "transpose", "transverse")
        return (height, width) if is_on_its_side else (width, height)

    def fits(self, width: int, height: int) -> bool:
        """Whether the edit stays inside an upright picture of this width and height."""
        is_inside = _is_inside(self.box, width, height) and (not self.gap or _is_inside(self.gap, *self.box[2:]))
        return is_inside and sorted(self.strips) == list(range(len(self.strips))) and len(self.strips) <= self.box[2]

    def apply(self, picture: Image.Image) -> Image.Image:
        """The edited copy of an upright RGB picture that the edit `fits`."""
        picture = picture.crop(_corners(self.box))
        if self.gap:
            picture.paste(GREY, _corners(self.gap))
        if self.strips:
            whole, cuts = picture.copy(), [picture.width * k // len(self.strips) for k in range(len(self.strips) + 1)]
            x = 0
            for strip in self.strips:
                picture.paste(whole.crop((cuts[strip], 0, cuts[strip + 1], whole.height)), (x, 0))
                x += cuts[strip + 1] - cuts[strip]
        if self.transpose:
            picture = picture.transpose(Image.Transpose[self.transpose.upper()])
        return picture.reduce(self.reduce)


def join(numbers: tuple[int, ...] | None) -> str:
    """`(1, 2)` -> `"1,2"`; None -> an empty text."""
    return ",".join(map(str, numbers or ()))


def split_edit(reference: str) -> tuple[str, Edit | None]:
    """Split a reference into its path and the edit behind it, or None; any other text stays in the path."""
    path, mark, _ = reference.rpartition("#xywh=")
    match = _EDIT.fullmatch(reference, len(path)) if mark else None
    if match is None:
        return reference, None
    box, gap, strips = (match[name] and tuple(map(int, match[name].split(","))) for name in ("box", "gap", "strips"))
    return path, Edit(box, gap, strips or (), match["transpose"], int(match["reduce"] or 1))


def _is_inside(box: Region, width: int, height: int) -> bool:
    x, y, w, h = box
    return w > 0 and h > 0 and x + w <= width and y + h <= height


def _corners(box: Region) -> tuple[int, int, int, int]:
    x, y, w, h = box
    return x, y, x + w, y + h
