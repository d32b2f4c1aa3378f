"""Inputs: what the user gives (a photo, a mask, a background, poses) as pictures of known kind.

Every refusal is one line that says what was wrong and what to do.
"""
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageOps

from nanodisco import estimate, pose, transforms, video
from nanodisco.errors import InputError
from nanodisco.tsv import Table

DARK = 32                              # grey levels that count as black
SMALL = 128                            # pixels of a frame, below which sticks hide the person
Say = Callable[[str], None]


def _given(mask: str, picture: Image.Image, path: str, say: Say) -> Image.Image:
    """A mask by its name; "black": whatever is not black in the picture.   -> L"""
    if mask == "black":
        return transforms.not_black(picture)
    found = video.picture(mask).convert("L")
    if found.size != picture.size:
        say(f"{mask} is {found.width}x{found.height}, {path} {picture.width}x{picture.height}: the mask is resized")
    return found


def photo(path: str, mask: str | None, say: Say) -> tuple[Image.Image, Image.Image]:
    """The reference and where the person is in it.   -> RGB, L (255 is the person)

    mask: a picture; "black": the person was cut out on black; None: the picture's own alpha, else estimated.
    """
    picture = video.picture(path)
    if mask:
        found = _given(mask, picture, path, say)
    elif picture.mode == "RGBA" and picture.getchannel("A").getextrema()[0] < 255:       # opaque, it says nothing
        found = picture.getchannel("A")
    elif estimate.installed():
        found = estimate.mask(picture)
        say(f"{path}: the person was found by MediaPipe (--ref-mask MASK.png says better)")
    else:
        raise InputError(f"{path} does not say where the person is. Give a mask with --ref-mask MASK.png (white is the "
                         f"person), or a picture with transparency, or have the person found: {estimate.INSTALL}")
    if not found.getbbox():
        raise InputError(f"the mask of {path} ({mask or 'its own'}) is empty: no person in it; white is the person")
    return picture.convert("RGB"), found


def scene(path: str, mask: str | None, say: Say) -> tuple[Image.Image, Image.Image]:
    """Another background and where there is a hole in it.   -> RGB, L (255 is the hole)

    mask: a picture; "black": the hole is black; None: what is transparent, nothing in an opaque picture.
    """
    picture = video.picture(path)
    if mask:
        hole = _given(mask, picture, path, say)
        hole = ImageOps.invert(hole) if mask == "black" else hole
    else:
        hole = ImageOps.invert(picture.getchannel("A")) if picture.mode == "RGBA" else Image.new("L", picture.size)
    return picture.convert("RGB"), hole


class Poses:
    """A track of pose pictures, each made when it is asked for."""

    def __init__(self, count: int, make: Callable[[int], Image.Image]):
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Image.Image:
        return self.make(i)


def poses(path: str, canvas: tuple[int, int], align_to: str | None, say: Say) -> Poses:
    """A folder of pose pictures or of JSON files, one of either, a TSV file, or a video.

    canvas: (width, height) that keypoints refer to where the file does not say. align_to: JSON of the
    reference's own pose, which the track is moved to.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path} is not there; expected a folder of pose pictures or of JSON, a JSON or a TSV file")
    if place.suffix.lower() == ".tsv":
        return _of_table(Table(place), align_to, say)
    still = place.suffix.lower() in video.PICTURES and place.suffix.lower() != ".webp"   # which may be a video
    pictures = video.files(place) if place.is_dir() else [place] if still else []
    if pictures:
        return _of_pictures(pictures, align_to, say)
    if place.is_dir():
        found = video.files(place, (".json",))
        if not found:
            raise InputError(f"{path} holds neither pictures nor JSON files; expected poses, one file a frame")
        frames = [frame for file in found for frame in pose.read(file)]
    elif place.suffix.lower() == ".json":
        frames = pose.read(place)
    elif estimate.installed():
        frames = list(estimate.poses(video.read(place)))
    else:
        next(video.read(place))                                          # what is no video is refused there
        raise InputError(f"{path}: the poses of a video have to be found first. Give the JSON files of OpenPose or "
                         f"DWPose, or have them found: {estimate.INSTALL}")
    return _of_keypoints(frames, canvas, align_to, path, say)


def _of_pictures(files: list[Path], align_to: str | None, say: Say) -> Poses:
    _refuse_alignment(align_to)
    sizes: dict = {}
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.setdefault(image.size, file)
        except (OSError, Image.DecompressionBombError):
            video.picture(file)                                          # says what is wrong with it
    if len(sizes) > 1:
        one, other = list(sizes.items())[:2]
        raise InputError(f"{files[0].parent} holds poses of different sizes: {one[1].name} is {one[0][0]}x{one[0][1]}, "
                         f"{other[1].name} {other[0][0]}x{other[0][1]}; expected one size")
    found = Poses(len(files), lambda i: video.picture(files[i]).convert("RGB"))
    _doubt_photos(found[0], str(files[0]), say)
    return found


def _of_table(table: Table, align_to: str | None, say: Say) -> Poses:
    _refuse_alignment(align_to)
    if len(table) == 0:
        raise InputError(f"{table.path} has no rows; expected one pose a row")
    found = Poses(len(table), lambda i: table.picture(i, 1))
    _doubt_photos(found[0], str(table.path), say)
    return found


def _doubt_photos(picture: Image.Image, path: str, say: Say) -> None:
    """Sticks on black leave most of a picture black."""
    black = sum(picture.convert("L").histogram()[:DARK])
    if 2 * black < picture.width * picture.height:
        say(f"{path} does not look like a pose picture, which is a skeleton of coloured sticks on black")


def _of_keypoints(frames: list[pose.Frame], canvas, align_to: str | None, path: str, say: Say) -> Poses:
    if not frames:
        raise InputError(f"{path} holds no frames")
    if align_to:
        people = [person for frame in pose.read(align_to)[:1] for person in frame.people]
        if not people:
            raise InputError(f"{align_to} has nobody in it; aligning needs the reference's own pose")
        frames = pose.align(frames, people[0])
    empty = sum(not frame.people for frame in frames)
    if empty == len(frames):
        raise InputError(f"{path}: nobody in any of its {len(frames)} frames; expected somebody who dances")
    if empty:
        say(f"{path}: nobody in {empty} of {len(frames)} frames; their pose is drawn black")
    unknown = sum(frame.size is None for frame in frames)
    if unknown:
        say(f"{path} does not say how large its frames are; taken as {canvas[0]}x{canvas[1]} (--pose-size WxH)")

    small = min(min(frame.size or canvas) for frame in frames)
    if small < SMALL:
        say(f"{path} is of frames of {small} pixels; sticks are 8 pixels wide whatever the size, so scale it up")

    def make(i: int) -> Image.Image:
        return Image.fromarray(pose.draw(frames[i].people, frames[i].size or canvas))
    return Poses(len(frames), make)


def _refuse_alignment(align_to: str | None) -> None:
    if align_to:
        raise InputError("--align needs keypoints; give the poses as JSON instead of pictures")
