"""Photographs in, batches of L*a*b* out: colour, split, crops and ageing; then reading and files.

    python -c "from data import Photos; print(Photos('demo', size=64).images.shape)"

Colour follows CIE 15 with the sRGB primaries and transfer curve of IEC 61966-2-1 and the D65 white
point of the 2 degree observer, in the constants of scikit-image, so that both agree.
"""
import argparse
import hashlib
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin as tiff
from torch.nn import functional as F

L_CENTER, AB_RANGE = 50.0, 110.0  # networks see L / 50 - 1 and ab / 110
XYZ_FROM_RGB = torch.tensor([
    [0.412453, 0.357580, 0.180423],
    [0.212671, 0.715160, 0.072169],
    [0.019334, 0.119193, 0.950227],
], dtype=torch.float64)
RGB_FROM_XYZ = XYZ_FROM_RGB.inverse()
WHITE = torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)  # D65, 2 degree observer
CACHE = Path("cache")
DEFAULT_DATA = "data"  # where Flowers102 is downloaded to


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
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = _multiply(XYZ_FROM_RGB / WHITE[:, None], linear)
    f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def lab_to_rgb(lab, keep_lightness=False):
    """Convert CIE L*a*b* (D65) to sRGB; the inverse of rgb_to_lab.

    lab: (N, 3, H, W) float, L in [0, 100]. Returns (N, 3, H, W) in [0, 1]. Colours outside the
    gamut are clipped in RGB, as scikit-image does, which changes their lightness; keep_lightness
    mixes them, in linear light, with the grey of their own luminance until they are inside.
    """
    L, a, b = lab.unbind(1)
    y = (L + 16) / 116
    f = torch.stack([y + a / 500, y, (y - b / 200).clamp_min(0)], 1)  # Z >= 0 as in skimage
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    linear = _multiply(RGB_FROM_XYZ * WHITE, xyz)
    if keep_lightness:
        grey = xyz[:, 1:2].clamp(0, 1)  # Y is the luminance, and the same along this line
        offset = linear - grey
        above = (1 - grey) / offset.amax(1, keepdim=True).clamp_min(1e-8)
        below = grey / (-offset).amax(1, keepdim=True).clamp_min(1e-8)
        linear = grey + offset * torch.minimum(above, below).clamp_max(1)
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

    rgb: (N, 3, H, W) float in [0, 1]. In a toned print (sepia) ab is not 0, but follows from L:
    what tells a colour photograph is that ab differs at equal lightness, here by 4 (root mean
    square). Of 1,638 flowers 11 count as toned; of 500 toned pictures (JPEG) one as coloured.
    """
    L, ab = rgb_to_lab(rgb).flatten(2).split([1, 2], 1)
    level = (L / 4).long().expand_as(ab)  # 26 levels of L
    means = torch.zeros(len(rgb), 2, 26).scatter_reduce(2, level, ab, "mean", include_self=False)
    return (ab - means.gather(2, level)).square().sum(1).mean(1).sqrt() > 4


# --- Split; augmentation: crops and ageing -------------------------------------------------------

class Photos:
    """The photographs of --data, split 70 / 15 / 15, always in the same way.

    images: (N, S, S, 3) uint8 tensor, memory-mapped, or on a CUDA device where they take less than
    a quarter of its free memory. S is 1.5 times size, so that a random crop is never enlarged.
    train, val, test: int64 tensors of rows. contents: a digest of all the pixels. test_means: the
    mean level of each test image, by which a checkpoint knows its test part again, also after
    another decoder or at another size. UsageError for too few images, or too many identical ones.
    """

    def __init__(self, data, size, device="cpu"):
        self.size, self.device, stored = size, torch.device(device), size * 3 // 2
        names, images = demo(stored) if data == "demo" else decode_folder(Path(data), stored)
        good = usable(data, names, images)
        digests = {row: hashlib.sha256(images[row]).digest() for row in good}
        parts = split(good, digests)
        if not all(parts):
            raise UsageError(f"--data {data}: too many identical images to split them in three")
        self.train, self.val, self.test = map(torch.tensor, parts)
        self.contents = _digest(list(digests.values()))
        self.test_means = [round(float(images[row].mean()), 1) for row in parts[2]]
        self.images = torch.from_numpy(images)
        if (self.device.type == "cuda"
                and self.images.nbytes < torch.cuda.mem_get_info(self.device)[0] // 4):
            self.images = self.images.to(self.device)

    def batch(self, rows, crop=False, aged=0.0):
        """The images of these rows as networks see them, on the device.

        crop: a random part of each, for training; otherwise the whole. aged: the share of images
        whose L is random_grey's; half that share of crops, drawn independently, lies on paper.
        Returns L (N, 1, size, size) and ab (N, 2, size, size).
        """
        images = self.images[rows.to(self.images.device)].permute(0, 3, 1, 2)
        if crop:
            rgb = random_crops(images.to(self.device) / 255, self.size, paper=aged / 2)
        else:  # where the images are: MPS had no antialiased bicubic before torch 2.8
            rgb = F.interpolate(images / 255, (self.size, self.size), mode="bicubic",
                                antialias=True).clamp(0, 1).to(self.device)
        lab = rgb_to_lab(rgb.clamp_max(1))  # paper is whiter, for random_grey to fade
        if aged:
            grey = rgb_to_lab(random_grey(rgb).expand_as(rgb))
            chosen = torch.rand(len(rgb), 1, 1, device=self.device) < aged
            lab[:, 0] = torch.where(chosen, grey[:, 0], lab[:, 0])
        return normalize(lab)


def usable(data, names, images):
    """Rows of the images to train on; tells what is left out. UsageError for fewer than ten."""
    readable = [image.any() for image in images]
    good = [row for row, right in enumerate(readable) if right]
    bad = [name for name, right in zip(names, readable) if not right]
    if bad:
        say(f"{len(bad)} of {len(names)} images left out, broken or all black (delete {CACHE}/ to "
            "try again): " + ", ".join(bad[:20]) + (" ..." if len(bad) > 20 else ""))
    if len(good) < 10:
        raise UsageError(f"--data {data}: {len(good)} readable images, at least 10 are needed; an "
                         f"archive is to be unpacked; a missing '{DEFAULT_DATA}' is downloaded")
    step = max(1, images.shape[1] // 48)
    small = torch.from_numpy(images[good, ::step, ::step]).permute(0, 3, 1, 2)
    grey = len(good) - sum(int(has_colour(part / 255).sum()) for part in small.split(256))
    if grey > len(good) / 10:
        say(f"warning: {grey} of {len(good)} images are black and white: they teach grey")
    return good


def split(rows, digests):
    """Split rows at random, 70 / 15 / 15; digests: of each row, equal for identical images.

    The same files are split the same for ever, so that no run is tested on what another was trained
    on: RandomState's stream is frozen by NumPy's policy. Identical images fall into the same part.
    """
    parts, part_of, ends = ([], [], []), {}, (round(0.7 * len(rows)), round(0.85 * len(rows)))
    for rank, i in enumerate(np.random.RandomState(0).permutation(len(rows))):
        own = sum(rank >= end for end in ends)
        part = part_of.setdefault(digests[rows[i]], own)  # that of the first of its kind
        parts[part].append(rows[i])
    return parts


def random_crops(rgb, size, paper=0.0):
    """Scale a random part of each image, mirrored with probability 1/2, to size x size.

    rgb: (N, 3, H, W) in [0, 1]; returns (N, 3, size, size). A part's sides are 2/3 to 1 of the
    image's, 10 % longer or shorter than each other at the most; area and place are uniform. paper:
    the share of images that are seen whole instead, in a frame of sides 1 to 1.35, of grey 0 to
    1.5, since paper stays white where the print on it has faded.
    One affine map an image holds all of it (Jaderberg et al. 2015, eq. 1): no loop.
    """
    def uniform(low, high):
        return torch.empty(len(rgb), device=rgb.device).uniform_(low, high)

    framed = uniform(0, 1) < paper
    low, high = torch.where(framed, 1, 2 / 3), torch.where(framed, 1.35, 1)
    side, ratio = torch.lerp(low**2, high**2, uniform(0, 1)).sqrt(), uniform(0.9, 1.1).sqrt()
    width, height = (side * ratio).clamp(low, high), (side / ratio).clamp(low, high)
    # The part's centre; the image reaches from -1 to 1, and the smaller lies inside the larger.
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    mirror = 1 - 2 * torch.randint(2, x.shape, device=rgb.device)  # -1 runs x from right to left
    zero = torch.zeros_like(x)
    maps = torch.stack([width * mirror, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, (len(rgb), 3, size, size), align_corners=False)
    margin = (framed * uniform(0, 1.5))[:, None, None, None]  # grid_sample sees 0 outside the image
    return F.grid_sample(rgb - margin, grid, align_corners=False) + margin


def random_grey(rgb):
    """Grey pictures as film, prints and scans make them of colours, each in a way of its own.

    rgb: (N, 3, H, W), about 0 to 1, paper to 1.5. Returns (N, 1, H, W) in [0, 1]; gamma-encoded.
    What emulsions see: Mees and James 1966, The Theory of the Photographic Process; how prints
    fade: Reilly 1986, Care and Identification of 19th-Century Photographic Prints. Ranges are ours.
    """
    def uniform(low, high, channels=1):
        return torch.empty(len(rgb), channels, 1, 1, device=rgb.device).uniform_(low, high)

    luma = torch.tensor([0.299, 0.587, 0.114], device=rgb.device).view(3, 1, 1)
    weights = luma * uniform(0, 2, channels=3)  # early film sees no red; filters, any emulsion
    grey = (rgb * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    grey = grey.clamp_min(0) ** uniform(-0.4, 0.4).exp()  # development, the grade of the paper
    soft = F.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)
    grey = torch.lerp(grey, soft, uniform(0, 1))  # the lens, the enlarger
    grey = torch.lerp(uniform(-0.1, 0.25), uniform(0.75, 1.1), grey)  # fading: black, white
    return (grey + uniform(0, 0.03) * torch.randn_like(grey)).clamp(0, 1)  # grain


# --- Reading any picture -------------------------------------------------------------------------

class Picture(NamedTuple):
    """A picture as read: upright, in sRGB, 8 bits."""
    image: Image.Image  # mode L, or RGB where it had channels for colour; white where it is hidden
    alpha: Image.Image | None  # mode L
    metadata: dict  # EXIF and dpi (not the 1 that Pillow gives a TIFF without), for Image.save


def is_picture(path):
    """Whether Pillow reads files of this suffix."""
    format = Image.registered_extensions().get(Path(path).suffix.lower())
    # MPO is opened by JPEG's reader; MPEG's is a stub that knows a film by its head.
    return format == "MPO" or format in Image.OPEN and format != "MPEG"


def read_picture(path):
    """Read any picture that Pillow reads right; of several pages or frames the first.

    Returns a Picture. Raises ValueError for a picture that Pillow would misread without a word, and
    whatever Pillow raises for a broken file: that can be anything.
    """
    # From an open file: given a path, Pillow maps some TIFFs by their size after turning.
    with open(path, "rb") as file, Image.open(file) as image:
        refuse_misread(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        metadata = {k: v for k, v in image.info.items() if k in ("exif", "dpi") and v != (1, 1)}
        if image.mode.startswith("I"):  # 16 bits, which Image.convert would saturate at 255
            levels = np.rint(np.asarray(image) * np.float32(255 / 65535)).astype(np.uint8)
            profile, image = image.info.get("icc_profile"), Image.fromarray(levels)
            image.info["icc_profile"] = profile
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        converted = lambda image: image if image.mode == mode else image.convert(mode)
        # CMYK as it is, for its profile; and again, since profiles make RGB of grey.
        image = converted(to_srgb(image if image.mode == "CMYK" else converted(image)))
    if alpha:
        image.paste("white", mask=alpha.point(lambda level: 255 * (level == 0)))
    return Picture(image, None if alpha and alpha.getextrema() == (255, 255) else alpha, metadata)


def refuse_misread(image):
    """Raise ValueError for an opened Pillow image whose values would come out wrong."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(tiff.BITSPERSAMPLE, (8,))
    if tags.get(254, 0) & 1:  # NewSubfileType: reduced
        raise ValueError("its first page is a preview; convert it to JPEG or PNG")
    odd = {"F": True, "I": image.format != "PPM", "I;16": "transparency" in image.info}  # by mode
    signed = set(tags.get(tiff.SAMPLEFORMAT, (1,))) != {1}  # or float
    inverted = tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == 0  # white is 0
    planar = tags.get(tiff.PLANAR_CONFIGURATION) == 2 and image.info["compression"] == "raw"
    deep = max(bits) > 8 and (bits[0] != 16 or inverted or planar)  # what Pillow reads wrong of it
    if odd.get(image.mode) or signed or deep:
        raise ValueError("neither 8 nor plain 16 bits a channel; save it with 8")


def to_srgb(image):
    """A Pillow image in sRGB; as it is, if its profile is none, damaged, or of another mode."""
    try:
        return ImageCms.profileToProfile(
            image, io.BytesIO(image.info.get("icc_profile")), ImageCms.createProfile("sRGB"),
            outputMode="RGB")
    except ImageCms.PyCMSError:
        return image


# --- Files ---------------------------------------------------------------------------------------

@contextmanager
def replacing(path, tag=""):
    """Yield a temporary path beside path; rename it to path at the end, or remove it on failure.

    tag: the process, where several may write path at once. Raises OSError that names path.
    """
    part = path.with_name(f".{_digest(path.name)}{tag}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        hint = " (is there room?)" if isinstance(error, RuntimeError) else ""  # torch.save's
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"cannot write {path}{hint}: {reason}") from error
    finally:
        if os.path.exists(part):  # unlink would raise where path's folder is a file
            part.unlink()


def _digest(values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def find_images(folder):
    """Pictures below folder, by suffix. Hidden files, linked folders, pipes are passed over.

    Prints folders it cannot read. Returns relative paths, sorted, and suffixes of other files.
    """
    names, others = [], []
    for top, folders, files in os.walk(folder, onerror=lambda error: say(error, sys.stderr)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(top, name) for name in files if not name.startswith(".")):
            if is_picture(path) and os.path.isfile(path):
                names.append(path.relative_to(folder))
            else:
                others.append(path.suffix or "without suffix")
    return sorted(names, key=Path.as_posix), others


def decode(path, size):
    """A picture squashed to (size, size, 3) uint8 RGB, bicubic, antialiased; black if broken."""
    try:
        image = read_picture(path).image.convert("RGB")
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
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


def decode_folder(folder, size):
    """All images below folder, decoded once and cached; again if a file's size or time changes.

    Returns names and images (N, size, size, 3) uint8, memory-mapped. The row of a file that could
    not be decoded is black.
    """
    if folder == Path(DEFAULT_DATA) and not folder.exists():
        download(folder)
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no folder of images")
    names, _ = find_images(folder)
    stats = [os.stat(folder / name) for name in names]
    files = [(str(name), stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats)]
    cached = CACHE / f"{_digest((str(folder.resolve()), files))}-{size}.raw"
    if names and not cached.exists():
        with (replacing(cached, os.getpid()) as part, open(part, "wb") as file,
              ThreadPoolExecutor(os.cpu_count()) as pool):
            # Not named: when it is dropped, by Ctrl-C say, it cancels what has not begun.
            for done, row in enumerate(pool.map(lambda name: decode(folder / name, size), names)):
                file.write(row)
                live(f"decoding {done + 1}/{len(names)} images")
        say(f"{len(names)} images decoded into {cached}")
    # Copy on write: torch wants writable memory, and the file must stay as it is.
    images = np.memmap(cached, np.uint8, "c").reshape(-1, size, size, 3) if names else []
    return [name.as_posix() for name in names], images


def demo(size):
    """Crops of 192 px, 32 apart, of scikit-image's photographs: no download, no generalization.

    Returns names and images (N, size, size, 3) uint8, as decode_folder does.
    """
    from skimage import data as photos  # here: sample.py need not wait for it
    names, images = [], []
    for name, photo in {"astronaut": photos.astronaut(), "coffee": photos.coffee(),
                        "chelsea": photos.chelsea(),
                        "motorcycle": photos.stereo_motorcycle()[0]}.items():
        for y in range(0, photo.shape[0] - 191, 32):
            for x in range(0, photo.shape[1] - 191, 32):
                image = Image.fromarray(photo[y : y + 192, x : x + 192])
                images.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
                names.append(f"{name}-{y}-{x}")
    return names, np.stack(images)


# --- Command line --------------------------------------------------------------------------------

def say(text, file=None):
    """Print a line, in place of the live one."""
    live("")
    print(text, file=file, flush=True)


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


def run_command(work, stopped):
    """Run work(), a command line; a failure that its user can meet becomes one line.

    stopped: the answer to Ctrl-C. Returns the exit status: of work, 1, 2 (usage) or 130 (Ctrl-C).
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        return work() or 0
    except (UsageError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        line, status = f"error: {error}", 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        line, status = f"stopped; {stopped}", 130
    say(line, sys.stderr)
    return status
