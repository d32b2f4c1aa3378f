"""Video: frames to and from mp4, gif, webp and folders. A frame is a uint8 array (H, W, 3), RGB.

Everything streams, one frame at a time, and every file appears whole or not at all.
"""
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from nanodisco.errors import InputError
from nanodisco.files import appearing, natural, replacing

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Frame = np.ndarray


def picture(path: str | Path) -> Image.Image:
    """One picture, upright, as RGB, or RGBA where it has transparency. InputError if it is none."""
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; expected a picture")
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):                          # Pillow would clip 16 bits at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except FileNotFoundError:
        raise InputError(f"{path} is not there; expected a picture") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; expected a picture") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture, whatever its name says; expected PNG, JPEG or WebP") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path} has too many pixels; make it smaller first") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} is damaged or cannot be read ({error})") from None


def save(path: str | Path, frame: Frame) -> None:
    """One picture file; an existing one is replaced."""
    with replacing(path) as place:
        Image.fromarray(frame).save(place, format="PNG")


def files(folder: str | Path, suffixes: tuple[str, ...] = PICTURES) -> list[Path]:
    """The files of a folder with these suffixes, in natural order; hidden ones are left out."""
    try:
        found = [path for path in Path(folder).iterdir()
                 if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    return sorted(found, key=lambda path: natural(path.name))


def read(path: str | Path) -> Iterator[Frame]:
    """The frames of a video file, an animated picture or a folder of pictures, one by one."""
    path = Path(path)
    if path.is_dir():
        for file in files(path):
            yield np.array(picture(file).convert("RGB"))
    elif path.suffix.lower() in (".gif", ".webp", ".png"):
        picture(path)                                                    # whatever is wrong with it is said there
        try:
            with Image.open(path) as animation:
                yield from (np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation))
        except (OSError, ValueError, SyntaxError) as error:              # of a later frame
            raise InputError(f"{path} is damaged or cannot be read ({error})") from None
    else:
        yield from _decode(path)


def _decode(path: Path) -> Iterator[Frame]:
    import av

    shown = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no pictures in it; expected a video")
            for frame in container.decode(video=0):
                turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield np.ascontiguousarray(turned)                       # phones store a turned picture and say so
                shown += 1
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read as a video ({error.strerror or error})") from None
    if not shown:
        raise InputError(f"{path} has no frames in it")


@contextmanager
def writer(path: str | Path, fps: float = 8.0) -> Iterator[Callable[[Frame], None]]:
    """A function that takes one frame after another for .mp4, .gif or .webp, or, without suffix, a folder
    of 000000.png, 000001.png, … All frames of a video have one size.

        with writer("dance.mp4", fps=8) as write:
            write(frame)
    """
    path = Path(path)
    make = {".mp4": _mp4, ".gif": _animated, ".webp": _animated, "": _folder}[path.suffix.lower()]
    with appearing(path) as place:
        with make(place, fps) as write:
            yield write
        if not place.exists():
            raise InputError(f"{path}: there was no frame to write")


@contextmanager
def _mp4(path: Path, fps: float) -> Iterator[Callable[[Frame], None]]:
    """H.264 in yuv420p, which every browser plays; colours as ITU-R BT.601, said in the file."""
    import av
    from fractions import Fraction

    from av.video.reformatter import ColorRange, Colorspace

    container, stream = None, None

    def write(frame: Frame) -> None:
        nonlocal container, stream
        frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")   # to even
        if container is None:
            container = av.open(str(path), "w", options={"movflags": "+faststart"})
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001),
                                          options={"crf": "16", "preset": "medium"})
            stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
            context = stream.codec_context
            context.colorspace, context.color_range = Colorspace.ITU601, ColorRange.MPEG
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG)
        container.mux(stream.encode(picture))

    try:
        try:
            yield write
            if container is not None:
                container.mux(stream.encode(None))
        finally:
            if container is not None:
                container.close()                                        # writes the index; a full disk fails here too
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from None


@contextmanager
def _animated(path: Path, fps: float) -> Iterator[Callable[[Frame], None]]:
    """GIF or WebP by Pillow, looping. Held in memory until the end: they are for short clips."""
    if fps > 100:
        raise InputError(f"{path.name}: {fps:g} frames a second; GIF and WebP can have 100, or make an mp4")
    frames: list[Image.Image] = []

    def write(frame: Frame) -> None:
        image = Image.fromarray(frame)
        frames.append(image.quantize(255, kmeans=1) if path.suffix.lower() == ".gif" else image)

    yield write
    if frames:
        starts = [round(1000 * i / fps / 10) * 10 for i in range(len(frames) + 1)]      # GIF counts in 10 ms
        durations = [end - start for start, end in zip(starts, starts[1:])]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=90)


@contextmanager
def _folder(path: Path, fps: float) -> Iterator[Callable[[Frame], None]]:
    count = 0

    def write(frame: Frame) -> None:
        nonlocal count
        path.mkdir(exist_ok=True)
        Image.fromarray(frame).save(path / f"{count:06}.png")
        count += 1

    yield write


def side_by_side(*frames: Frame) -> Frame:
    """In one row, all brought to the height of the last one."""
    height = frames[-1].shape[0]
    scaled = [frame if frame.shape[0] == height else np.asarray(Image.fromarray(frame).resize(
        (max(round(frame.shape[1] * height / frame.shape[0]), 1), height), Image.Resampling.BICUBIC))
        for frame in frames]
    return np.concatenate(scaled, axis=1)


def enlarged(frame: Frame, height: int) -> Frame:
    """A small frame as many times as large as stays within `height`; others as they are."""
    times = max(height // frame.shape[0], 1)
    if times == 1:
        return frame
    picture = Image.fromarray(frame)
    return np.asarray(picture.resize((times * picture.width, times * picture.height), Image.Resampling.BICUBIC))


def contact_sheet(frames: Iterable[Frame], columns: int | None = None, gap: int = 4) -> Frame:
    """All frames, of one size, on one white page, row by row."""
    frames = list(frames)
    columns = columns or int(np.ceil(len(frames) ** 0.5))
    height, width = frames[0].shape[:2]
    rows = -(-len(frames) // columns)
    page = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        page[top:top + height, left:left + width] = frame
    return page
