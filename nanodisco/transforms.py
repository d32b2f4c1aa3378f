"""Transforms: pictures to what the networks see, exactly as the official evaluation prepares them.

    target, background   centre crop, bilinear to W x H, [-1, 1]; the background times (1 - mask)
    pose                 the same in [0, 1]
    reference            centre square, bicubic to CLIP's size, CLIP's mean and std; then times mask

Masks are 0..1 and applied after normalising: what is removed is mid-grey for the VAE and CLIP's mean
colour for CLIP, not black. Sizes are (width, height), as Pillow has them.
"""
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Size = tuple[int, int]


def centre(size: Size, wanted: Size) -> tuple[int, int, int, int]:
    """The largest box of the wanted aspect in the middle.   -> left, top, right, bottom"""
    width, height = size
    if width * wanted[1] > height * wanted[0]:
        width = max(round(height * wanted[0] / wanted[1]), 1)
    else:
        height = max(round(width * wanted[1] / wanted[0]), 1)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def fill(picture: Image.Image, size: Size, method=Image.Resampling.BILINEAR) -> Image.Image:
    """Centre crop to the aspect of `size`, then resize. No bars, no stretching."""
    return picture.crop(centre(picture.size, size)).resize(size, method)


def frame(picture: Image.Image, size: Size) -> np.ndarray:
    """Cropped and resized by `fill`.   -> uint8 (H, W, 3)"""
    return np.array(fill(picture.convert("RGB"), size))


def from_frames(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (..., H, W, 3) -> (..., 3, H, W) in [0, 1] on the device"""
    return torch.from_numpy(frames).to(device).movedim(-1, -3).float() / 255


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB -> (3, H, W) in [0, 1]"""
    return from_frames(np.array(picture.convert("RGB")))


def target(picture: Image.Image, size: Size) -> Tensor:
    """(3, H, W) in [-1, 1]"""
    return (to_tensor(fill(picture.convert("RGB"), size)) - 0.5) / 0.5


def pose(picture: Image.Image, size: Size) -> Tensor:
    """(3, H, W) in [0, 1]"""
    return from_frames(frame(picture, size))


def reference(picture: Image.Image, mask: Image.Image, size: int, binary: bool = False, crop: bool = False) -> Tensor:
    """The person for CLIP.   (3, S, S), zero outside of the mask

    official: bicubic without antialiasing on floats, so a large photo is sampled at points.
    crop: the square around the person's box, from beyond the picture's edge if need be, not the picture's middle.
    """
    if crop:
        picture, mask = around(picture, mask)
    left, top, right, bottom = centre(picture.size, (1, 1))
    square = to_tensor(picture)[:, top:bottom, left:right]
    square = interpolate(square[None], size=(size, size), mode="bicubic", align_corners=False)[0]
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (square - mean) / std * mask_tensor(mask, picture.size, (size, size), Image.Resampling.BICUBIC, binary)


def around(picture: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Both cut to the square around what the mask shows, a twelfth wider each way."""
    mask = mask.convert("L").resize(picture.size)
    left, top, right, bottom = mask.point(lambda grey: 255 if grey >= 128 else 0).getbbox() or (0, 0, *picture.size)
    half = round(max(right - left, bottom - top) * 7 / 12)
    x, y = (left + right) // 2, (top + bottom) // 2
    box = (x - half, y - half, x + half, y + half)
    return picture.crop(box), mask.crop(box)


def from_clip(reference: Tensor) -> Tensor:
    """Back to colours.   CLIP-normalised (B, 3, S, S) -> [0, 1]"""
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return reference * std + mean


def background(picture: Image.Image, mask: Image.Image, size: Size, binary: bool = False) -> Tensor:
    """What is left without the person.   (3, H, W) in [-1, 1], zero inside of the mask"""
    return target(picture, size) * (1 - mask_tensor(mask, picture.size, size, Image.Resampling.BILINEAR, binary))


def mask_tensor(mask: Image.Image, of: Size, size: Size, method, binary: bool = False) -> Tensor:
    """A mask of a picture of size `of`, prepared like it.   (3, H, W) in [0, 1]

    official: three channels, not binarised (JPEG masks are soft and speckled); `binary`: as its
    picture-editing demo and its human-specific loader, everything not quite zero becomes one.
    """
    mask = mask.convert("RGB")
    if mask.size != of:
        mask = mask.resize(of, Image.Resampling.BICUBIC)
    tensor = to_tensor(fill(mask, size, method))
    return (tensor >= 0.001).float() if binary else tensor


def not_black(picture: Image.Image) -> Image.Image:
    """The mask in a picture whose person was cut out on black: where any light is left.   L, 0 or 255"""
    return picture.convert("L").point(lambda grey: 255 if grey > 0 else 0)


def to_frames(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> uint8 (B, H, W, 3), rounded"""
    return (pictures.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
