"""Photographs in, batches of L*a*b* out: colour, split, crops and ageing; then reading and files.

    python -c "from data import Photos; print(Photos('demo', size=64).images.shape)"

Colour follows CIE 15 with the sRGB primaries and transfer curve of IEC 61966-2-1 and the D65 white
point of the 2 degree observer, in the constants of scikit-image, so that both agree.
"""
import argparse
import hashlib
import io
import os
import signal
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE, COLORMAP, EXTRASAMPLES, PHOTOMETRIC_INTERPRETATION as PHOTOMETRIC,
    PLANAR_CONFIGURATION, SAMPLEFORMAT)
from torch.nn import functional as F

L_CENTER = 50.0  # networks see L / 50 - 1
AB_RANGE = 110.0  # and ab / 110
XYZ_FROM_RGB = torch.tensor([
    [0.412453, 0.357580, 0.180423],
    [0.212671, 0.715160, 0.072169],
    [0.019334, 0.119193, 0.950227],
], dtype=torch.float64)
RGB_FROM_XYZ = XYZ_FROM_RGB.inverse()
WHITE = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)  # D65, 2 degree observer
CACHE = Path("cache")  # of decoded images
DEFAULT_DATA = "data"  # where Flowers102 is downloaded to

# The formats in which people have photographs; JPEG's reader opens MPO, too.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
BICUBIC = Image.Resampling.BICUBIC
EXIF_PREFIX = b"Exif\0\0"


class UsageError(Exception):
    """A mistake that the user can mend: one line that names the flag or file, and the remedy."""


# --- Colour --------------------------------------------------------------------------------------

def _multiply(matrix, image):
    """The 3 x 3 matrix times every pixel of image (N, 3, H, W)."""
    return (matrix.to(image) @ image.flatten(2)).view_as(image)


def rgb_to_lab(rgb):
    """Convert sRGB to CIE L*a*b* (D65).

    rgb: (N, 3, H, W) float in [0, 1], gamma-encoded. Returns (N, 3, H, W): L in [0, 100], a in
    [-87, 99], b in [-108, 95].
    """
    # The transfer curve of sRGB, undone.
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    # X, Y and Z as shares of the white point's: each row of the matrix is divided by its own.
    xyz = _multiply(XYZ_FROM_RGB / WHITE[:, None], linear)
    f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    fx, fy, fz = f.unbind(1)
    L = 116 * fy - 16
    a = 500 * (fx - fy)
    b = 200 * (fy - fz)
    return torch.stack([L, a, b], 1)


def lab_to_rgb(lab, keep_lightness=False):
    """Convert CIE L*a*b* (D65) to sRGB; the inverse of rgb_to_lab.

    lab: (N, 3, H, W) float, L in [0, 100]. Returns (N, 3, H, W) in [0, 1]. Many Lab colours have no
    RGB in [0, 1]. They are clipped, as scikit-image does, which changes their lightness; with
    keep_lightness they are made paler instead, until they fit.
    """
    L, a, b = lab.unbind(1)
    fy = (L + 16) / 116
    fx = fy + a / 500
    fz = (fy - b / 200).clamp_min(0)  # so that Z >= 0, as in scikit-image
    f = torch.stack([fx, fy, fz], 1)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    linear = _multiply(RGB_FROM_XYZ * WHITE, xyz)
    if keep_lightness:
        # On the line from a colour to the grey of the same luminance, in linear light, lightness
        # does not change. Walk from the grey towards the colour for as long as all channels fit.
        grey = xyz[:, 1:2].clamp(0, 1)  # Y is the luminance
        offset = linear - grey
        room_above = (1 - grey) / offset.amax(1, keepdim=True).clamp_min(1e-8)
        room_below = grey / (-offset).amax(1, keepdim=True).clamp_min(1e-8)
        linear = grey + offset * torch.minimum(room_above, room_below).clamp_max(1)
    # The transfer curve of sRGB.
    rgb = torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)


def normalize(lab):
    """Split lab (N, 3, H, W) into what networks see: L (N, 1, H, W) and ab (N, 2, H, W)."""
    return lab[:, :1] / L_CENTER - 1, lab[:, 1:] / AB_RANGE


def denormalize(L, ab):
    """Join L (N, 1, H, W) and ab (N, 2, H, W), both in [-1, 1], to lab (N, 3, H, W)."""
    return torch.cat([(L + 1) * L_CENTER, ab * AB_RANGE], 1)


def has_colour(rgb):
    """Whether pictures are more than black and white. Returns (N,) bool.

    rgb: (N, 3, H, W) float in [0, 1]. A toned print (sepia) has colours, too, but one for each
    lightness. So what counts is how far ab is, at each lightness, from its mean there: more than 4
    (root mean square) is a colour photograph. Of 1,638 flowers 11 count as toned; of 500 toned
    pictures (JPEG) one as coloured.
    """
    pixels = rgb_to_lab(rgb).flatten(2)  # (N, 3, H * W)
    L, ab = pixels.split([1, 2], 1)
    level = (L / 4).long().expand_as(ab)  # 26 levels of lightness, 0 to 25
    mean = torch.zeros(len(rgb), 2, 26)
    mean = mean.scatter_reduce(2, level, ab, "mean", include_self=False)
    distance = ab - mean.gather(2, level)  # from the mean of the pixel's own level
    return distance.square().sum(1).mean(1).sqrt() > 4


# --- Split; augmentation: crops and ageing -------------------------------------------------------

class Photos:
    """The photographs of --data, split 70 / 15 / 15, always in the same way.

    images: (N, S, S, 3) uint8 tensor, S = 1.5 * size, so that a random crop is never enlarged;
        memory-mapped, or on a CUDA device where they take less than a quarter of its free memory.
    train, val, test: int64 tensors of rows of images.
    contents: a digest of all the pixels, by which --resume knows the photographs again.
    test_means: the mean level of each test image, by which a checkpoint knows its test part again,
        also after another decoder or at another size.
    """

    def __init__(self, data, size, device="cpu"):
        """Raises UsageError for too few images, or too many identical ones."""
        self.size = size
        self.device = torch.device(device)
        stored = size * 3 // 2
        if data == "demo":
            names, images = demo(stored)
        else:
            names, images = decode_folder(Path(data), stored)
        # Identical images have equal digests, by which split keeps them together.
        good = usable(data, names, images)
        digests = {row: hashlib.sha256(images[row]).digest() for row in good}
        parts = split(good, digests)
        if not all(parts):
            raise UsageError(f"--data {data}: too many identical images to split them in three")
        self.train, self.val, self.test = map(torch.tensor, parts)
        self.contents = _digest(list(digests.values()))
        self.test_means = images[parts[2]].mean((1, 2, 3)).round(1).tolist()
        # A GPU with room for them is spared the way there in every step.
        self.images = torch.from_numpy(images)
        if self.device.type == "cuda":
            free_memory, _ = torch.cuda.mem_get_info(self.device)
            if self.images.nbytes < free_memory // 4:
                self.images = self.images.to(self.device)

    def batch(self, rows, crop=False, aged=0.0):
        """The images of these rows as networks see them, on the device.

        crop: a random part of each, for training; otherwise the whole. aged: the share of images
        whose L is random_grey's; half that share of crops, drawn independently, lies on paper.
        Returns L (N, 1, size, size) and ab (N, 2, size, size).
        """
        images = self.images[rows.to(self.images.device)].to(self.device)
        images = images.permute(0, 3, 1, 2) / 255
        if crop:
            rgb = random_crops(images, self.size, paper=aged / 2)
        else:
            rgb = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        lab = rgb_to_lab(rgb.clamp_max(1))
        if aged:
            # From rgb as it was before clamping: paper is whiter than 1, and fades to white.
            grey = rgb_to_lab(random_grey(rgb).expand_as(rgb))
            chosen = torch.rand(len(rgb), 1, 1, device=self.device) < aged
            lab[:, 0] = torch.where(chosen, grey[:, 0], lab[:, 0])
        return normalize(lab)


def usable(data, names, images):
    """Rows of the images to train on; says what is left out. UsageError for fewer than ten."""
    good = [row for row, image in enumerate(images) if image.any()]
    if len(good) < len(names):
        # What is broken was left black by decode.
        bad = [name for name, image in zip(names, images) if not image.any()]
        say(f"{len(bad)} of {len(names)} images left out, broken or all black (delete {CACHE}/ to "
            f"try again): {', '.join(map(str, bad))}")
    if len(good) < 10:
        raise UsageError(f"--data {data}: {len(good)} readable images, at least 10 are needed; an "
                         f"archive is to be unpacked; links to folders are not entered; a missing "
                         f"'{DEFAULT_DATA}' is downloaded")

    # A few thousand pixels of each are enough to tell grey.
    stride = max(1, images.shape[1] // 48)
    small = torch.from_numpy(images[good, ::stride, ::stride]).permute(0, 3, 1, 2)
    coloured = torch.cat([has_colour(part / 255) for part in small.split(256)])
    grey = len(good) - int(coloured.sum())
    if grey > len(good) / 10:
        say(f"warning: {grey} of {len(good)} images are black and white: they teach grey")
    return good


def split(rows, digests):
    """Split rows at random, 70 / 15 / 15, into three lists: train, val and test.

    The same files are split the same for ever, so that no run is tested on what another was trained
    on: the stream of RandomState is frozen by NumPy's policy. digests: of each row, equal for
    identical images, which all go where the first of them went.
    """
    order = np.random.RandomState(0).permutation(rows)
    ends = [round(0.70 * len(rows)), round(0.85 * len(rows))]
    parts = [], [], []
    part_of = {}
    for part, drawn in zip(parts, np.split(order, ends)):
        for row in drawn.tolist():
            part_of.setdefault(digests[row], part).append(row)
    return parts


def random_crops(rgb, size, paper=0.0):
    """Scale a random part of each image, mirrored with probability 1/2, to size x size.

    rgb: (N, 3, H, W) in [0, 1]; returns (N, 3, size, size). A part's sides are 2/3 to 1 of the
    image's, 10 % longer or shorter than each other at the most; area and place are uniform.
    paper: the share of images that lie on paper instead: the whole image with a margin around it,
    together 1 to 1.35 of its sides. The margin is grey, 0 to 1.5: paper stays white where the
    print on it has faded, and random_grey fades both alike.

    A crop and a margin are the same affine map of coordinates, one with a factor below 1, the other
    above (Jaderberg et al. 2015, eq. 1); so grid_sample does all images at once, without a loop.
    """
    def uniform(low, high):
        return torch.empty(len(rgb), device=rgb.device).uniform_(low, high)

    # The shortest and the longest side, as shares of the image's.
    on_paper = uniform(0, 1) < paper
    low = torch.where(on_paper, 1, 2 / 3)
    high = torch.where(on_paper, 1.35, 1)
    # The root makes the area uniform, and not the side.
    side = torch.lerp(low**2, high**2, uniform(0, 1)).sqrt()
    ratio = uniform(0.9, 1.1).sqrt()
    width = (side * ratio).clamp(low, high)
    height = (side / ratio).clamp(low, high)
    # The image reaches from -1 to 1. Where the part is smaller, it stays inside the image; where it
    # is larger, the image stays inside the part: the same formula for its centre.
    x = uniform(-1, 1) * (1 - width)
    y = uniform(-1, 1) * (1 - height)
    # Half of the maps run x from right to left.
    mirror = 1 - 2 * torch.randint(2, x.shape, device=rgb.device)

    # Each map is two rows: where to read x, and where to read y.
    zero = torch.zeros_like(x)
    maps = torch.stack([
        width * mirror, zero, x,
        zero, height, y,
    ], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, (len(rgb), 3, size, size), align_corners=False)
    # Outside the image grid_sample sees 0. So the paper's grey is subtracted before, to be that 0,
    # and added again after.
    margin = (on_paper * uniform(0, 1.5))[:, None, None, None]
    return F.grid_sample(rgb - margin, grid, align_corners=False) + margin


def random_grey(rgb):
    """Grey pictures as film, prints and scans make them of colours, each in a way of its own.

    rgb: (N, 3, H, W), about 0 to 1, paper to 1.5. Returns (N, 1, H, W) in [0, 1]; gamma-encoded.
    What emulsions see: Mees and James 1966, The Theory of the Photographic Process; how prints
    fade: Reilly 1986, Care and Identification of 19th-Century Photographic Prints. The ranges are
    our choice.
    """
    def uniform(low, high, channels=1):
        return torch.empty(len(rgb), channels, 1, 1, device=rgb.device).uniform_(low, high)

    # Film weighs colours in its own way: early film sees no red, and a filter blocks any colour.
    luma = torch.tensor([0.299, 0.587, 0.114], device=rgb.device).view(3, 1, 1)
    weights = luma * uniform(0, 2, channels=3)
    grey = (rgb * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    # Development and the grade of the paper set the contrast.
    grey = grey.clamp_min(0) ** uniform(-0.4, 0.4).exp()
    # The camera's lens and the enlarger's are soft.
    soft = F.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)
    grey = torch.lerp(grey, soft, uniform(0, 1))
    # Prints fade: black becomes -0.1 to 0.25, and white 0.75 to 1.1.
    grey = torch.lerp(uniform(-0.1, 0.25), uniform(0.75, 1.1), grey)
    # Film has grain.
    return (grey + uniform(0, 0.03) * torch.randn_like(grey)).clamp(0, 1)


# --- Reading any picture -------------------------------------------------------------------------

class Picture(NamedTuple):
    """A picture as read: upright, in sRGB, 8 bits."""
    image: Image.Image  # mode L, or RGB where it had channels for colour; white where it is hidden
    alpha: Image.Image | None  # mode L
    metadata: dict  # EXIF and dpi (not the 1 that Pillow gives a TIFF without), for Image.save


def is_picture(path):
    """Whether a file's suffix is that of a format that is read."""
    format = Image.registered_extensions().get(Path(path).suffix.lower())
    return format == "MPO" or format in FORMATS


def read_picture(path):
    """Read a picture of one of FORMATS; of several pages or frames the first.

    Returns a Picture. Raises ValueError for a picture that Pillow would misread without a word, and
    whatever Pillow raises for another format or a broken file: that can be anything.
    """
    # Opened here: given a path, Pillow maps some TIFFs into memory by their size after turning.
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        refuse_misread(image)
        image.load()
        exif = upright(image)

    # More EXIF than a segment of JPEG holds cannot be written.
    metadata = {}
    if 0 < len(exif) <= 65_533:
        metadata["exif"] = exif
    # One dot an inch is Pillow's word for a TIFF without a resolution.
    dpi = image.info.get("dpi", (1, 1))
    if dpi != (1, 1):
        metadata["dpi"] = dpi
    profile = image.info.get("icc_profile")

    image = unpack(image)

    # Alpha that hides nothing, or everything, is none: the picture is what there is to see.
    alpha = None
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() in [(0, 0), (255, 255)]:
            alpha = None

    # To RGB or grey, but CMYK only by its profile, if it has one; then to sRGB; and again, since
    # CMYK may have none, and a profile of grey makes RGB.
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.mode not in (mode, "CMYK"):
        image = image.convert(mode)
    image = to_srgb(image, profile).convert(mode)
    if alpha:
        hidden = alpha.point([255] + 255 * [0])
        image.paste("white", mask=hidden)
    return Picture(image, alpha, metadata)


def unpack(image):
    """An image of a mode that Image.convert knows how to convert."""
    # 16 bits, which it would saturate at 255.
    if image.mode.startswith("I"):
        levels = np.rint(np.asarray(image) * np.float32(255 / 65535))
        return Image.fromarray(levels.astype(np.uint8))
    # Grey that was multiplied by its alpha.
    if image.mode == "La":
        return image.convert("LA")
    return image


def refuse_misread(image):
    """Raise ValueError for an opened picture whose values Pillow would get wrong."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    bits = tags.get(BITSPERSAMPLE, (8,))
    deep = max(bits) > 8
    planar = tags.get(PLANAR_CONFIGURATION) == 2
    colour_map = tags.get(COLORMAP, (65535,))
    # Pillow scales the levels of a PNG to 8 bits, but not the one that is to be transparent.
    raw_mode = None
    if image.format == "PNG" and image.mode != "P" and "transparency" in image.info:
        *_, raw_mode = image.tile[0]
    reasons = [
        # By the new tag and by the old, for which Pillow has no names.
        ("its first page is a preview", tags.get(254, 0) & 1 or tags.get(255) == 2),
        ("floating point", image.mode == "F"),
        # 16 bits of PPM also come as "I".
        ("32 bits a channel", image.mode == "I" and image.format != "PPM"),
        ("signed values", set(tags.get(SAMPLEFORMAT, (1,))) != {1}),
        ("neither 8 nor 16 bits a channel", deep and bits[0] != 16),
        ("16 bits, of which 0 is white", deep and tags.get(PHOTOMETRIC) == 0),
        ("16 bits in planes", deep and planar and image.info["compression"] == "raw"),
        ("a palette of 8 bits", max(colour_map) < 256),
        ("grey with alpha in planes", planar and image.mode in ("LA", "La")),
        ("four planes, one unnamed", planar and image.mode == "RGBA" and EXTRASAMPLES not in tags),
        ("a transparent level, not of 8 bits", raw_mode not in (None, "1", "L", "RGB")),
        ("no word of whether 0 is black", tags and PHOTOMETRIC not in tags),
    ]
    for reason, found in reasons:
        if found:
            raise ValueError(f"{reason}: convert it to JPEG, or to PNG of 8 bits a channel")


def upright(image):
    """Turn a picture, in place, as its EXIF, or else its XMP, asks. Returns the EXIF, b"" for none.

    EXIF that cannot be read is left out. A TIFF comes turned from Pillow, and without EXIF.
    """
    # Taken out of the picture, since Pillow would write it anew.
    exif = image.info.pop("exif", b"")
    try:
        if exif:
            orientation, exif = take_orientation(exif)
            image.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(image, in_place=True)
    except (struct.error, SyntaxError, ValueError):
        exif = b""
    return exif


def take_orientation(exif):
    """Read the orientation of EXIF, and set it to 1 there; every other byte stays as it came.

    exif: bytes of a TIFF header and its directories (TIFF 6.0, section 2), with or without JPEG's
    prefix. Returns the orientation, 1 where there is none, and the bytes with the prefix. Raises
    struct.error for bytes that are no EXIF.
    """
    # Some writers put the prefix twice.
    exif = bytearray(exif.removeprefix(EXIF_PREFIX).removeprefix(EXIF_PREFIX))
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        raise struct.error("no TIFF header")
    order = "<" if exif.startswith(b"II") else ">"  # of bytes, Intel's or Motorola's
    (directory,) = struct.unpack_from(f"{order}I", exif, 4)

    orientation = 1
    (count,) = struct.unpack_from(f"{order}H", exif, directory)
    for i in range(count):
        entry = directory + 2 + 12 * i
        tag, kind, values = struct.unpack_from(f"{order}HHI", exif, entry)
        if tag == ExifTags.Base.Orientation and kind in (3, 4) and values == 1:
            number = order + {3: "H", 4: "I"}[kind]  # 16 or 32 bits
            (orientation,) = struct.unpack_from(number, exif, entry + 8)
            struct.pack_into(number, exif, entry + 8, 1)
    return orientation, EXIF_PREFIX + exif


def to_srgb(image, profile):
    """The image in sRGB; as it is, if it has no ICC profile, or one damaged or of another mode."""
    if not profile:
        return image
    srgb = ImageCms.createProfile("sRGB")
    try:
        return ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    except ImageCms.PyCMSError:
        return image


# --- Files ---------------------------------------------------------------------------------------

@contextmanager
def replacing(path, tag=""):
    """Write path whole or not at all: yield a temporary path beside it, and rename it at the end.

    tag: the process id, where several processes may write the same file. A full disk and the like
    become an OSError that names path, and the temporary file is removed.
    """
    # A digest, since a name that is as long as may be cannot grow.
    part = path.with_name(f".{_digest(path.name)}{tag}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # RuntimeError is how torch.save reports a full disk.
        hint = " (is there room?)" if isinstance(error, RuntimeError) else ""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"cannot write {path}{hint}: {reason}") from error
    finally:
        if os.path.exists(part):
            part.unlink()


class PythonFile(io.BufferedWriter):
    """A file that Pillow has to write through Python, which notices a full disk.

    Where a file has a number, Pillow's encoders write by that, and ignore what was not written.
    """

    def fileno(self):
        raise io.UnsupportedOperation


@contextmanager
def in_threads(function, items, threads, **options):
    """Yield an iterator of function(item) for each item, in order, computed ahead in threads.

    At the end, by Ctrl-C too, what has not begun is cancelled, and what is under way waited for.
    """
    pool = ThreadPoolExecutor(threads, **options)
    try:
        yield pool.map(function, items)
    except KeyboardInterrupt:
        # Python crashes where it ends while they work, so a second Ctrl-C waits for them, too.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _digest(values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def find_images(folder, unreadable):
    """Pictures below folder, by suffix. Links to folders are not entered, hidden files ignored.

    unreadable: is called with the OSError of each folder that cannot be read. Returns relative
    paths, sorted, and of everything else what it is: its suffix, or "linked folders".
    """
    names, others = [], []
    for top, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others += ["linked folders" for name in folders if os.path.islink(Path(top, name))]
        for name in files:
            if name.startswith("."):
                continue
            path = Path(top, name)
            if is_picture(path) and path.is_file():
                names.append(path.relative_to(folder))
            else:
                others.append(path.suffix or "without suffix")
    return sorted(names, key=Path.as_posix), others


def decode(folder, size, name):
    """A picture squashed to (size, size, 3) uint8 RGB, bicubic, antialiased; black if broken."""
    try:
        image = read_picture(folder / name).image.convert("RGB")
        return np.asarray(image.resize((size, size), BICUBIC))
    except Exception:  # a broken file can raise anything; usable names it
        return np.zeros((size, size, 3), np.uint8)


def download(folder):
    """Download Flowers102 into folder; a download cut short stays in folder.part."""
    from torchvision.datasets import Flowers102  # here: sample.py need not wait for it
    part = Path(f"{folder}.part")
    say(f"'{folder}' does not exist: downloading Oxford Flowers 102 (345 MB) into it")
    try:
        Flowers102(part, download=True)
        part.rename(folder)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--data {folder}: cannot download {Flowers102._download_url_prefix}102flowers.tgz "
            f"({error}): unpack that archive in '{folder}' by hand, name a folder of images, or "
            "use --data demo, which needs no network") from error


def refuse_folder(error):
    """A folder that cannot be read ends a training: without it the split would be another."""
    raise UsageError(f"--data: {error.filename}: {error.strerror}")


def decode_folder(folder, size):
    """All images below folder, decoded once and cached; again if a file's size or time changes.

    Returns names and images (N, size, size, 3) uint8, memory-mapped. The row of a file that could
    not be decoded is black.
    """
    if folder == Path(DEFAULT_DATA) and not folder.exists():
        download(folder)
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no folder of images")
    names, _ = find_images(folder, refuse_folder)
    if not names:
        return [], []
    files = []
    for name in names:
        stat = os.stat(folder / name)
        files.append((str(name), stat.st_size, stat.st_mtime_ns))
    # The cache is named by all that its content follows from.
    cached = CACHE / f"{_digest((str(folder.resolve()), files))}-{size}.raw"
    # A file of another size was cut off.
    if not cached.exists() or cached.stat().st_size != len(names) * 3 * size**2:
        work = partial(decode, folder, size)
        with (replacing(cached, os.getpid()) as part, open(part, "wb") as file,
              in_threads(work, names, os.cpu_count()) as images):
            for done, image in enumerate(images, 1):
                file.write(image)
                live(f"decoding {done}/{len(names)} images")
        say(f"{len(names)} images decoded into {cached}")
    # "c", copy on write: torch wants writable memory, and the file must stay as it is.
    images = np.memmap(cached, np.uint8, "c").reshape(-1, size, size, 3)
    return names, images


def demo(size):
    """Crops of 192 px, 32 apart, of scikit-image's photographs: no download, no generalization.

    Returns names and images (N, size, size, 3) uint8, as decode_folder does.
    """
    from skimage import data as photos  # here: sample.py need not wait for it
    pictures = {name: getattr(photos, name)() for name in ("astronaut", "coffee", "chelsea")}
    pictures["motorcycle"], *_ = photos.stereo_motorcycle()  # the left one of two
    names, images = [], []
    for name, picture in pictures.items():
        height, width, _ = picture.shape
        for y in range(0, height - 191, 32):
            for x in range(0, width - 191, 32):
                crop = Image.fromarray(picture[y : y + 192, x : x + 192])
                crop = crop.resize((size, size), BICUBIC)
                images.append(np.asarray(crop))
                names.append(f"{name}-{y}-{x}")
    return names, np.stack(images)


# --- Command line --------------------------------------------------------------------------------

def say(text, file=None):
    """Print a line, in place of the live one; what could steer a terminal is escaped."""
    live("")
    # A file's name may hold what recolours or erases the screen.
    shown = [char if char.isprintable() else repr(char)[1:-1] for char in str(text)]
    print("".join(shown), file=file, flush=True)


def live(text):
    """Redraw one line of progress, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Options with their defaults in --help, and errors of one line."""

    def __init__(self, text):
        super().__init__(description=text.partition("\n")[0],
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=10**6):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message: invalid int value
    return parse


def run_command(command, args, if_stopped):
    """Run command(args); a failure that its user can meet becomes one line on stderr.

    if_stopped: the answer to Ctrl-C. Returns the exit status: the command's, 1, 2 (usage) or 130.
    """
    # Without a console (pythonw, or 2>&-) there is nobody to tell.
    sys.stderr = sys.stderr or open(os.devnull, "w")
    # File names may hold what a terminal cannot show. (A notebook's stdout has no such method.)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command(args) or 0
    except (UsageError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        line = f"error: {error}"
        status = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        line = f"stopped; {if_stopped}"
        status = 130
    say(line, sys.stderr)
    return status
