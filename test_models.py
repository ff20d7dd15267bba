"""What the colorizer promises: CPU, no network, the slow ones last. python -m pytest"""
import os
# Threads of torch, here and in the processes started here: with one each, times are steady.
os.environ["OMP_NUM_THREADS"] = "1"
import copy
import csv
import io
import math
import random
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, OrderedDict
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from skimage.color import lab2rgb, rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

import data
import models
import sample
import train

HERE = Path(__file__).parent
CPU = torch.device("cpu")
# Of the 20 photographs of make_photos 14 are trained on: two steps an epoch.
TINY = "--data photos --size 32 --width 4 --batch-size 7 --device cpu"
# A whole run in half a second.
PRE = f"{TINY} --pretrain-epochs 1 --epochs 0"
# Of nested values, bit by bit.
assert_identical = partial(torch.testing.assert_close, rtol=0, atol=0)
# scikit-image warns of every colour that no RGB has; here many are meant to be such.
pytestmark = pytest.mark.filterwarnings("ignore:.*negative Z")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, and saves after every epoch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    # Under nohup and & it would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def train_py(command):
    """The command line of train.py. Returns the exit status."""
    return train.main(command.split())


@pytest.fixture
def refused(capsys):
    """Check that a command fails with one line, which names what is wrong, and writes nothing."""
    def check(program, command, *named, status=2):
        before = tree()
        capsys.readouterr()

        try:
            answer = program(command)
        except SystemExit as error:
            answer = error.code

        (line,) = capsys.readouterr().err.splitlines()
        assert answer == status, line
        for name in ("error: ", *named):
            assert name in line
        assert tree() == before
    return check


def photo(size=(40, 30), seed=0, mode="RGB"):
    """A smooth colourful picture, other for each seed."""
    noise = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def put(image, *paths):
    """Save an image under each of these paths."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def make_photos(folder, count=20, draw=photo):
    """Pictures, each of a seed of its own, in two folders below folder. Returns folder."""
    for i in range(count):
        path = Path(folder, "ab"[i % 2], f"{i:02}.png")
        put(draw(seed=i), path)
    return Path(folder)


def tree(folder="."):
    """Every file below folder, with its content."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def read_log(out="runs"):
    """The rows of log.csv: dicts of strings."""
    return list(csv.DictReader(Path(out, "log.csv").read_text().splitlines()))


def save_checkpoint(path, network, **others):
    """Write a g.pt of a generator of width 4, with others in place of what it should hold."""
    content = {"size": 32, "history": [{"width": 4}], "test_means": [0.0]}
    content["generator"] = network.state_dict()
    torch.save(content | others, path)


# --- Losses --------------------------------------------------------------------------------------

def test_the_critics_loss_falls_as_real_scores_rise_above_colorized():
    real_score = torch.tensor([3.0, 5.0])
    fake_score = torch.tensor([1.0, 2.0])

    loss = train.critic_loss(real_score, fake_score)

    assert loss.item() == 1.5 - 4


def test_the_generators_loss_is_weighted_l1_minus_the_critics_score():
    l1 = torch.tensor(0.1)
    fake_score = torch.tensor([1.0, 2.0])

    loss = train.generator_loss(l1, fake_score, lambda_l1=100.0)

    # float32: approx allows one millionth.
    assert loss.item() == pytest.approx(100 * 0.1 - 1.5)


def test_a_score_is_the_mean_of_the_critics_map_taken_in_float32():
    L = torch.rand(2, 1, 4, 4)
    ab = torch.rand(2, 2, 4, 4)

    def critic(lab):
        return lab.half()

    scores = train.score(critic, L, ab)

    scores_of_patches = torch.cat([L, ab], 1).half().float()
    # The dtype must be equal, too; the numbers but for the order in which float32 is added.
    torch.testing.assert_close(scores, scores_of_patches.mean((1, 2, 3)))


def penalty_of_a_linear_critic(norm):
    """Penalize a critic whose gradient in ab is its weight's part for ab, of this norm.

    Its gradient in L is long, too, and must not count. Returns the penalty and the weight.
    """
    weight = torch.randn(1, 3, 8, 8)
    weight *= norm / torch.linalg.vector_norm(weight[:, 1:])
    weight.requires_grad_()
    L = torch.rand(4, 1, 8, 8)
    real_ab = torch.rand(4, 2, 8, 8)
    fake_ab = torch.rand(4, 2, 8, 8)

    def critic(lab):
        return (lab * weight).sum((1, 2, 3), keepdim=True)

    return train.gradient_penalty(critic, L, real_ab, fake_ab), weight


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic_is_its_slopes_squared_distance_from_1(norm):
    penalty, _ = penalty_of_a_linear_critic(norm)

    # float32.
    assert penalty.item() == pytest.approx((norm - 1) ** 2, abs=1e-5)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 3.0])
def test_the_penalty_pulls_a_linear_critics_slope_towards_1(norm):
    penalty, weight = penalty_of_a_linear_critic(norm)

    penalty.backward()

    # d (norm - 1)^2 / d weight. Where the slope is 0 it has no direction: 0, and no NaN.
    direction = weight[:, 1:] / norm if norm else torch.zeros(1, 2, 8, 8)
    expected = 2 * (norm - 1) * direction
    # float32, through two derivatives.
    assert torch.allclose(weight.grad[:, 1:], expected, atol=1e-4)


def test_the_penalty_is_taken_at_one_random_mix_of_real_and_colorized_an_image():
    L = torch.rand(50, 1, 8, 8)
    # A mix of ones and zeros is the share of the real one.
    real_ab = torch.ones(50, 2, 8, 8)
    fake_ab = torch.zeros(50, 2, 8, 8)
    seen = []

    def critic(lab):
        seen.append(lab)
        return lab.sum(1, keepdim=True)

    train.gradient_penalty(critic, L, real_ab, fake_ab)

    (lab,) = seen
    mix = lab[:, 1:].flatten(1)
    share = mix[:, 0]
    assert torch.equal(lab[:, :1], L)
    assert torch.equal(mix.amin(1), mix.amax(1))
    assert share.min() >= 0
    assert share.max() <= 1
    # A uniform share deviates by 0.29, and 50 of them by 0.02 from that; one for all by 0.
    assert share.std() > 0.2


def test_the_penalty_is_computed_in_float32_also_where_the_networks_run_in_16_bits():
    L = torch.rand(4, 1, 8, 8)
    real_ab = torch.rand(4, 2, 8, 8)
    fake_ab = torch.rand(4, 2, 8, 8).bfloat16()
    kernel = torch.ones(1, 3, 1, 1)
    seen = []
    scores = []

    def critic(lab):
        seen.append(lab)
        scores.append(nn.functional.conv2d(lab, kernel))
        return scores[0]

    with torch.autocast("cpu", torch.bfloat16):
        train.gradient_penalty(critic, L, real_ab, fake_ab)

    assert scores[0].dtype == torch.float32
    # The mix has more digits than bfloat16 has.
    mixed = seen[0][:, 1:]
    assert not torch.equal(mixed, mixed.bfloat16().float())


# --- Networks ------------------------------------------------------------------------------------

def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def names_of(layers):
    return [type(layer).__name__ for layer in layers]


def test_the_generator_has_the_weights_of_figure_1():
    # Convolutions of Ronneberger's figure 1 with two outputs, and two numbers a batch-norm channel.
    assert count_parameters(models.UNet()) == 31_036_546


def test_the_critic_has_the_weights_of_patchgan_and_one_block_more():
    channels = [3, 64, 128, 256, 512, 512, 1]
    # Kernels of 4 x 4; biases in the first and the last layer alone.
    expected = sum(16 * a * b for a, b in zip(channels, channels[1:])) + 64 + 1

    assert count_parameters(models.PatchCritic()) == expected


def test_a_block_of_the_generator_is_convolution_batch_norm_relu_twice():
    block = models.UNet(4).down1

    assert names_of(block) == ["Conv2d", "BatchNorm2d", "ReLU"] * 2


def test_the_generator_halves_the_resolution_by_the_maximum():
    pool = models.UNet(4).pool

    assert names_of([pool]) == ["MaxPool2d"]


def test_every_batch_norm_of_the_generator_has_torchs_eps():
    norms = [layer for layer in models.UNet(4).modules() if isinstance(layer, nn.BatchNorm2d)]

    # Two in each of nine blocks.
    assert len(norms) == 18
    assert {norm.eps for norm in norms} == {1e-5}


def test_the_skip_connection_comes_before_what_is_scaled_up():
    up = models.Up(4, 2)
    up.conv = nn.Identity()
    x = torch.rand(1, 4, 3, 3)
    skip = torch.rand(1, 2, 6, 6)

    joined = up(x, skip)

    assert torch.equal(joined, torch.cat([skip, up.up(x)], 1))


def test_the_critic_scores_a_map_of_patches():
    critic = models.PatchCritic(4)

    scores = critic(torch.rand(2, 3, 128, 128))

    assert scores.shape == (2, 1, 13, 13)


def test_the_critic_has_instance_norm_except_at_its_ends():
    layers = models.PatchCritic(4).layers

    middle = ["Conv2d", "InstanceNorm2d", "LeakyReLU"] * 4
    assert names_of(layers) == ["Conv2d", "LeakyReLU", *middle, "Conv2d"]


def test_the_critics_relus_leak_a_fifth():
    relus = [layer for layer in models.PatchCritic(4).layers if isinstance(layer, nn.LeakyReLU)]

    assert {relu.negative_slope for relu in relus} == {0.2}


@pytest.fixture
def critics_convolutions():
    """Of a critic as wide as the published one: each has 3,000 weights or more."""
    layers = models.PatchCritic(64).layers
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


def test_the_critic_halves_the_resolution_three_times(critics_convolutions):
    strides = [convolution.stride for convolution in critics_convolutions]

    assert strides == [(2, 2)] * 3 + [(1, 1)] * 3


def test_the_critics_weights_begin_as_in_pix2pix(critics_convolutions):
    for convolution in critics_convolutions:
        # Of 3,000 the mean deviates by 0.0004, and the deviation by 0.0003.
        assert convolution.weight.mean().item() == pytest.approx(0, abs=0.002)
        assert convolution.weight.std().item() == pytest.approx(0.02, abs=0.002)


def test_the_critics_biases_begin_at_0(critics_convolutions):
    for convolution in critics_convolutions:
        if convolution.bias is not None:
            assert not convolution.bias.any()


@pytest.fixture
def colourful():
    """A generator that has learned nothing, but colours strongly, and two pictures for it."""
    torch.manual_seed(0)
    generator = models.UNet(4).eval()
    L = torch.rand(2, 1, 32, 32) * 2 - 1
    nn.init.normal_(generator.head.weight, 0, 10)
    # Were its answer the same everywhere, the tests that compare answers could not fail.
    assert generator(L).std((2, 3)).min() > 0.1
    return generator, L


@pytest.mark.parametrize("contrast, brightness", [(0.5, 0.4), (2.0, -0.3)])
def test_fading_and_contrast_of_a_print_do_not_change_its_colours(contrast, brightness, colourful):
    generator, L = colourful

    answer = generator(contrast * L + brightness)

    # The norm adds 1e-5 to variances of 0.08 to 1.3, and the head multiplies by 10.
    assert torch.allclose(answer, generator(L), atol=1e-3)


def test_the_generator_colours_each_image_by_itself(colourful):
    generator, L = colourful

    alone = generator(L[:1])

    # float32: convolutions of another batch add in another order.
    assert torch.allclose(alone, generator(L)[:1], atol=1e-4)


def test_the_generator_ends_in_tanh(colourful):
    generator, L = colourful
    nn.init.zeros_(generator.head.weight)
    generator.head.bias.data = torch.tensor([0.5, -2.0])

    a, b = generator(L)[0, :, 5, 5].tolist()

    # float32: approx allows one millionth.
    assert a == pytest.approx(math.tanh(0.5))
    assert b == pytest.approx(math.tanh(-2))


# --- Colour --------------------------------------------------------------------------------------

def cube(low, high, n):
    """A picture of n^3 colours, (1, 3, n * n, n) float64: all channels from low to high."""
    axes = [torch.linspace(a, b, n, dtype=torch.float64) for a, b in zip(low, high)]
    return torch.cartesian_prod(*axes).T.reshape(1, 3, n * n, n)


def to_numpy(image):
    """(N, C, H, W) of torch as (N, H, W, C) of NumPy."""
    return image.permute(0, 2, 3, 1).numpy()


# Of these 68,921 colours one in nine has an RGB in [0, 1].
LAB = cube((0, -128, -128), (100, 127, 127), 41)


def test_lab_of_rgb_is_scikit_images():
    rgb = cube((0, 0, 0), (1, 1, 1), 41)

    lab = data.rgb_to_lab(rgb.float())

    # float32, in L*a*b* up to 100.
    assert np.abs(to_numpy(lab) - rgb2lab(to_numpy(rgb))).max() < 1e-3


def test_rgb_of_lab_is_scikit_images_also_outside_the_gamut():
    rgb = data.lab_to_rgb(LAB.float())

    # float32.
    assert np.abs(to_numpy(rgb) - lab2rgb(to_numpy(LAB))).max() < 1e-4


def test_kept_lightness_is_the_one_asked_for_also_outside_the_gamut():
    rgb = data.lab_to_rgb(LAB.float(), keep_lightness=True)

    lightness = rgb2lab(to_numpy(rgb))[..., 0]
    # float32, in L* up to 100; clipping is off by tens.
    assert np.abs(lightness - to_numpy(LAB)[..., 0]).max() < 1e-3


def test_kept_lightness_changes_no_colour_inside_the_gamut():
    expected = lab2rgb(to_numpy(LAB))
    # Inside are those that scikit-image brings back as they were.
    there_and_back = np.abs(rgb2lab(expected) - to_numpy(LAB)).max(-1)
    inside = there_and_back < 1e-3
    assert inside.sum() > 3000

    rgb = data.lab_to_rgb(LAB.float(), keep_lightness=True)

    # float32.
    assert np.abs(to_numpy(rgb) - expected)[inside].max() < 1e-4


def test_8_bit_colours_survive_the_way_to_the_networks_and_back():
    rgb = cube((0, 0, 0), (255, 255, 255), 52)
    # Up to 0.4 of a level off, to either side: rounded they are themselves, cut off they are not.
    near = rgb + 0.4 * torch.sign(200 - rgb)

    L, ab = data.normalize(data.rgb_to_lab(near / 255))

    assert torch.equal(train.to_uint8(L, ab), rgb.round().byte())


def test_networks_see_lab_scaled_to_minus_1_to_1():
    lab = torch.tensor([0.0, 110, -110]).view(1, 3, 1, 1)

    L, ab = data.normalize(lab)

    assert L.flatten().tolist() == [-1]
    assert ab.flatten().tolist() == [1, -1]


# L* from left to right, and rows that alternate between two signs.
SLOPE = torch.linspace(20, 90, 64).expand(64, 64)
SIGN = torch.tensor([1.0, -1.0]).repeat(32).view(-1, 1).expand(64, 64)


def test_a_picture_has_colour_where_ab_differs_by_4_at_equal_lightness():
    # By 7, 3.5, 5, 4.9 (3.5 in both) and 0 from its mean at each lightness.
    amplitudes = [(7, 0), (3.5, 0), (0, 5), (3.5, 3.5), (0, 0)]
    pictures = [torch.stack([SLOPE, a * SIGN, b * SIGN]) for a, b in amplitudes]

    answers = data.has_colour(data.lab_to_rgb(torch.stack(pictures)))

    assert answers.tolist() == [True, False, True, True, False]


def test_a_picture_with_one_colour_for_each_lightness_has_none():
    lab = torch.stack([SLOPE, torch.zeros(64, 64), 25 - SLOPE / 4])

    answer = data.has_colour(data.lab_to_rgb(lab[None]))

    assert answer.tolist() == [False]


def as_jpeg(image):
    """The image after JPEG, which adds colour of its own: (1, 3, H, W) in [0, 1]."""
    image.save("a.jpg", quality=75)
    return torch.from_numpy(np.array(Image.open("a.jpg"))).permute(2, 0, 1)[None] / 255


def test_a_sepia_print_has_no_colour_as_jpeg():
    sepia = ImageOps.colorize(photo(mode="L"), (30, 15, 5), (255, 255, 255))

    assert not data.has_colour(as_jpeg(sepia))


def test_a_colour_photograph_has_colour_as_jpeg():
    assert data.has_colour(as_jpeg(photo()))


# --- Split, crops and ageing ---------------------------------------------------------------------

def test_the_split_is_the_same_for_ever():
    # A row is its own digest: no two are identical.
    train_rows, val_rows, test_rows = data.split(range(100, 120), range(120))

    # The published figures hang on these.
    assert train_rows == [
        118, 101, 119, 108, 110, 117, 106, 113, 104, 102, 105, 114, 109, 107]
    assert val_rows == [116, 111, 103]
    assert test_rows == [100, 115, 112]


# The ends are at 7.7 and 9.35, at 9.8 and 11.9, at 84 and 102.
@pytest.mark.parametrize("count, sizes", [
    (11, [8, 1, 2]),
    (14, [10, 2, 2]),
    (120, [84, 18, 18]),
])
def test_the_split_is_70_15_and_15_percent_rounded(count, sizes):
    parts = data.split(range(count), range(count))

    assert [len(part) for part in parts] == sizes


@pytest.fixture
def copied():
    """Photographs, of which 40 are different, and 20 copies of some. Returns them and their parts.

    By chance alone, 20 copies would all be where their originals are once in a million runs.
    """
    make_photos("photos", 40)
    for i in range(20):
        put(photo(seed=i), f"photos/copy-{i}.png")
    photos = data.Photos("photos", 32)
    return photos, [photos.train, photos.val, photos.test]


def test_identical_images_are_never_in_two_parts(copied):
    photos, parts = copied

    different = []
    for rows in parts:
        different.append({photos.images[row].numpy().tobytes() for row in rows})

    assert len(set.union(*different)) == 40
    assert sum(map(len, different)) == 40


def test_every_image_is_in_one_part(copied):
    _, parts = copied

    assert sorted(torch.cat(parts).tolist()) == list(range(60))


def test_a_batch_is_the_whole_picture_as_pillow_scales_it():
    # Black and white at random in each channel: the hardest to scale down.
    noise = np.random.RandomState(0).randint(0, 2, (12, 48, 48, 3), np.uint8) * 255
    for i, image in enumerate(noise):
        put(Image.fromarray(image), f"photos/{i:02}.png")

    lab = data.denormalize(*data.Photos("photos", 32).batch(torch.arange(12)))

    # Pillow scales one channel at a time, in float32.
    planes = noise.transpose(0, 3, 1, 2).reshape(36, 48, 48).astype(np.float32) / 255
    small = []
    for plane in planes:
        small.append(Image.fromarray(plane).resize((32, 32), Image.Resampling.BICUBIC))
    rgb = np.stack(small).reshape(12, 3, 32, 32).transpose(0, 2, 3, 1)
    # float32.
    assert np.abs(to_numpy(lab) - rgb2lab(rgb.clip(0, 1))).max() < 2e-3


# Every pixel of this picture says where it lies: x and y of its centre, in [0, 1], and a 9.
CENTRES = (torch.arange(48) + 0.5) / 48
Y, X = torch.meshgrid(CENTRES, CENTRES, indexing="ij")
COORDINATES = torch.stack([X, Y, torch.full_like(X, 9)])


@pytest.fixture(scope="module")
def crops():
    """4,000 crops of that picture, and where they lie in it, by the centres of their corner pixels.

    sides: width and height (N, 2) as shares of the picture's; the width of a mirrored one is below
    0. start: the upper left corner (N, 2).
    """
    torch.manual_seed(0)
    images = data.random_crops(COORDINATES.expand(4000, -1, -1, -1), 32)
    first = images[:, :2, 0, 0]
    last = images[:, :2, -1, -1]
    # From the centre of the first pixel to the centre of the last is 31 / 32 of a side.
    sides = (last - first) * 32 / 31
    start = torch.minimum(first, last) - sides.abs() / 64
    return SimpleNamespace(images=images, sides=sides, start=start)


def test_crops_lie_inside_their_picture(crops):
    # float32; outside is 0.
    assert (crops.images[:, 2] - 9).abs().max() < 1e-4


def test_half_of_the_crops_are_mirrored(crops):
    mirrored = crops.sides[:, 0] < 0

    # 6 deviations of 0.008.
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_no_crop_stands_on_its_head(crops):
    assert crops.sides[:, 1].min() > 0


def test_the_sides_of_crops_are_two_thirds_to_all_of_the_pictures(crops):
    sides = crops.sides.abs()

    # Both ends are all but reached in 4,000 crops, and passed by no more than float32's rounding.
    assert 0.6666 < sides.min() < 0.68
    assert 0.99 < sides.max() < 1.0001


def test_crops_are_up_to_a_tenth_wider_or_higher_than_their_picture(crops):
    width, height = crops.sides.abs().unbind(1)

    ratio = width / height

    # Both ends are all but reached.
    assert 0.8999 < ratio.min() < 0.91
    assert 1.09 < ratio.max() < 1.1001


def test_the_areas_of_crops_are_uniform(crops):
    area = crops.sides.prod(1).abs()

    # From (2 / 3)^2 to 1; 4 deviations of 0.0025. Were the sides uniform it would be 0.70.
    assert area.mean().item() == pytest.approx((4 / 9 + 1) / 2, abs=0.01)


def test_the_places_of_crops_are_uniform(crops):
    sides = crops.sides.abs()
    # Of what room there is, 0 is left or top, and 1 is right or bottom.
    place = crops.start / (1 - sides)
    place = place[sides.amax(1) < 0.9]

    assert place.min() > -0.001
    assert place.max() < 1.001
    # 5 deviations of 0.006, and 7 of 0.003.
    assert (place.mean(0) - 0.5).abs().max() < 0.03
    assert (place.std(0) - 12**-0.5).abs().max() < 0.02


@pytest.fixture(scope="module")
def on_paper():
    """Those of 1,500 crops of that picture that lie on paper.

    share: how many do. images; level: the grey of the paper; margin and inside (N, H, W) bool:
    which pixels are paper, and which are picture.
    """
    torch.manual_seed(0)
    images = data.random_crops(COORDINATES.expand(1500, -1, -1, -1), 64, paper=0.4)
    # Paper is grey: its channels are equal. The picture's never are.
    margin = (images - images[:, 2:]).abs().amax(1) < 1e-4
    framed = margin.flatten(1).any(1)
    images = images[framed]
    level = images[:, 2].amin((1, 2), keepdim=True)
    inside = images[:, 2] > (9 + level) / 2
    return SimpleNamespace(share=framed.float().mean().item(), images=images, level=level,
                           margin=margin[framed], inside=inside)


def test_the_share_of_pictures_that_it_is_told_lies_on_paper(on_paper):
    # Of 0.4 some margins are too thin to see; 3 deviations of 0.013.
    assert 0.33 < on_paper.share < 0.44


def test_paper_is_of_one_grey(on_paper):
    difference = on_paper.images[:, 2] - on_paper.level

    # float32.
    assert difference[on_paper.margin].abs().max() < 1e-4


def test_paper_is_black_to_one_and_a_half_times_as_bright_as_white(on_paper):
    level = on_paper.level

    # Both ends are all but reached; 5 deviations of the mean, of 0.018.
    assert -1e-4 < level.min() < 0.05
    assert 1.45 < level.max() < 1.5
    assert 0.65 < level.mean() < 0.85


def test_a_picture_on_paper_is_whole(on_paper):
    places = on_paper.images[:, :2]
    inside = on_paper.inside[:, None]

    lowest = torch.where(inside, places, 1).amin((2, 3))
    highest = torch.where(inside, places, 0).amax((2, 3))

    # To its edges, but for a pixel of the page, 0.021, and half a pixel of the picture, 0.010.
    assert lowest.max() < 0.035
    assert highest.min() > 0.965


# Width and height: a column is seen where the picture is in any row, and a row likewise.
@pytest.mark.parametrize("across", [1, 2])
def test_paper_is_up_to_1_35_times_as_large_as_its_picture(across, on_paper):
    seen = on_paper.inside.any(across).sum(1) / 64

    # Whole pixels are counted; both ends are all but reached.
    assert 1 / 1.35 - 1 / 64 <= seen.min() < 0.77
    assert seen.max() == 1


@pytest.mark.parametrize("across", [1, 2])
def test_a_picture_lies_anywhere_on_its_paper(across, on_paper):
    columns = on_paper.inside.any(across)
    seen = columns.sum(1) / 64
    first = columns.float().argmax(1) / 64

    # Of what room there is, 0 is left or top, and 1 is right or bottom.
    place = (first / (1 - seen))[seen < 0.9]

    # 4 deviations of 0.014; uniform places deviate by 0.29.
    assert place.mean().item() == pytest.approx(0.5, abs=0.06)
    assert place.std() > 0.25


@pytest.fixture(scope="module")
def prints():
    """2,000 old prints of six stripes of known colours, which tell all that was drawn for each.

    greys: the pictures. black, white: the levels that those faded to. For prints with room for
    their grain at both ends: grain, its deviation; unfaded, (N, rows, stripe, column), black 0 and
    white 1 again; gamma, the contrast; weights, of red, green and blue.
    """
    torch.manual_seed(0)
    black_white_grey = torch.tensor([0, 1, 0.5]).view(3, 1).expand(3, 3)
    red_green_blue = torch.eye(3)
    colours = torch.cat([black_white_grey, red_green_blue])
    picture = colours.T.repeat_interleave(10, 1)[:, None].expand(3, 60, 60)
    # A crop's black may be a little below 0, by rounding.
    greys = data.random_grey(picture.expand(2000, -1, -1, -1) - 1e-7)

    # The columns beside another stripe are left out of all means: softness mixes them.
    stripes = greys.view(2000, 60, 6, 10)
    black = stripes[:, :, 0, 1:-1].mean((1, 2))
    white = stripes[:, :, 1, 1:-1].mean((1, 2))
    whole = (black > 0.1) & (white < 0.9)
    grain = stripes[whole, 1:, 1, 2:-2].std((1, 2))

    fade = (white - black)[whole].view(-1, 1, 1, 1)
    unfaded = (stripes[whole] - black[whole].view(-1, 1, 1, 1)) / fade
    levels = unfaded[..., 1:-1].mean((1, 3))
    gamma = levels[:, 2].log() / math.log(0.5)
    weights = levels[:, 3:].clamp_min(0) ** (1 / gamma[:, None])
    return SimpleNamespace(greys=greys, black=black, white=white, grain=grain, unfaded=unfaded,
                           gamma=gamma, weights=weights)


def test_old_prints_are_from_0_to_1(prints):
    assert prints.greys.min() == 0
    assert prints.greys.max() == 1


def test_blacks_fade_to_0_25_and_some_are_lost_in_black(prints):
    lost = prints.black < 0.02

    # Of -0.1 to 0.25; 4 deviations of 0.011.
    assert lost.float().mean().item() == pytest.approx(0.12 / 0.35, abs=0.05)
    # The end is all but reached; grain passes it.
    assert 0.23 < prints.black.max() < 0.26


def test_whites_fade_to_0_75_and_some_are_lost_in_white(prints):
    lost = prints.white > 0.98

    # Of 0.75 to 1.1; 4 deviations of 0.011.
    assert lost.float().mean().item() == pytest.approx(0.12 / 0.35, abs=0.05)
    # The end is all but reached; grain passes it.
    assert 0.74 < prints.white.min() < 0.77


def test_every_print_has_a_grain_of_its_own(prints):
    # Uniform from 0 to 0.03; both ends are all but reached.
    assert prints.grain.min() < 0.001
    assert 0.028 < prints.grain.max() < 0.032


def test_softness_does_not_darken_the_edges_of_a_print(prints):
    top_of_white = prints.unfaded[:, 0, 1, 1:-1].mean(1)

    # Grain, in means of 8 pixels; of a soft one zeros beyond the edge would take a third.
    assert (top_of_white - 1).abs().max() < 0.1


def test_prints_are_sharp_to_as_soft_as_a_mean_of_three_pixels(prints):
    # Of the three columns around black's last one, one is white.
    softness = 3 * prints.unfaded[:, :, 0, -1].mean(1)

    # Uniform from 0 to 1, and grain passes the ends; 6 deviations of the mean, of 0.015.
    assert -0.1 < softness.min() < 0.05
    assert 0.95 < softness.max() < 1.1
    assert softness.mean().item() == pytest.approx(0.5, abs=0.1)


def test_the_contrast_of_prints_is_as_often_raised_as_lowered(prints):
    gamma = prints.gamma

    # exp(-0.4) to exp(0.4), which is 0.67 to 1.49; grain passes the ends.
    assert 0.66 < gamma.min() < 0.72
    assert 1.4 < gamma.max() < 1.51
    # 4 deviations of 0.012.
    assert gamma.log().mean().item() == pytest.approx(0, abs=0.048)


def test_a_films_weights_of_colours_add_up_to_1(prints):
    total = prints.weights.sum(1)

    # Grain, which gamma draws out where a weight is near 0.
    assert (total - 1).abs().max() < 0.06


def test_every_film_weighs_colours_in_its_own_way(prints):
    # Luma's weights, each times up to 2.
    drawn = np.random.RandomState(0).uniform(0, 2, (10**5, 3)) * (0.299, 0.587, 0.114)
    drawn /= drawn.sum(1, keepdims=True)
    weights = prints.weights.numpy()

    # 4 deviations of 0.01, and of 0.008.
    assert np.abs(weights.mean(0) - drawn.mean(0)).max() < 0.04
    assert np.abs(weights.std(0) - drawn.std(0)).max() < 0.03


@pytest.fixture
def photos():
    return data.Photos(make_photos("photos"), 32)


def test_ageing_changes_the_lightness_of_every_image_and_no_colour(photos):
    L, ab = photos.batch(photos.train)

    aged_L, aged_ab = photos.batch(photos.train, aged=1.0)

    assert torch.equal(aged_ab, ab)
    # By half of L* somewhere: no draw leaves a picture as it was.
    assert (aged_L - L).abs().amax((1, 2, 3)).min() > 0.01


def test_ageing_is_of_the_share_that_it_is_told(photos):
    row = photos.train[:1]
    L, _ = photos.batch(row)

    aged_L, _ = photos.batch(row.expand(1000), aged=0.25)

    aged = (aged_L != L).flatten(1).any(1)
    # 4 deviations of 0.014.
    assert aged.float().mean().item() == pytest.approx(0.25, abs=0.055)


def test_half_as_many_crops_lie_on_paper_as_are_aged(photos, monkeypatch):
    papers = []

    def random_crops(rgb, size, paper):
        papers.append(paper)
        return rgb[..., :size, :size]

    monkeypatch.setattr(data, "random_crops", random_crops)

    photos.batch(photos.train, crop=True, aged=0.6)

    assert papers == [0.3]


@pytest.fixture
def paper_alone(photos, monkeypatch):
    """Photos whose crops show nothing but paper, one and a half times as bright as white."""
    def random_crops(rgb, size, paper):
        return torch.full((len(rgb), 3, size, size), 1.5)

    monkeypatch.setattr(data, "random_crops", random_crops)
    return photos


def test_paper_brighter_than_white_has_no_colour(paper_alone):
    _, ab = paper_alone.batch(paper_alone.val, crop=True, aged=1.0)

    # float32.
    assert ab.abs().max() < 1e-4


def test_paper_brighter_than_white_has_the_lightness_of_white(paper_alone):
    L, _ = paper_alone.batch(paper_alone.val, crop=True)

    # L* of 100; float32.
    assert (L - 1).abs().max() < 1e-4


def test_aged_lightness_is_that_of_the_grey_print(paper_alone, monkeypatch):
    def random_grey(rgb):
        return rgb[:, :1] - 1

    monkeypatch.setattr(data, "random_grey", random_grey)

    L, _ = paper_alone.batch(paper_alone.val, crop=True, aged=1.0)

    # Paper of 1.5 reaches random_grey as it is, and becomes a grey of 0.5.
    lightness = rgb2lab(np.full((1, 1, 3), 0.5))[0, 0, 0]
    # float32.
    assert (L - (lightness / 50 - 1)).abs().max() < 1e-4


# --- Training, evaluation, checkpoints -----------------------------------------------------------

def start_run(options=""):
    """The state of a run before its first step."""
    args = train.parse_args(f"{PRE} --amp off {options}".split())
    args.nproc_per_node = 1
    return train.Run(args, CPU)


@pytest.fixture
def run():
    return start_run("--lambda-gp 2 --lambda-l1 3")


def sgd(network):
    """An optimizer whose step is a tenth of the gradient: it shows all of it."""
    return torch.optim.SGD(network.parameters(), lr=0.1)


def assert_near(ours, theirs):
    """Of dicts of tensors: float32, with means taken in another order."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def random_batch():
    """L and ab of four pictures of noise, in [-1, 1]."""
    lab = torch.rand(4, 3, 32, 32) * 2 - 1
    return lab.split([1, 2], 1)


def test_a_step_of_pretraining_goes_down_the_gradient_of_l1(run):
    generator = copy.deepcopy(run.generator)
    run.optimizer_g = sgd(run.generator)
    L, ab = random_batch()

    terms = train.pretrain_step(run, L, ab)

    l1 = (generator(L) - ab).abs().mean()
    l1.backward()
    sgd(generator).step()
    assert_near(terms, {"l1": l1})
    assert_near(run.generator.state_dict(), generator.state_dict())


def papers_steps(run, generator, critic, L, ab):
    """The steps of Gulrajani et al. 2017, algorithm 1, on one batch, and L1. Returns the terms."""
    optimizer_g = sgd(generator)
    optimizer_c = sgd(critic)
    fake_ab = generator(L)

    for _ in range(run.args.critic_steps):
        real_score = critic(torch.cat([L, ab], 1)).mean()
        fake_score = critic(torch.cat([L, fake_ab.detach()], 1)).mean()
        penalty = train.gradient_penalty(critic, L, ab, fake_ab.detach())
        optimizer_c.zero_grad()
        (fake_score - real_score + 2 * penalty).backward()
        optimizer_c.step()

    for i in range(run.args.generator_steps):
        if i > 0:
            fake_ab = generator(L)
        l1 = (fake_ab - ab).abs().mean()
        realness = critic(torch.cat([L, fake_ab], 1)).mean()
        optimizer_g.zero_grad()
        (3 * l1 - realness).backward()
        optimizer_g.step()

    return {
        "l1": l1,
        "adversarial": -realness,
        "wasserstein": real_score - fake_score,
        "penalty": penalty,
    }


@pytest.fixture(params=[(1, 2), (3, 1)], ids=["1 and 2", "3 and 1"])
def batch(request, run):
    """A run after one batch of this many steps of critic and generator, and what it should be."""
    run.args.critic_steps, run.args.generator_steps = request.param
    generator = copy.deepcopy(run.generator)
    critic = copy.deepcopy(run.critic)
    run.optimizer_g = sgd(run.generator)
    run.optimizer_c = sgd(run.critic)
    L, ab = random_batch()

    # Of the mixes between real and colorized, for both alike.
    torch.manual_seed(5)
    terms = train.adversarial_step(run, L, ab)
    torch.manual_seed(5)
    expected = papers_steps(run, generator, critic, L, ab)
    return SimpleNamespace(run=run, terms=terms, expected=expected, generator=generator,
                           critic=critic)


def test_on_a_batch_the_critic_takes_the_papers_steps(batch):
    assert_near(batch.run.critic.state_dict(), batch.critic.state_dict())


def test_on_a_batch_the_generator_takes_the_papers_steps(batch):
    assert_near(batch.run.generator.state_dict(), batch.generator.state_dict())


def test_the_terms_of_a_batch_are_those_of_the_last_steps(batch):
    assert_near(batch.terms, batch.expected)


def test_after_a_batch_the_critic_can_learn_again(batch):
    assert all(parameter.requires_grad for parameter in batch.run.critic.parameters())


def update_three_weights(factors):
    """Update down the gradient of each of these multiples of a loss, in turn, by float16's scaler.

    Returns what each took from the weights, the gradient of the loss, and the scale after them.
    """
    network = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    x = torch.rand(4, 3)
    taken = []
    for factor in factors:
        before = network.weight.detach().clone()
        train.update(network, optimizer, network(x).sum() * factor, scaler)
        taken.append(before - network.weight)
    return taken, x.sum(0, keepdim=True), scaler.get_scale()


def test_a_scaled_loss_leaves_the_true_gradient():
    (taken,), gradient, _ = update_three_weights([1])

    # float32.
    assert torch.allclose(taken, gradient, atol=1e-5)


def test_an_update_forgets_the_gradient_of_the_one_before():
    (_, taken), gradient, _ = update_three_weights([1, 1])

    # float32.
    assert torch.allclose(taken, gradient, atol=1e-5)


def test_an_overflow_takes_no_step_and_halves_the_scale():
    (taken,), _, scale = update_three_weights([math.inf])

    assert not taken.any()
    # It begins with 2^16.
    assert scale == 2**15


@pytest.mark.parametrize("amp, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_both_phases_train_with_16_bits(amp, dtype, monkeypatch):
    make_photos("photos")
    l1_loss = nn.functional.l1_loss
    dtypes = []

    def spy(fake_ab, real_ab):
        dtypes.append(fake_ab.dtype)
        return l1_loss(fake_ab, real_ab)

    monkeypatch.setattr(nn.functional, "l1_loss", spy)

    assert train_py(f"{PRE} --epochs 1 --amp {amp}") == 0

    # Two steps of pre-training, then two batches with two steps of the generator each.
    assert dtypes == [dtype] * 6


# A T4 only emulates bf16, slowly.
@pytest.mark.parametrize("capability, amp", [((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 5), "bf16")])
def test_a_cuda_device_trains_with_the_16_bits_that_it_has(capability, amp, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    assert train.resolve_amp("auto", torch.device("cuda")) == amp


def test_the_cpu_trains_with_32_bits_unless_it_is_told_otherwise():
    assert train.resolve_amp("auto", CPU) == "off"
    assert train.resolve_amp("bf16", CPU) == "bf16"


@pytest.mark.parametrize("amp, scaled", [("fp16", True), ("bf16", False), ("off", False)])
def test_only_float16_needs_its_loss_scaled(amp, scaled):
    run = start_run(f"--amp {amp}")

    assert run.scaler.is_enabled() == scaled


# (1 + n) / (10 + n) after n updates, until that is more than the decay, which is 0.999.
@pytest.mark.parametrize("updates, decay", [(0, 0.1), (10, 0.55), (10**6, 0.999)])
def test_the_moving_average_warms_up_and_covers_batch_norm_too(updates, decay):
    source = models.UNet(2)
    ema = models.UNet(2)
    for tensor in source.state_dict().values():
        tensor.fill_(1)
    for tensor in ema.state_dict().values():
        tensor.fill_(0)

    train.update_ema(ema, source, updates, decay=0.999)

    for name, value in ema.state_dict().items():
        # Counters are not averaged. float32, of a weight of 0.001.
        if "tracked" not in name:
            assert value.mean().item() == pytest.approx(1 - decay, abs=1e-6), name


# Up in the first tenth, half of a cosine from there to the end of pre-training, and then constant.
@pytest.mark.parametrize("epoch, expected", [
    (0, 0.0),
    (0.5, 0.25),
    (1, 0.5),
    (1.9, 0.487764),
    (5.5, 0.25),
    (9.9999, 0.0),
    (10, 0.1),
    (50, 0.1),
])
def test_the_learning_rate_warms_up_falls_by_a_cosine_and_stays(epoch, expected):
    args = train.parse_args("--pretrain-epochs 10 --pretrain-lr 0.5 --lr 0.1".split())

    # 9.9999 is not quite the end, and the cosine is given to six digits.
    assert train.learning_rate(args, epoch) == pytest.approx(expected, abs=1e-6)


def test_the_defaults_are_those_of_the_published_network():
    published = {
        "size": 128,
        "width": 64,
        "batch_size": 32,
        "pretrain_epochs": 100,
        "epochs": 110,
        "critic_steps": 1,
        "generator_steps": 2,
        "lambda_l1": 1000,
        "lambda_gp": 10,
        "pretrain_lr": 1e-3,
        "lr": 1e-4,
        "aged": 0.5,
        "ema": 0.999,
    }

    defaults = vars(train.parse_args([]))

    assert {name: defaults[name] for name in published} == published


def test_adam_has_the_betas_of_pix2pix_and_wgan_gp(run):
    assert run.optimizer_g.defaults["betas"] == (0.5, 0.9)
    assert run.optimizer_c.defaults["betas"] == (0.5, 0.9)


def test_the_seed_decides_with_which_weights_the_networks_begin():
    first = start_run("--seed 0").critic.state_dict()
    again = start_run("--seed 0").critic.state_dict()
    other = start_run("--seed 1").critic.state_dict()

    assert_identical(again, first)
    assert not torch.equal(other["layers.0.weight"], first["layers.0.weight"])


def test_the_width_is_of_both_networks(run):
    assert len(run.generator.down1[0].weight) == 4
    assert len(run.critic.layers[0].weight) == 4


@pytest.fixture(scope="module")
def epochs(tmp_path_factory):
    """Three runs of three epochs, all watched: a and b of seed 0, c of seed 1.

    batches: {run: a (rows, seed of crops and ageing, share of aged) for each of six batches};
    averaged: the arguments of all calls to update_ema; train: the rows of the training part; args:
    the options; last: the last.pt of a.
    """
    batches = {"a": [], "b": [], "c": []}
    averaged = []
    batch = data.Photos.batch
    update_ema = train.update_ema

    def watched_batch(photos, rows, crop=False, aged=0.0):
        if crop:
            # out: the run in the loop below.
            batches[out].append((rows.tolist(), torch.initial_seed(), aged))
        return batch(photos, rows, crop, aged)

    def watched_update(ema, generator, updates, decay):
        averaged.append((updates, decay))
        update_ema(ema, generator, updates, decay)

    command = f"{TINY} --pretrain-epochs 3 --epochs 0 --aged 0.3 --ema 0.9"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("epochs"))
        patch.setattr(data.Photos, "batch", watched_batch)
        patch.setattr(train, "update_ema", watched_update)
        make_photos("photos")
        for out, seed in (("a", 0), ("b", 0), ("c", 1)):
            assert train_py(f"{command} --out {out} --seed {seed}") == 0
        rows = data.Photos("photos", 32).train.tolist()
        last = torch.load("a/last.pt")

    args = train.parse_args(command.split())
    return SimpleNamespace(batches=batches, averaged=averaged, train=rows, args=args, last=last)


def orders(batches):
    """The rows of each epoch in their order, of batches that are two an epoch."""
    rows = [rows for rows, _, _ in batches]
    return [tuple(rows[i] + rows[i + 1]) for i in range(0, len(rows), 2)]


def test_the_same_seed_repeats_every_order_crop_and_age(epochs):
    assert len(epochs.batches["a"]) == 6
    assert epochs.batches["a"] == epochs.batches["b"]


def test_an_epoch_is_every_training_image_once(epochs):
    for order in orders(epochs.batches["a"]):
        assert sorted(order) == sorted(epochs.train)


def test_every_epoch_of_every_seed_has_an_order_of_its_own(epochs):
    different = {*orders(epochs.batches["a"]), *orders(epochs.batches["c"])}

    assert len(different) == 6


def test_every_epoch_of_every_seed_has_crops_and_ages_of_its_own(epochs):
    seeds = {seed for _, seed, _ in epochs.batches["a"] + epochs.batches["c"]}

    # torch is seeded once an epoch.
    assert len(seeds) == 6


def test_training_images_are_aged_as_often_as_asked(epochs):
    assert {aged for _, _, aged in epochs.batches["a"]} == {0.3}


def test_the_moving_average_counts_the_batches_of_all_epochs(epochs):
    assert epochs.averaged == [(updates, 0.9) for updates in range(6)] * 3


@pytest.mark.parametrize("optimizer", ["optimizer_g", "optimizer_c"])
def test_the_learning_rate_is_that_of_a_steps_middle(optimizer, epochs):
    (group,) = epochs.last[optimizer]["param_groups"]

    # The last of two steps, in the last of three epochs.
    assert group["lr"] == train.learning_rate(epochs.args, 2.75)


def test_psnr_of_a_picture_with_itself_is_100():
    picture = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)

    assert train.psnr(picture, picture).tolist() == [100]


def test_colourfulness_of_two_colours_is_what_the_papers_formula_says():
    # Red, blue: rg is 255 and 0, yb is 127.5 and -255.
    image = torch.tensor([[255, 0], [0, 0], [0, 255]], dtype=torch.uint8)

    answer = train.colourfulness(image.view(1, 3, 1, 2))

    # By hand: two values deviate by their distance / sqrt(2).
    deviation = math.hypot(255, 382.5) / 2**0.5
    mean = math.hypot(127.5, 63.75)
    # float32: approx allows one millionth.
    assert answer.item() == pytest.approx(deviation + 0.3 * mean)


def read_table(text):
    """The rows of the printed table: {name: {column: figure}}."""
    table = {}
    _, _, rows = text.partition("worse than no colour\n")
    *rows, real = rows.splitlines()
    for row in rows:
        name, *figures = row.rsplit(maxsplit=5)
        values = [float(figure.strip("%")) for figure in figures]
        table[name] = dict(zip(("psnr", "ssim", "colourfulness", "mix", "worse"), values))
    table["real"] = {"colourfulness": float(real.removeprefix("real"))}
    return table


def as_seen(L, ab):
    """What scikit-image makes of L and ab as networks see them: (N, H, W, 3) uint8."""
    rgb = lab2rgb(to_numpy(data.denormalize(L, ab)))
    return (rgb * 255).round().astype(np.uint8)


def colour_by(generator, L):
    with torch.no_grad():
        return generator(L)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """--eval of two generators that have learned nothing, but colour strongly.

    said: what it printed; table: the figures in it; kept: its test.txt; drawn: its test.png;
    pictures: {row of the table: the pictures it is about, (N, H, W, 3) uint8}.
    """
    def chunks(photos, rows):
        return rows.split(5)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("evaluation"))
        # The six test images are evaluated in two parts, of five and of one.
        patch.setattr(train, "chunks", chunks)
        photos = data.Photos(make_photos("photos", 40), 32)
        L, ab = photos.batch(photos.test)
        # Ageing is the same in every evaluation.
        torch.manual_seed(0)
        aged = [photos.batch(rows, aged=1.0)[0] for rows in chunks(photos, photos.test)]

        colours = {"no colour": torch.zeros_like(ab), "real": ab}
        # b.pt knows as many test images, but others: their levels are equal in the mean alone.
        levels = photos.images[photos.test].double().mean((1, 2, 3))
        first_run = {"width": 4, "epoch": 5}
        for name, shift, epoch in (("a.pt", 0, 5), ("b.pt", [5, -5] * 3, 7)):
            generator = models.UNet(4)
            nn.init.normal_(generator.head.weight, 0, 3)
            means = (levels + torch.tensor(shift)).tolist()
            history = [first_run, {"width": 4, "seed": 1, "epoch": epoch}]
            save_checkpoint(name, generator, test_means=means, history=history)
            generator.eval()
            colours[name] = colour_by(generator, L)
            colours[f"{name}, aged photographs"] = colour_by(generator, torch.cat(aged))

        command = "--eval a.pt b.pt --data photos --device cpu --out out"
        with redirect_stdout(io.StringIO()) as said:
            assert train_py(command) == 0
        kept = Path("out/test.txt").read_text()
        drawn = np.asarray(Image.open("out/test.png"))

    # All with the photograph's own L.
    pictures = {name: as_seen(L, colour) for name, colour in colours.items()}
    said = said.getvalue()
    return SimpleNamespace(said=said, table=read_table(said), kept=kept, drawn=drawn,
                           pictures=pictures)


def psnr_of(pictures, name):
    """scikit-image's PSNR of every picture of a row."""
    pairs = zip(pictures["real"], pictures[name])
    return np.array([peak_signal_noise_ratio(*pair) for pair in pairs])


# Of the table; the last row is of the photographs themselves.
GENERATORS = ["no colour", "a.pt", "a.pt, aged photographs", "b.pt", "b.pt, aged photographs"]


def test_eval_has_a_row_for_each_generator_and_for_what_it_is_to_be_compared_with(evaluation):
    assert list(evaluation.table) == [*GENERATORS, "real"]


@pytest.mark.parametrize("name", GENERATORS)
def test_evals_psnr_is_scikit_images(name, evaluation):
    expected = psnr_of(evaluation.pictures, name).mean()

    # Printed to 0.01; a level here and there is rounded the other way.
    assert evaluation.table[name]["psnr"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("name", GENERATORS)
def test_evals_ssim_is_scikit_images(name, evaluation):
    pairs = zip(evaluation.pictures["real"], evaluation.pictures[name])

    expected = np.mean([structural_similarity(*pair, channel_axis=2) for pair in pairs])

    # Printed to 0.001; a level here and there is rounded the other way.
    assert evaluation.table[name]["ssim"] == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("name", [*GENERATORS, "real"])
def test_evals_colourfulness_is_the_mean_of_the_pictures(name, evaluation):
    pictures = torch.from_numpy(evaluation.pictures[name]).permute(0, 3, 1, 2)

    expected = train.colourfulness(pictures).mean().item()

    # Printed to 0.1.
    assert evaluation.table[name]["colourfulness"] == pytest.approx(expected, abs=0.1)


def count_colours(pictures):
    """How many of all pixels are in each cell of 10 x 10 of a and b."""
    ab = rgb2lab(pictures)[..., 1:]
    cells = (ab / 10).round().reshape(-1, 2)
    return Counter(map(tuple, cells))


@pytest.mark.parametrize("name", GENERATORS)
def test_evals_mix_error_is_the_share_of_pixels_in_cells_that_have_too_many(name, evaluation):
    real = count_colours(evaluation.pictures["real"])

    # A Counter's difference leaves out what is below 0.
    excess = count_colours(evaluation.pictures[name]) - real

    expected = 100 * excess.total() / real.total()
    # Printed to 1 %; a level here and there is rounded the other way, and into the next cell.
    assert evaluation.table[name]["mix"] == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("name", GENERATORS)
def test_eval_counts_the_images_that_no_colour_would_have_been_nearer_to(name, evaluation):
    grey = psnr_of(evaluation.pictures, "no colour")

    worse = psnr_of(evaluation.pictures, name) < grey

    # Printed to 1 %.
    assert evaluation.table[name]["worse"] == pytest.approx(100 * worse.mean(), abs=0.6)


def test_eval_says_once_what_is_new_in_each_run_that_led_to_a_generator(evaluation):
    lines = evaluation.said.splitlines()

    # The first run is of both, and the second ones differ in their epochs alone; an epoch is said
    # even where that of the line before is the same.
    said = [line for line in lines if line.startswith(("a.pt: ", "b.pt: "))]
    assert said == ["a.pt: width 4, epoch 5", "a.pt: seed 1, epoch 5", "b.pt: epoch 7"]


def test_eval_warns_of_a_generator_of_other_photographs(evaluation):
    warnings = [line for line in evaluation.said.splitlines() if line.startswith("warning: ")]

    (warning,) = warnings
    assert warning.startswith("warning: b.pt, or what it began from, was made with other images")


def test_eval_keeps_in_out_what_it_said(evaluation):
    assert evaluation.kept == evaluation.said


def test_eval_writes_nothing_without_out():
    # Into the cache.
    data.Photos(make_photos("photos"), 32)
    save_checkpoint("g.pt", models.UNet(4))
    before = tree()

    assert train_py("--eval g.pt --data photos --device cpu") == 0

    assert tree() == before


@pytest.mark.parametrize("row, name", [(0, "no colour"), (1, "a.pt"), (2, "b.pt"), (3, "real")])
def test_eval_draws_grey_each_generator_and_the_photographs_below_each_other(row, name, evaluation):
    # Six cells of 32 pixels a row, each with a margin of 2 above and to the left.
    assert evaluation.drawn.shape == (4 * 34 + 2, 6 * 34 + 2, 3)
    cells = evaluation.drawn[2:, 2:].reshape(4, 34, 6, 34, 3)[row, :32, :, :32]

    difference = cells.swapaxes(0, 1).astype(int) - evaluation.pictures[name]

    # A level here and there is rounded the other way.
    assert np.abs(difference).max() <= 1


def toned(seed):
    """A picture whose colour follows from its lightness: easily learned."""
    return ImageOps.colorize(photo(seed=seed, mode="L"), "blue", "yellow")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of eight epochs of L1 and one of WGAN-GP, that saves seldom; it takes a second.

    folder: where photos and runs are; said: all it printed; written: the names of its files in
    their order; log, last and g: what log.csv, last.pt and g.pt hold; ema: its moving average.
    """
    written = []
    replace = os.replace

    def watched_replace(part, path):
        written.append(path.name)
        replace(part, path)

    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "replace", watched_replace)
        patch.setattr(train, "SAVE_SECONDS", 1000)
        make_photos("photos", 40, toned)
        with redirect_stdout(io.StringIO()) as said:
            assert train_py(f"{TINY} --pretrain-epochs 8 --epochs 1 --sample-every 6 --seed 3 "
                            "--width 8 --pretrain-lr 0.01 --aged 0.2") == 0
        photos = data.Photos("photos", 32)
        log = read_log()
        last = torch.load("runs/last.pt")
        g = torch.load("runs/g.pt")

    ema = models.UNet(8).eval()
    ema.load_state_dict(last["ema"])
    return SimpleNamespace(folder=folder, said=said.getvalue(), written=written, photos=photos,
                           log=log, last=last, g=g, ema=ema)


def test_pretraining_learns(learned):
    l1 = [float(row["l1"]) for row in learned.log]

    # To a third, in fact.
    assert l1[7] < 0.7 * l1[0]


def test_wgan_gp_does_not_spoil_what_pretraining_learned(learned):
    l1 = [float(row["l1"]) for row in learned.log]

    # It may give up some of its L1 for the critic's sake.
    assert l1[8] < l1[7] / 0.7


def test_a_trained_generator_is_nearer_to_the_photographs_than_no_colour(learned):
    table = read_table(learned.said)

    # By 9 dB, in fact.
    assert table["runs/g.pt"]["psnr"] > table["no colour"]["psnr"] + 1


def test_the_log_names_the_phase_of_each_epoch(learned):
    phases = [row["phase"] for row in learned.log]

    assert phases == ["pretrain"] * 8 + ["wgan-gp"]


@pytest.mark.parametrize("term", ["adversarial", "wasserstein", "penalty"])
def test_the_log_leaves_empty_what_pretraining_does_not_have(term, learned):
    filled = [row[term] != "" for row in learned.log]

    assert filled == [False] * 8 + [True]


@pytest.mark.parametrize("column, aged", [("val_psnr", 0.0), ("val_aged_psnr", 1.0)])
def test_the_log_has_the_moving_averages_psnr_on_the_validation_part(column, aged, learned):
    photos = learned.photos

    figures = train.measure(learned.ema, photos, photos.val, aged=aged)

    # In dB; memory in another layout is added in another order.
    said = float(learned.log[8][column])
    assert said == pytest.approx(figures["psnr"].mean().item(), abs=1e-3)


def test_a_run_saves_after_its_first_epoch_and_its_last_and_draws_when_asked(learned):
    # The last two follow from the first, so that a kill in between loses nothing.
    save = ["last.pt", "g.pt", "log.csv"]
    pictures = ["epoch-0006.png", "pretrained.pt", "epoch-0009.png"]

    # The very first is the cache of decoded images.
    assert learned.written[1:] == [*save, *pictures, *save, "test.txt", "test.png"]


def test_a_runs_pictures_are_of_the_moving_average_on_the_validation_part(learned):
    train.draw([learned.ema], learned.photos, learned.photos.val[:8], Path("expected.png"))

    drawn = np.asarray(Image.open(learned.folder / "runs/epoch-0009.png")).astype(int)
    # Memory in another layout is added in another order: a level at the most.
    assert np.abs(drawn - np.asarray(Image.open("expected.png"))).max() <= 1


def test_g_pt_is_the_moving_average_in_16_bits_but_for_vectors(learned):
    expected = {}
    for name, value in learned.last["ema"].items():
        # Batch norm's statistics, which are vectors, may be beyond float16.
        expected[name] = value.half() if value.ndim > 1 else value

    assert_identical(learned.g["generator"], expected)


def test_a_run_ends_with_the_table_and_keeps_it(learned):
    kept = Path(learned.folder, "runs/test.txt").read_text()

    assert "runs/g.pt, aged photographs" in kept
    assert learned.said.endswith(kept)


def test_eval_tests_on_the_same_part_whatever_the_seed_was(learned, capsys, monkeypatch):
    monkeypatch.chdir(learned.folder)

    assert train_py("--eval runs/g.pt --data photos --device cpu") == 0

    out = capsys.readouterr().out
    at_the_end = read_table(learned.said)
    assert "other images" not in out
    for name, figures in read_table(out).items():
        assert figures == at_the_end[name]


def test_eval_warns_of_another_number_of_test_images(learned, capsys):
    make_photos("others", 44, toned)
    path = learned.folder / "runs/g.pt"

    assert train_py(f"--eval {path} --data others --device cpu") == 0

    assert f"warning: {path}, or what it began from, was made with" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of the shortest run, which test after test can go on from."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_photos("photos")
        assert train_py(PRE) == 0
    return folder


@pytest.fixture
def first_run(finished):
    """That run as it was: its photographs in photos, and its results in runs."""
    shutil.copytree(finished, ".", dirs_exist_ok=True)


def test_resume_refuses_every_option_that_the_result_depends_on(first_run, refused):
    # They are compared before any photograph is read.
    shutil.rmtree("photos")
    options = [
        "--size 48",
        "--width 8",
        "--batch-size 8",
        "--pretrain-epochs 3",
        "--seed 1",
        "--critic-steps 2",
        "--generator-steps 1",
        "--lambda-l1 10.0",
        "--lambda-gp 1.0",
        "--pretrain-lr 0.1",
        "--lr 0.1",
        "--aged 0.1",
        "--ema 0.5",
        "--amp bf16",
    ]

    for option in options:
        refused(train_py, f"{PRE} --epochs 1 --resume {option}", option, "the run in runs has")


def test_resume_lets_change_what_the_result_does_not_depend_on(first_run):
    Path("photos").rename("there")

    assert train_py(f"{PRE} --epochs 1 --resume --data there --sample-every 1 --device auto "
                    "--amp off") == 0

    assert [row["epoch"] for row in read_log()] == ["1", "2"]


def test_resume_refuses_other_photographs(first_run, refused):
    photo(seed=77).save("photos/a/00.png")
    # Into the cache, which is no damage.
    data.Photos("photos", 32)

    refused(train_py, f"{PRE} --epochs 1 --resume", "--data photos: not the images")


def test_a_second_run_into_the_same_folder_is_refused(first_run, refused):
    refused(train_py, PRE, "--out runs: is there already", "--resume")


def test_a_run_may_begin_in_an_empty_folder():
    make_photos("photos")
    # As Ctrl-C before the first save leaves it.
    Path("runs").mkdir()

    assert train_py(PRE) == 0


def test_an_epoch_that_diverges_spoils_nothing_of_its_run(refused):
    make_photos("photos")
    # A rate that leads to weights that are beyond float16.
    command = f"{PRE} --lr 1e6"
    assert train_py(command) == 0

    # What WGAN-GP began from is kept before its first step.
    assert train_py(f"{command} --epochs 1 --resume") == 1

    refused(train_py, f"{command} --epochs 1 --resume", "epoch 2 diverged", "lower --lr", status=1)


def test_weights_and_terms_of_a_sound_run_are_let_pass(run):
    run.check_finite({"l1": 0.5}, epoch=0)


@pytest.mark.parametrize("term", [math.nan, math.inf])
def test_terms_that_are_not_finite_are_refused(term, run):
    with pytest.raises(FloatingPointError):
        run.check_finite({"l1": 0.5, "penalty": term}, epoch=0)


@pytest.mark.parametrize("network", ["generator", "critic", "ema"])
@pytest.mark.parametrize("value", [math.nan, 1e5])
def test_weights_that_float16_cannot_hold_are_refused(network, value, run):
    weight = next(getattr(run, network).parameters())
    weight.data[0] = value

    with pytest.raises(FloatingPointError):
        run.check_finite({}, epoch=0)


@pytest.mark.parametrize("phase", ["--epochs 0", "--pretrain-epochs 0 --epochs 1"])
def test_init_begins_either_phase_with_another_runs_generator_at_any_size(phase, first_run):
    # With rates of 0 all weights stay as they were.
    assert train_py(f"{PRE} {phase} --size 48 --pretrain-lr 0 --lr 0 --init runs/g.pt "
                    "--out second") == 0

    last = torch.load("second/last.pt")
    for name, value in torch.load("runs/g.pt")["generator"].items():
        # Batch norm's statistics follow the pictures.
        if "running" in name or "tracked" in name:
            continue
        assert torch.equal(last["generator"][name], value.float()), name
        # The average of a value with itself rounds.
        assert torch.allclose(last["ema"][name], value.float(), rtol=1e-5), name


def test_init_refuses_another_width(first_run, refused):
    refused(train_py, f"{PRE} --width 8 --init runs/g.pt --out wide", "--width 8: --init runs/g.pt")


def test_init_keeps_the_options_of_the_run_it_began_from_also_when_resumed(first_run):
    command = f"{PRE} --size 48 --out second"
    assert train_py(f"{command} --init runs/g.pt") == 0

    # From here on last.pt counts, and --init is no longer read.
    assert train_py(f"{command} --init gone.pt --resume --epochs 1") == 0

    history = torch.load("second/g.pt")["history"]
    assert [options["size"] for options in history] == [32, 48]
    assert [options["epoch"] for options in history] == [1, 2]


def test_eval_warns_of_what_a_generator_began_from_also_when_resumed(first_run, capsys):
    make_photos("others", 44, toned)
    command = f"{PRE} --data others --out second"
    assert train_py(f"{command} --init runs/g.pt") == 0
    assert train_py(f"{command} --resume --epochs 1") == 0
    capsys.readouterr()

    # Its own test part is that of the others.
    assert train_py("--eval second/g.pt --data others --device cpu") == 0

    assert "warning: second/g.pt, or what it began from, was made" in capsys.readouterr().out


def test_eval_knows_a_run_again_that_another_began_from(first_run, capsys):
    assert train_py(f"{PRE} --seed 1 --init runs/g.pt --out second") == 0
    capsys.readouterr()

    assert train_py("--eval runs/g.pt second/g.pt --data photos --device cpu") == 0

    said = capsys.readouterr().out
    assert "second/g.pt: seed 1, epoch 1\n" in said
    assert said.count("g.pt: ") == 2
    assert "warning" not in said


def test_eval_refuses_generators_of_two_sizes(refused):
    save_checkpoint("small.pt", models.UNet(4))
    save_checkpoint("large.pt", models.UNet(4), size=48)

    refused(train_py, "--eval large.pt small.pt", "--eval: generators", "[32, 48]")


def test_a_generator_with_layers_of_ones_own_trains_and_loads(monkeypatch):
    class Attention(models.UNet):
        def __init__(self, width=64):
            super().__init__(width)
            # Weights with names of their own, and a buffer that is not saved.
            self.down1 = nn.Sequential(self.down1)
            self.register_buffer("strength", torch.tensor(0.5), persistent=False)

    make_photos("photos")
    for module in (models, train):
        monkeypatch.setattr(module, "UNet", Attention)

    assert train_py(PRE) == 0
    generator, info = models.load_generator(Path("runs/g.pt"), CPU)

    assert generator.strength == 0.5
    assert info["size"] == 32


def test_a_loaded_generator_is_ready_to_colour_and_not_to_train():
    save_checkpoint("g.pt", models.UNet(4))

    generator, _ = models.load_generator("g.pt", CPU)

    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())


class Harmful:
    """What a checkpoint from elsewhere may hold: its pickle runs code, here for a file."""
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.fixture(params=["empty", "cut", "code", "other", "changed"])
def bad_checkpoint(request):
    """runs/last.pt, which is no checkpoint for any option."""
    path = Path("runs/last.pt")
    path.parent.mkdir()
    network = models.UNet(4)
    if request.param == "empty":
        path.touch()
    elif request.param == "cut":
        save_checkpoint(path, network)
        path.write_bytes(path.read_bytes()[:-200])
    elif request.param == "code":
        save_checkpoint(path, network, size=Harmful())
    elif request.param == "other":
        torch.save([], path)
    else:
        save_checkpoint(path, network, generator={})


@pytest.mark.parametrize("option", [
    "--eval runs/last.pt",
    "--out new --init runs/last.pt",
    "--resume",
])
def test_a_bad_checkpoint_is_refused_by_name_and_runs_no_code(option, bad_checkpoint, refused):
    # No code: else there would be one file more.
    refused(train_py, f"{TINY} {option}", "runs/last.pt: ")


def test_a_checkpoint_that_is_missing_is_said_to_be(refused):
    refused(train_py, "--eval runs/none.pt", "runs/none.pt: No such file")


# --- Sampling ------------------------------------------------------------------------------------

GREY = photo((50, 37), mode="L")
COLOUR = photo((50, 37))
EVERY_LEVEL = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 32))
both_modes = pytest.mark.parametrize("mode", ["L", "RGB"])


def checkpoint(generator):
    """What train.py writes to g.pt, of a generator that was never trained."""
    return {
        "generator": generator.state_dict(),
        "size": 32,
        "history": [{"width": 4}],
        "test_means": [0.0],
    }


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    """A g.pt that has learned nothing, but colours strongly."""
    torch.manual_seed(0)
    generator = models.UNet(4)
    nn.init.normal_(generator.head.weight, 0, 1.0)
    path = tmp_path_factory.mktemp("ckpt") / "g.pt"
    torch.save(checkpoint(generator), path)
    return str(path)


@pytest.fixture
def sample_py(ckpt):
    """The command line of sample.py, with that g.pt. Returns the exit status."""
    def command_line(command):
        return sample.main(["--ckpt", ckpt, *command.split()])
    return command_line


def pixels(image):
    """An image, or a file's, as RGB (H, W, 3) int."""
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    return np.asarray(image.convert("RGB")).astype(int)


def lab_of(image):
    """An image, or a file's, as L*a*b* (H, W, 3), by scikit-image."""
    return rgb2lab(pixels(image).astype(np.uint8))


def lightness_of(image):
    """An image's, or a file's, L* (H, W), by scikit-image."""
    return lab_of(image)[..., 0]


def noise(size, seed=0, below=256):
    """A picture of random levels, which no format packs well."""
    width, height = size
    levels = np.random.RandomState(seed).randint(0, below, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


def test_the_shipped_network_gives_the_readmes_figure(capsys):
    assert sample.main([str(HERE / "in"), "out", "--device", "cpu"]) == 0

    said = capsys.readouterr().out.partition(" colorized into out, ")[2]
    decibels, *_ = said.split()
    # Other processors add up convolutions in another order.
    assert float(decibels) == pytest.approx(16.22, abs=0.05)


def affine(slope, offset):
    """A generator whose ab is slope times L, plus offset: of two numbers each."""
    generator = nn.Sequential(OrderedDict(head=nn.Conv2d(1, 2, 1)))
    generator.head.weight.data[:, 0, 0, 0] = torch.tensor(slope)
    generator.head.bias.data[:] = torch.tensor(offset)
    return generator


# Levels of a long picture that rise to the right and downwards, so that no two places are alike.
PANORAMA = 75 + np.add.outer(np.linspace(0, 60, 48), np.linspace(0, 60, 160))
PANORAMA = Image.fromarray(PANORAMA.astype(np.uint8))
predictions = pytest.mark.parametrize("slope, offset", [
    ((0.0, 0.0), (0.2, 0.0)),
    ((0.0, 0.0), (-0.2, 0.1)),
    ((0.3, 0.0), (0.0, 0.0)),
])


@both_modes
@predictions
def test_colour_is_what_and_where_the_network_says(slope, offset, mode):
    image = PANORAMA.convert(mode)

    result = sample.colorize(affine(slope, offset), image, 16)

    L, ab = np.split(lab_of(result), [1], axis=2)
    expected = ((L / 50 - 1) * slope + offset) * 110
    error = np.abs(ab - expected)
    # Rounding to 8 bits; along the edges bicubic has fewer neighbours.
    assert error[3:-3, 5:-5].max() < 1
    assert error.max() < 1.5


@both_modes
@predictions
def test_lightness_stays_the_pictures_own_whatever_the_network_says(slope, offset, mode):
    image = PANORAMA.convert(mode)

    result = sample.colorize(affine(slope, offset), image, 16)

    # Rounding to 8 bits.
    assert np.abs(lightness_of(result) - lightness_of(image)).max() < 0.4


@both_modes
def test_strength_0_keeps_every_level_of_grey(mode, sample_py):
    put(EVERY_LEVEL.convert(mode), "a.png")

    assert sample_py("a.png out --strength 0") == 0

    assert np.array_equal(pixels("out/a.png"), pixels(EVERY_LEVEL))


def test_strength_multiplies_the_colour(sample_py):
    # Of a middle lightness, where every colour fits into RGB.
    put(GREY.point(lambda level: 100 + level // 5), "a.png")

    assert sample_py("a.png pale --strength 0.4") == 0
    assert sample_py("a.png paler --strength 0.2") == 0

    pale = lab_of("pale/a.png")[..., 1:]
    paler = lab_of("paler/a.png")[..., 1:]
    assert np.abs(pale).mean() > 8
    # Rounding to 8 bits, and twice as much of the one that is doubled.
    assert np.abs(pale - 2 * paler).max() < 3


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size, rows", [((96, 24), 18), ((96, 64), 48), ((96, 72), 48)])
def test_a_panorama_is_seen_at_3_to_2_between_its_mirror_images(size, rows, turned):
    image = photo(size)
    small = pixels(image.resize((48, rows), Image.Resampling.BICUBIC))
    margin = (48 - rows) // 2
    above = small[:margin][::-1]
    below = small[::-1][:margin]
    expected = np.concatenate([above, small, below])
    if turned:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        small = small.swapaxes(0, 1)
        expected = expected.swapaxes(0, 1)

    seen, inside = sample.network_input(image, 48)

    # Pillow scales columns first, and rounds in between: a level, where the picture is turned.
    assert np.abs(seen.astype(int) - expected).max() <= 1
    assert np.abs(seen[inside].astype(int) - small).max() <= 1


@both_modes
def test_strips_have_no_seams(mode, ckpt, monkeypatch):
    generator, _ = models.load_generator(ckpt, CPU)
    image = photo((90, 301), mode=mode)
    whole = sample.colorize(generator, image, 32)

    # Seven rows a strip, which do not divide 301.
    monkeypatch.setattr(sample, "STRIP", 90 * 7)
    in_strips = sample.colorize(generator, image, 32)

    # A box between two pixels is rounded: a level now and then.
    assert np.abs(pixels(whole) - pixels(in_strips)).max() <= 1


def test_decibels_are_scikit_images_also_of_a_picture_higher_than_a_strip():
    real = photo((30, 700))
    fake = photo((30, 700), seed=1)

    expected = peak_signal_noise_ratio(pixels(real), pixels(fake), data_range=255)
    assert sample.psnr(real, fake) == pytest.approx(expected)


# --- Sampling: folders and names -----------------------------------------------------------------

def test_results_stand_below_out_as_their_pictures_below_the_input(sample_py, capsys):
    put(COLOUR, "in/a.JPG", "in/b.webp", "in/sub/a.tif", "in/sub-2/deep/c.png")

    assert sample_py("in out --grid 0") == 0

    *lines, _ = capsys.readouterr().out.splitlines()
    said = [line.split(": ")[0] for line in lines]
    # Sorted as paths: a sub-folder's pictures stay together.
    assert said == ["out/a.JPG", "out/b.webp", "out/sub-2/deep/c.png", "out/sub/a.tif"]
    assert sorted(tree("out")) == sorted(said)


def test_pictures_are_colorized_in_the_order_in_which_they_are_named(sample_py, capsys):
    put(COLOUR, "e.png", "x/f.png", "x/not.png", "in/a.png")

    assert sample_py("x/f.png in --grid 0 e.png out") == 0

    *lines, _ = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["out/f.png", "out/a.png", "out/e.png"]


def test_a_format_that_is_not_written_becomes_png_and_keeps_its_name(sample_py):
    put(COLOUR, "in/a.bmp", "in/b.gif", "in/c.ppm")

    assert sample_py("in out --grid 0") == 0

    assert sorted(tree("out")) == ["out/a.bmp.png", "out/b.gif.png", "out/c.ppm.png"]
    assert {Image.open(path).format for path in tree("out")} == {"PNG"}


def test_without_a_grid_its_name_is_free(sample_py):
    put(COLOUR, "in/grid.png")

    assert sample_py("in out --grid 0") == 0

    assert np.abs(lightness_of("out/grid.png") - lightness_of(COLOUR)).max() < 1


def test_inputs_and_other_files_in_out_stay_as_they_are(sample_py):
    put(COLOUR, "in/a.png", "in/sub/b.jpg")
    put(GREY, "out/mine.png", "out/sub/mine.jpg")
    inputs = tree("in")
    mine = tree("out")

    assert sample_py("in out") == 0

    assert tree("in") == inputs
    assert mine.items() < tree("out").items()


@pytest.mark.parametrize("suffix", (
    ".jpg .JPEG .jpe .jfif .mpo .png .tif .tiff .webp .bmp .gif .ppm .pgm .pbm").split())
def test_these_suffixes_are_read(suffix):
    assert data.is_picture(f"a{suffix}")


@pytest.mark.parametrize("suffix", (
    ".jp2 .j2k .tga .psd .avif .heic .ico .fits .h5 .eps .wmf .pdf .mpg .txt .part").split())
def test_these_suffixes_are_not(suffix):
    assert not data.is_picture(f"a{suffix}")


def test_other_formats_in_a_folder_are_passed_over_and_counted(sample_py, capsys):
    put(COLOUR, "in/a.png", "in/b.jp2", "in/c.tga", "in/sub/d.tga")
    Path("in/e.psd").write_bytes(b"8BPS")
    Path("in/notes").touch()

    assert sample_py("in out --grid 0") == 0

    assert list(tree("out")) == ["out/a.png"]
    said = capsys.readouterr().out
    assert said.endswith("; passed over: 1 .jp2, 1 .psd, 2 .tga, 1 without suffix\n")


@pytest.mark.parametrize("format", ["tga", "jpeg2000", "ico", "pcx"])
def test_another_format_under_a_pictures_name_is_named_with_the_remedy(format, sample_py, capsys):
    COLOUR.save("a.jpg", format)

    assert sample_py("a.jpg out") == 1

    (line,) = capsys.readouterr().err.splitlines()
    remedy = "no picture of a kind that is read here; save it as JPEG or PNG"
    assert line == f"a.jpg: not colorized: {remedy}"
    assert not tree("out")


@pytest.mark.parametrize("format", ["tga", "jpeg2000", "ico", "pcx"])
def test_another_format_under_a_pictures_name_is_not_trained_on(format, capsys):
    folder = make_photos("photos")
    COLOUR.save(folder / "foreign.jpg", format)

    photos = data.Photos(folder, 32)

    assert "1 of 21 images left out" in capsys.readouterr().out
    assert sum(map(len, (photos.train, photos.val, photos.test))) == 20


def test_hidden_files_are_no_pictures(sample_py, capsys):
    put(COLOUR, "in/a.png", "in/.hidden.png", "in/.thumbnails/b.png")

    assert sample_py("in out --grid 0") == 0

    assert list(tree("out")) == ["out/a.png"]
    assert "passed over" not in capsys.readouterr().out


def test_what_is_no_file_is_passed_over(sample_py, capsys):
    put(COLOUR, "in/a.png")
    Path("in/gone.png").symlink_to("nowhere")
    # Whoever opened it would wait for ever.
    os.mkfifo("in/pipe.png")

    assert sample_py("in out --grid 0") == 0

    assert list(tree("out")) == ["out/a.png"]
    assert "; passed over: 2 .png\n" in capsys.readouterr().out


def test_a_link_to_a_picture_is_a_picture(sample_py):
    put(COLOUR, "elsewhere/c.png")
    Path("in").mkdir()
    Path("in/link.png").symlink_to(Path("elsewhere/c.png").resolve())

    assert sample_py("in out --grid 0") == 0

    assert list(tree("out")) == ["out/link.png"]


def test_linked_folders_are_counted_and_not_entered(sample_py, capsys):
    put(COLOUR, "in/a.png", "elsewhere/c.png")
    for name in ("in/one", "in/two"):
        Path(name).symlink_to(Path("elsewhere").resolve())

    assert sample_py("in out --grid 0") == 0

    assert list(tree("out")) == ["out/a.png"]
    assert "; passed over: 2 linked folders\n" in capsys.readouterr().out


@pytest.fixture
def unreadable(monkeypatch):
    """Call with a folder, which then cannot be read, as without the right to (root has any)."""
    def lock(folder):
        scandir = os.scandir

        def refuse(path="."):
            if str(path) == folder:
                raise PermissionError(13, "Permission denied", folder)
            return scandir(path)
        monkeypatch.setattr(os, "scandir", refuse)
    return lock


def test_a_sub_folder_that_cannot_be_read_is_said_and_makes_the_status_1(
        sample_py, capsys, unreadable):
    put(COLOUR, "in/a.png", "in/locked/b.png", "in/sub/c.png")
    unreadable("in/locked")

    assert sample_py("in out --grid 0") == 1

    assert list(tree("out")) == ["out/a.png", "out/sub/c.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "in/locked" in line
    assert "Permission denied" in line


def test_a_sub_folder_that_cannot_be_read_is_refused_in_training(unreadable):
    folder = make_photos("photos")
    unreadable("photos/b")

    with pytest.raises(data.UsageError, match="--data: photos/b: Permission denied"):
        data.Photos(folder, 32)


ODD_NAMES = ["n" * 251 + ".png", os.fsdecode(b"caf\xe9.png"), "a b: ü.png", "\x1b[31m\n.png"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_result_has_its_pictures_name_however_odd(name, sample_py):
    put(COLOUR, Path("in", name))

    assert sample_py("in out --grid 0") == 0

    assert os.listdir("out") == [name]


def test_a_terminal_without_unicode_is_told_names_in_ascii(sample_py, monkeypatch):
    put(COLOUR, *(Path("in", name) for name in ODD_NAMES))
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)

    assert sample_py("in out") == 0

    said = out.buffer.getvalue().decode("ascii")
    assert "out/caf\\udce9.png: " in said
    assert "out/a b: \\xfc.png: " in said


def test_what_could_steer_a_terminal_is_escaped_in_names(sample_py, capsys):
    put(COLOUR, "in/\x1b[2J\x07good\n.png")
    Path("in/\x1b[2Jbad\n.png").touch()

    assert sample_py("in out --grid 0") == 1

    said = capsys.readouterr()
    (named,) = said.err.splitlines()
    result, _ = said.out.splitlines()
    assert named.startswith("in/\\x1b[2Jbad\\n.png: not colorized")
    assert result.startswith("out/\\x1b[2J\\x07good\\n.png: ")


def test_two_runs_into_one_folder_write_under_hidden_names_of_their_own(sample_py, monkeypatch):
    put(COLOUR, "a.png")
    names = []
    replace = os.replace

    def spy(part, path):
        names.append(part.name)
        replace(part, path)
    monkeypatch.setattr(os, "replace", spy)
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda: process)
        assert sample_py("a.png out --overwrite") == 0

    # Two runs, each with a picture and a grid.
    assert len(set(names)) == 4
    assert all(name.startswith(".") for name in names)


def test_an_out_folder_that_cannot_be_made_fails_before_any_picture(sample_py, refused):
    put(COLOUR, "in/a.png", "in/b.png")
    Path("file").touch()

    # One line: not one for each picture.
    refused(sample_py, "in file/out", "file/out", status=1)


def test_the_default_checkpoint_stands_beside_the_script_also_behind_a_link():
    Path("colorize").symlink_to(HERE / "sample.py")

    script = runpy.run_path("colorize")

    assert script["parse_args"](["in", "out"]).ckpt == HERE.resolve() / "g.pt"


# --- Sampling: what is said ----------------------------------------------------------------------

def decibels_of(name):
    """PSNR of out/name against in/name, by scikit-image."""
    return peak_signal_noise_ratio(pixels(f"in/{name}"), pixels(f"out/{name}"), data_range=255)


def test_a_colour_picture_gets_a_line_with_its_decibels(sample_py, capsys):
    put(noise((40, 30)), "in/a.png")

    assert sample_py("in out --grid 0") == 0

    line, _ = capsys.readouterr().out.splitlines()
    assert line == f"out/a.png: {decibels_of('a.png'):.2f} dB"


def test_a_grey_or_toned_picture_gets_a_line_without_a_figure(sample_py, capsys):
    put(GREY, "in/grey.png")
    put(ImageOps.colorize(GREY, (30, 15, 5), (255, 240, 200)), "in/sepia.jpg")

    assert sample_py("in out --grid 0") == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines == ["out/grey.png", "out/sepia.jpg", "2 colorized into out, 0 failed"]


def test_a_picture_with_alpha_gets_no_figure_and_does_not_count_in_the_mean(sample_py, capsys):
    put(noise((40, 30)), "in/a.png")
    half_hidden = noise((40, 30), seed=1)
    half_hidden.putalpha(GREY.resize((40, 30)).point(lambda level: 255 if level > 128 else 0))
    put(half_hidden, "in/b.png")

    assert sample_py("in out --grid 0") == 0

    *_, line, last = capsys.readouterr().out.splitlines()
    assert line == "out/b.png"
    mean = f"{decibels_of('a.png'):.2f} dB on the 1 that had colour"
    assert last == f"2 colorized into out, {mean}, 0 failed"


def test_a_broken_picture_is_named_and_makes_the_status_1(sample_py, capsys):
    put(COLOUR, "in/a.png", "in/cut.png")
    os.truncate("in/cut.png", 300)
    Path("in/empty.jpg").touch()

    assert sample_py("in out --grid 0") == 1

    said = capsys.readouterr()
    named = [line.split(": not colorized: ")[0] for line in said.err.splitlines()]
    assert named == ["in/cut.png", "in/empty.jpg"]
    assert said.out.endswith(", 2 failed\n")
    assert list(tree("out")) == ["out/a.png"]


@pytest.mark.parametrize("error, said", [
    (RuntimeError("no memory on the device\nand much more"), "no memory on the device"),
    (MemoryError(), "MemoryError"),
])
def test_an_error_is_told_in_its_first_line_or_by_its_name(
        error, said, sample_py, capsys, monkeypatch):
    put(COLOUR, "in/a.png")

    def fail(*_):
        raise error
    monkeypatch.setattr(sample, "colorize", fail)

    assert sample_py("in out") == 1

    assert capsys.readouterr().err == f"in/a.png: not colorized: {said}\n"


def test_the_last_line_has_the_mean_of_the_figures(sample_py, capsys):
    # The darker they are, the less is lost: three figures whose mean is not their median.
    for i in range(3):
        put(noise((40, 30), i, below=256 // (i + 1)), f"in/{i}.png")

    assert sample_py("in out --grid 0") == 0

    decibels = [decibels_of(f"{i}.png") for i in range(3)]
    assert abs(np.mean(decibels) - np.median(decibels)) > 0.1
    *_, last = capsys.readouterr().out.splitlines()
    mean = f"{np.mean(decibels):.2f} dB on the 3 that had colour"
    assert last == f"3 colorized into out, {mean}, 0 failed"


# --- Sampling: the grid --------------------------------------------------------------------------

STEP = 258  # from one cell of 256 pixels to the next
LABEL = 24  # the height of the names below a band


def grid(out="out"):
    """The pixels of a folder's grid."""
    return pixels(Path(out, "grid.png"))


def cell(page, column, row, top=0):
    """A cell of a grid, in the band that begins at top."""
    y = top + row * STEP
    x = column * STEP
    return page[y : y + 256, x : x + 256]


def label(page, column):
    """The name below a column of a grid of one band."""
    x = column * STEP
    return page[-LABEL:, x : x + STEP]


def padded(path):
    """A picture as a cell shows it: whole, as large as fits, on white."""
    image = Image.open(path)
    return pixels(ImageOps.pad(image, (256, 256), Image.Resampling.BICUBIC, "white"))


def test_the_grid_shows_the_first_eight_and_says_so(sample_py, capsys):
    for i in range(10):
        put(Image.new("L", (30, 20), 20 * i), f"in/{i}.png")

    assert sample_py("in out") == 0

    page = grid()
    assert page.shape == (2 * STEP + LABEL, 8 * STEP, 3)
    middles = [cell(page, i, 0)[128, 128, 0] for i in range(8)]
    assert middles == [20 * i for i in range(8)]
    assert capsys.readouterr().out.endswith("out/grid.png shows 8 of 10\n")


def test_the_ninth_picture_begins_another_band(sample_py, capsys):
    for i in range(10):
        put(Image.new("L", (30, 20), 20 * i), f"in/{i}.png")

    assert sample_py("in out --grid 9") == 0

    page = grid()
    band = 2 * STEP + LABEL
    assert page.shape == (2 * band, 8 * STEP, 3)
    assert cell(page, 0, 0, top=band)[128, 128, 0] == 160
    assert capsys.readouterr().out.endswith("out/grid.png shows 9 of 10\n")


@pytest.mark.parametrize("coloured, rows", [(0, (3, 2)), (8, (2, 3))])
def test_a_band_is_as_high_as_its_own_pictures_need(coloured, rows, sample_py):
    for i in range(9):
        put(GREY, f"in/{i}.png")
    put(COLOUR, f"in/{coloured}.png")

    assert sample_py("in out --grid 9") == 0

    heights = [count * STEP + LABEL for count in rows]
    page = grid()
    assert len(page) == sum(heights)
    column = coloured % 8
    top = heights[0] if coloured == 8 else 0
    assert np.array_equal(cell(page, column, 2, top), padded(f"in/{coloured}.png"))


def test_a_column_is_lightness_result_and_photograph(sample_py):
    put(photo((60, 40)), "in/a.png")

    assert sample_py("in out") == 0

    page = grid()
    assert np.array_equal(cell(page, 0, 1), padded("out/a.png"))
    assert np.array_equal(cell(page, 0, 2), padded("in/a.png"))
    photograph = rgb2lab(cell(page, 0, 2).astype(np.uint8))
    grey = rgb2lab(cell(page, 0, 0).astype(np.uint8))
    # Rounding to 8 bits.
    assert np.abs(grey - photograph * (1, 0, 0)).max() < 0.3


def test_the_grids_grey_has_every_level(sample_py):
    put(EVERY_LEVEL.resize((256, 256), Image.Resampling.NEAREST), "in/a.png")

    assert sample_py("in out") == 0

    assert np.array_equal(cell(grid(), 0, 0), pixels("in/a.png"))


def test_a_picture_that_is_no_square_is_shown_whole_on_white(sample_py):
    put(Image.new("L", (30, 20), 100), "in/a.png")

    assert sample_py("in out") == 0

    shown = cell(grid(), 0, 0)
    assert (shown[0] == 255).all()
    assert (shown[128] == 100).all()


def test_beside_a_colour_picture_a_grey_one_has_no_photograph(sample_py):
    put(GREY, "in/a.png")
    put(COLOUR, "in/b.png")

    assert sample_py("in out") == 0

    assert (cell(grid(), 0, 2) == 255).all()


def test_a_broken_picture_has_no_column(sample_py, capsys):
    put(COLOUR, "in/a.png", "in/c.png")
    Path("in/b.png").touch()

    assert sample_py("in out") == 1

    assert grid().shape == (3 * STEP + LABEL, 2 * STEP, 3)
    assert capsys.readouterr().out.endswith("out/grid.png shows 2 of 2\n")


def test_a_long_name_keeps_its_end_in_the_grid(sample_py):
    tail = "m" * 60 + ".png"
    put(COLOUR, f"in/0-{tail}", f"in/1-{tail}")

    assert sample_py("in out") == 0

    page = grid()
    assert (label(page, 0) < 128).any()
    assert np.array_equal(label(page, 0), label(page, 1))


@pytest.mark.parametrize("names", [
    ("1920/rose.jpg", "1921/rose.jpg"),
    ("rose.jpg", "rose.png"),
])
def test_the_grid_tells_apart_what_differs_in_folder_or_suffix(names, sample_py):
    for name in names:
        put(COLOUR, f"in/{name}")

    assert sample_py("in out") == 0

    page = grid()
    assert not np.array_equal(label(page, 0), label(page, 1))


# --- Sampling: nothing that was there is lost ----------------------------------------------------

@pytest.fixture
def years():
    """Two folders of scans with the same names, of which the second was not meant as out."""
    for seed, year in enumerate(("1920", "1930")):
        put(photo(seed=seed), f"{year}/a.png", f"{year}/sub/b.png")


def test_a_forgotten_out_folder_is_refused_with_the_first_picture_and_the_ways_on(
        years, sample_py, refused):
    ways = ("--skip-existing", "--overwrite", "another folder")

    refused(sample_py, "1920 1930", "out 1930/a.png", *ways)


def test_overwrite_replaces_what_is_there(years, sample_py):
    before = tree("1930")

    assert sample_py("1920 1930 --overwrite --grid 0") == 0

    after = tree("1930")
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


def test_skip_existing_keeps_what_is_there_as_it_is(years, sample_py):
    put(COLOUR, "1920/new.png")
    before = tree("1930")
    times = {path: os.stat(path).st_mtime_ns for path in before}

    assert sample_py("1920 1930 --skip-existing --grid 0") == 0

    after = tree("1930")
    assert after.keys() - before.keys() == {"1930/new.png"}
    assert before.items() < after.items()
    assert times == {path: os.stat(path).st_mtime_ns for path in before}


def test_skip_existing_and_overwrite_exclude_each_other(years, sample_py, refused):
    refused(sample_py, "1920 1930 --skip-existing --overwrite", "--overwrite", "--skip-existing")


def test_a_grid_that_is_there_is_refused_even_alone(sample_py, refused):
    put(COLOUR, "in/a.png")
    put(GREY, "out/grid.png")

    refused(sample_py, "in out", "out/grid.png: is there already", "--overwrite")


@pytest.mark.parametrize("flag", ["--skip-existing", "--overwrite"])
def test_a_grid_that_is_there_is_replaced_by_either_flag(flag, sample_py):
    put(COLOUR, "in/a.png")
    put(GREY, "out/grid.png")

    assert sample_py(f"in out {flag}") == 0

    assert Image.open("out/grid.png").size == (STEP, 3 * STEP + LABEL)


def hard_link():
    Path("out").mkdir()
    os.link("in/a.png", "out/a.png")


def link_to_the_picture():
    Path("out").mkdir()
    Path("out/a.png").symlink_to(Path("in/a.png").resolve())


def link_to_the_folder():
    Path("out").symlink_to("in")


def grid_that_is_an_input():
    Path("out").mkdir()
    os.link("in/a.png", "out/grid.png")


@pytest.mark.parametrize("make", [
    hard_link, link_to_the_picture, link_to_the_folder, grid_that_is_an_input])
def test_an_input_is_never_replaced_through_a_link(make, sample_py, refused):
    put(COLOUR, "in/a.png")
    make()

    refused(sample_py, "in/a.png out --overwrite", "would replace the input in/a.png")


@pytest.mark.parametrize("command", ["in/../in/a.png in", "in/a.png in/../in", "in/a.png ./in/."])
def test_an_input_is_never_replaced_under_another_spelling(command, sample_py, refused):
    put(COLOUR, "in/a.png")
    source, _ = command.split()

    refused(sample_py, f"{command} --overwrite", f"would replace the input {source}")


def test_a_result_never_replaces_another_input(sample_py, refused):
    put(COLOUR, "in/b/x.png", "in/b/b/x.png")

    # in/b/b/x.png would become in/b/x.png.
    refused(sample_py, "in/b in --overwrite --grid 0", "would replace the input in/b/x.png")


@pytest.mark.parametrize("command", [
    "in in", "in in/sub", "in/../in in/new", "in in/sub/../new", "link in", "in link/new"])
def test_out_is_not_the_input_and_does_not_lie_in_it(command, sample_py, refused):
    put(COLOUR, "in/a.png", "in/sub/b.png")
    Path("link").symlink_to("in")
    *_, out = command.split()

    refused(sample_py, command, f"out {out}: is or lies in the input")


def test_skip_existing_takes_any_file_of_a_results_name_for_done(sample_py, capsys):
    put(COLOUR, "in/a.png")
    Path("out").mkdir()
    Path("out/a.png").write_bytes(b"made by somebody else")

    assert sample_py("in out --skip-existing --grid 0") == 0

    assert capsys.readouterr().out == "0 colorized into out, 0 failed, 1 done before\n"
    assert Path("out/a.png").read_bytes() == b"made by somebody else"


def copy_of(folder, names, to):
    """Copy files from one folder into another."""
    Path(to).mkdir()
    for name in names:
        Path(to, name).write_bytes(Path(folder, name).read_bytes())


def test_skip_existing_draws_the_grid_of_a_run_that_was_not_interrupted(sample_py, capsys):
    for i in range(3):
        put(photo(seed=i), f"in/{i}.png")
    assert sample_py("in whole") == 0
    copy_of("whole", ["0.png", "2.png"], to="stopped")

    assert sample_py("in stopped --skip-existing") == 0

    assert np.array_equal(grid("stopped"), grid("whole"))
    assert capsys.readouterr().out.endswith("stopped/grid.png shows 3 of 3\n")


def test_skip_existing_draws_jpegs_into_the_grid_up_to_their_rounding(sample_py):
    put(COLOUR, "in/a.jpg")
    assert sample_py("in whole") == 0
    copy_of("whole", ["a.jpg"], to="stopped")

    assert sample_py("in stopped --skip-existing") == 0

    # Of 256 levels: JPEG loses one or two in the mean, and other colours are tens away.
    assert np.abs(grid("stopped") - grid("whole")).mean() < 3
    assert grid("stopped").shape == grid("whole").shape


def test_pictures_done_before_are_counted_by_their_results(sample_py, capsys):
    # Grey ones: what is counted is no figures.
    put(GREY, "in/a.png", "in/b.png")
    Path("in/broken.png").touch()
    assert sample_py("in out") == 1

    assert sample_py("in out --skip-existing") == 1

    said = capsys.readouterr().out
    assert "\n0 colorized into out, 1 failed, 2 done before\n" in said
    assert said.endswith("out/grid.png shows 2 of 2\n")


def test_a_result_that_is_kept_and_broken_is_named_itself(sample_py, capsys):
    put(GREY, "in/a.png")
    Path("out").mkdir()
    Path("out/a.png").touch()

    assert sample_py("in out --skip-existing") == 1

    assert capsys.readouterr().err.startswith("out/a.png: not colorized: ")


def test_a_part_file_of_a_killed_process_is_neither_picture_nor_result(sample_py, capsys):
    put(COLOUR, "in/a.png")
    part = Path("in/a.png").read_bytes()
    for folder in ("in", "out"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, ".0123456789abcdef77.part").write_bytes(part)

    assert sample_py("in out --skip-existing --grid 0") == 0

    said = capsys.readouterr().out
    assert said.endswith("1 colorized into out, "
                         f"{decibels_of('a.png'):.2f} dB on the 1 that had colour, 0 failed, "
                         "0 done before\n")


# --- Reading pictures ----------------------------------------------------------------------------

BEST = {  # how to save as near to the picture as the format allows
    "jpeg": {"quality": 100},
    "mpo": {"quality": 100},
    "webp": {"lossless": True, "exact": True},
}


def saved(image, format, **options):
    """A picture's file as bytes, as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, format, **BEST.get(format, {}), **options)
    return buffer.getvalue()


def tiff(values, **options):
    """A TIFF's bytes, of the kinds that Pillow does not write."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def tagged(blob, tag, *entry):
    """A TIFF whose entry of this tag is another: its tag, type, count and value."""
    blob = bytearray(blob)
    (directory,) = struct.unpack_from("<I", blob, 4)
    (count,) = struct.unpack_from("<H", blob, directory)
    for i in range(count):
        place = directory + 2 + 12 * i
        if struct.unpack_from("<H", blob, place) == (tag,):
            struct.pack_into("<2H2I", blob, place, *entry)
    return bytes(blob)


def without(blob, tag):
    """A TIFF without this tag: it becomes one that nobody knows."""
    return tagged(blob, tag, 65000, 3, 1, 1)


def png(levels, depth, transparent):
    """A PNG by hand, of a depth that Pillow does not write, and with a transparent level.

    levels: (H, W) for grey or (H, W, 3) for RGB, of depth bits; transparent: one level, or three.
    """
    height, width = levels.shape[:2]
    colour_type = 2 if levels.ndim == 3 else 0
    header = struct.pack(">2I5B", width, height, depth, colour_type, 0, 0, 0)
    bits = levels[..., None] >> np.arange(depth)[::-1] & 1
    rows = np.packbits(bits.astype(np.uint8).reshape(height, -1), axis=1)
    # A row begins with its filter: 0, none.
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    key = struct.pack(f">{len(transparent)}H", *transparent)

    chunks = ((b"IHDR", header), (b"tRNS", key), (b"IDAT", content), (b"IEND", b""))
    blob = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        blob += struct.pack(">I", len(body)) + name + body
        blob += struct.pack(">I", zlib.crc32(name + body))
    return blob


def bmp_with_alpha(image):
    """A BMP of version 4, whose masks name a fourth channel as alpha, as Pillow writes none."""
    width, height = image.size
    rows = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes("raw", "BGRA")
    header = struct.pack("<I2i2H6I", 108, width, height, 1, 32, 3, len(rows), 2835, 2835, 0, 0)
    masks = struct.pack("<4I52x", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    start = 14 + len(header + masks)
    return struct.pack("<2sI4xI", b"BM", start + len(rows), start) + header + masks + rows


def icc_profile(kind, space, connection, tag, content):
    """An ICC profile by hand (ICC.1:2001, sections 6.1 and 6.2), of one tag."""
    size = 144 + len(content)
    names = (kind, space, connection, b"acsp")
    header = struct.pack(">I4xI4s4s4s12x4s88x", size, 0x02400000, *names)
    return header + struct.pack(">I4s2I", 1, tag, 144, len(content)) + content


def cyan_is_black_ink():
    """A profile of CMYK in which L* falls from 100 to 0 with cyan, and no other ink counts.

    A table of 8 bits (ICC.1:2001, 6.5.8): two grid points for each of 4 inks, and L*a*b* at each.
    """
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    straight = bytes(range(256))
    white = bytes([255, 128, 128])
    black = bytes([0, 128, 128])
    table = 8 * white + 8 * black
    start = struct.pack(">4s4x4B", b"mft1", 4, 3, 2, 0)
    content = start + matrix + 4 * straight + table + 3 * straight
    return icc_profile(b"prtr", b"CMYK", b"Lab ", b"A2B0", content)


# Profiles in whose pictures values are in proportion to light: of grey, and of RGB, which is sRGB
# with another curve: the (a x + b) ** g of a parametric one.
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CURVE = SRGB.index(b"para") + 12
STRAIGHT_CURVE = struct.pack(">5i", 65536, 65536, 0, 65536, 0)
LIGHT_RGB = SRGB[:CURVE] + STRAIGHT_CURVE + SRGB[CURVE + 20 :]
LIGHT_GREY = icc_profile(b"mntr", b"GRAY", b"XYZ ", b"kTRC", struct.pack(">4s4xI", b"curv", 0))


def srgb_of_light(level):
    """The sRGB level of so much light; without the curve's foot, which ends below 1 / 255."""
    return round(255 * max(0, 1.055 * (level / 255) ** (1 / 2.4) - 0.055))


def on_white(image, alpha):
    """The image where alpha shows any of it, and elsewhere white."""
    seen = alpha.point(lambda level: 255 if level else 0)
    white = Image.new(image.mode, image.size, "white")
    return Image.composite(image, white, seen)


def with_alpha(image, alpha):
    """A copy of the image with alpha, which may be one number for all of it."""
    image = image.copy()
    image.putalpha(alpha)
    return image


def deepened(image):
    """The levels of an image, (H, W) or (H, W, 3), in 16 bits."""
    return np.asarray(image).astype(np.uint16) * 257


def in_planes(values):
    """(H, W, C) as (C, H, W)."""
    return np.moveaxis(values, 2, 0)


class Kind:
    """A kind of picture: its file, and how it is to be seen, with its alpha if any.

    loss: how far lightness may be off, in L*: 0 where every level is exact.
    """

    def __init__(self, blob, image, alpha=None, loss=0.0):
        self.blob = blob
        self.image = image
        self.alpha = alpha
        self.loss = loss


PICTURES = {}  # kinds by the names of their files


def kind(name, blob, image, alpha=None, loss=0.0):
    """Enter a kind of picture."""
    PICTURES[name] = Kind(blob, image, alpha, loss)


# What a format loses, in L*: JPEG and 8 bits of L*a*b* a little; colour management works in tables
# of 8 bits, coarse in the shadows.
JPEG_LOSS = 1.5
LAB_LOSS = 1.0
ICC_LOSS = 2.5

# Grey and colour.
kind("grey.png", saved(GREY, "png"), GREY)
kind("grey.bmp", saved(GREY, "bmp"), GREY)
kind("grey.webp", saved(GREY, "webp"), GREY)
kind("grey.ppm", saved(GREY, "ppm"), GREY)
kind("grey.jpeg", saved(GREY, "jpeg"), GREY, loss=JPEG_LOSS)
kind("rgb.png", saved(COLOUR, "png"), COLOUR)
kind("rgb.jpg", saved(COLOUR, "jpeg"), COLOUR, loss=JPEG_LOSS)
BITMAP = GREY.convert("1")
kind("bit.png", saved(BITMAP, "png"), BITMAP)
kind("bit-g4.tif", saved(BITMAP, "tiff", compression="group4"), BITMAP)
PALETTE = COLOUR.quantize(16)
SIXTEEN = PALETTE.convert("RGB")
kind("palette.png", saved(PALETTE, "png"), SIXTEEN)
kind("palette.tif", saved(PALETTE, "tiff"), SIXTEEN)
kind("white-is-0.tif", tiff(255 - np.asarray(GREY), photometric="miniswhite"), GREY)
kind("jpeg-in.tif", saved(COLOUR, "tiff", compression="jpeg", quality=95), COLOUR, loss=JPEG_LOSS)
AS_LAB = ImageCms.profileToProfile(
    COLOUR, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
kind("lab.tif", saved(AS_LAB, "tiff"), COLOUR, loss=LAB_LOSS)

# 16 bits: other levels than 257 times those of 8 bits, of which these are still the nearest.
FLAT = deepened(GREY)
DEEP = (FLAT + np.where(FLAT > 32768, 120, -120)).astype(np.uint16)
DEEP_RGB = deepened(COLOUR)
PLANES = in_planes(DEEP_RGB)
kind("16-bit.png", saved(Image.fromarray(DEEP), "png"), GREY)
kind("16-bit.tif", tiff(DEEP), GREY)
kind("16-bit-big.tif", tiff(DEEP, byteorder=">"), GREY)
kind("16-bit.pgm", b"P5 50 37 65535\n" + DEEP.astype(">u2").tobytes(), GREY)
kind("16-bit-rgb.tif", tiff(DEEP_RGB, photometric="rgb"), COLOUR)
IN_PLANES = {"photometric": "rgb", "planarconfig": "separate"}
kind("planar-16.tif", tiff(PLANES, compression="zlib", **IN_PLANES), COLOUR)

# Of several pages or frames, the first; a page that says it is one is no preview.
PAGES = {"save_all": True, "append_images": [photo((50, 37), seed=5, mode="L")]}
kind("pages.tiff", saved(GREY, "tiff", **PAGES), GREY)
kind("pages.gif", saved(GREY, "gif", **PAGES), GREY)
kind("pages.mpo", saved(GREY, "mpo", **PAGES), GREY, loss=JPEG_LOSS)
kind("page.tif", tiff(np.asarray(GREY), subfiletype=2), GREY)

# CMYK and colour management. A profile that is broken or of another mode is none.
CMYK = COLOUR.convert("CMYK")
LINEAR = GREY.point(srgb_of_light)
GAMA = PngImagePlugin.PngInfo()
GAMA.add(b"gAMA", struct.pack(">I", 45455))  # the gamma of sRGB
kind("cmyk.tif", saved(CMYK, "tiff"), COLOUR)
kind("cmyk.jpg", saved(CMYK, "jpeg"), COLOUR, loss=JPEG_LOSS)
kind("icc-grey.png", saved(GREY, "png", icc_profile=LIGHT_GREY), LINEAR, loss=ICC_LOSS)
kind("icc-grey-gama.png", saved(GREY, "png", icc_profile=LIGHT_GREY, pnginfo=GAMA), LINEAR,
     loss=ICC_LOSS)
kind("icc-16-bit.png", saved(Image.fromarray(FLAT), "png", icc_profile=LIGHT_GREY), LINEAR,
     loss=ICC_LOSS)
kind("icc.jpg", saved(GREY.convert("RGB"), "jpeg", icc_profile=LIGHT_RGB), LINEAR.convert("RGB"),
     loss=ICC_LOSS)
kind("other-mode.png", saved(GREY, "png", icc_profile=LIGHT_RGB), GREY)
kind("other-mode.tif", saved(CMYK, "tiff", icc_profile=LIGHT_RGB), COLOUR)
kind("broken-profile.png", saved(GREY, "png", icc_profile=b"broken"), GREY)

# Its own profile decides what inks mean: here cyan alone counts, as black, and L* is as hand and
# scikit-image have it. (Without the profile the picture would be cyan.)
CYAN = Image.merge("CMYK", (GREY, *(3 * [GREY.point(lambda level: 0)])))
LSTAR = 100 - np.asarray(GREY) / 2.55
GREY_OF_CYAN = (lab2rgb(np.dstack([LSTAR, 0 * LSTAR, 0 * LSTAR])) * 255).round()
GREY_OF_CYAN = Image.fromarray(GREY_OF_CYAN.astype(np.uint8))
BLACK_INK = {"icc_profile": cyan_is_black_ink()}
kind("icc-cmyk.tif", saved(CYAN, "tiff", **BLACK_INK), GREY_OF_CYAN, loss=ICC_LOSS)
kind("icc-cmyk.jpg", saved(CYAN, "jpeg", **BLACK_INK), GREY_OF_CYAN, loss=ICC_LOSS)

# Alpha, some of it 0. What it hides is white, and steers nothing.
MASK = photo((50, 37), seed=5, mode="L").point(lambda level: max(0, level - 110))
CUT_OUT = with_alpha(COLOUR, MASK)
kind("alpha.png", saved(CUT_OUT, "png"), on_white(COLOUR, MASK), MASK)
kind("alpha.webp", saved(CUT_OUT, "webp"), on_white(COLOUR, MASK), MASK)
kind("alpha-grey.png", saved(with_alpha(GREY, MASK), "png"), on_white(GREY, MASK), MASK)
# Grey multiplied by its alpha of 0, 1/5 or 1: in steps of 5, so that all of it is whole numbers.
STEPS = GREY.point(lambda level: level // 5 * 5)
FIFTHS = MASK.point(lambda level: 51 * min(level, 1) + 204 * (level > 40))
MULTIPLIED = np.asarray(STEPS).astype(int) * np.asarray(FIFTHS) // 255
MULTIPLIED = np.dstack([MULTIPLIED, FIFTHS]).astype(np.uint8)
kind("alpha-associated.tif", tiff(MULTIPLIED, photometric="minisblack",
                                  extrasamples=["assocalpha"], planarconfig="contig"),
     on_white(STEPS, FIFTHS), FIFTHS)

# Alpha that hides nothing is none; nor is one that hides everything: there would be no picture.
kind("opaque.png", saved(with_alpha(COLOUR, 255), "png"), COLOUR)
kind("invisible.png", saved(with_alpha(COLOUR, 0), "png"), COLOUR)
kind("invisible-grey.png", saved(with_alpha(GREY, 0), "png"), GREY)
kind("invisible.bmp", bmp_with_alpha(with_alpha(COLOUR, 0)), COLOUR)
kind("alpha.bmp", bmp_with_alpha(CUT_OUT), on_white(COLOUR, MASK), MASK)
# A fourth sample that nobody calls alpha.
FOUR = np.asarray(with_alpha(COLOUR, 0))
UNNAMED = without(tiff(FOUR, photometric="rgb", extrasamples=["unassalpha"]), 338)
kind("four-samples.tif", UNNAMED, COLOUR)

# A transparent level, or colour of a palette.
KEY = Image.fromarray(np.where(np.asarray(PALETTE) == 3, 0, 255).astype(np.uint8))
kind("key-palette.png", saved(PALETTE, "png", transparency=3), on_white(SIXTEEN, KEY), KEY)
BITS = np.asarray(BITMAP).astype(np.uint8)
BLACK_KEY = Image.fromarray(BITS * 255)
kind("key-grey-1.png", png(BITS, 1, [0]), on_white(BITMAP.convert("L"), BLACK_KEY), BLACK_KEY)
LEVELS = np.asarray(GREY)
LEVEL_KEY = GREY.point(lambda level: 0 if level == LEVELS[3, 3] else 255)
kind("key-grey-8.png", png(LEVELS, 8, [LEVELS[3, 3]]), on_white(GREY, LEVEL_KEY), LEVEL_KEY)
COLOURS = np.asarray(COLOUR)
COLOUR_KEY = np.where((COLOURS == COLOURS[3, 3]).all(axis=2), 0, 255)
COLOUR_KEY = Image.fromarray(COLOUR_KEY.astype(np.uint8))
kind("key-rgb-8.png", png(COLOURS, 8, COLOURS[3, 3]), on_white(COLOUR, COLOUR_KEY), COLOUR_KEY)

# Of every shape.
for size in ((1, 1), (1, 300), (900, 2)):
    shape = GREY.resize(size)
    kind("{}-{}.png".format(*size), saved(shape, "png"), shape)

# Turned, in the kinds that Pillow turns in ways of their own: a TIFF inside load().
TURNS = {  # the orientations of EXIF (2.3, 4.6.4 A), as Pillow calls the way back
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def enter_turned(orientation):
    """Enter a picture of this orientation in each kind."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = TURNS[orientation]
    colour = COLOUR.transpose(turn)
    grey = GREY.transpose(turn)
    mask = MASK.transpose(turn)
    deep = Image.fromarray(DEEP)

    name = f"turned-{orientation}"
    kind(f"{name}.jpg", saved(COLOUR, "jpeg", exif=exif), colour, loss=JPEG_LOSS)
    kind(f"{name}.png", saved(COLOUR, "png", exif=exif), colour)
    kind(f"{name}-grey.tif", saved(GREY, "tiff", exif=exif), grey)
    kind(f"{name}-16-bit.tif", saved(deep, "tiff", exif=exif), grey)
    kind(f"{name}-alpha.tif", saved(CUT_OUT, "tiff", exif=exif), on_white(colour, mask), mask)
    kind(f"{name}-cmyk.tif", saved(CMYK, "tiff", exif=exif), colour)
    kind(f"{name}-palette.tif", saved(PALETTE, "tiff", exif=exif), SIXTEEN.transpose(turn))
    kind(f"{name}-lzw.tif", saved(COLOUR, "tiff", exif=exif, compression="tiff_lzw"), colour)


for orientation in TURNS:
    enter_turned(orientation)

every_picture = pytest.mark.parametrize("name", PICTURES)


@pytest.fixture(scope="module")
def colorized(ckpt, tmp_path_factory):
    """A folder with a file of every kind in its in/, and in its out/ what sample.py made of it."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "in").mkdir()
    for name, picture in PICTURES.items():
        (folder / "in" / name).write_bytes(picture.blob)
    sample.main([f"{folder}/in", f"{folder}/out", "--ckpt", ckpt, "--grid", "0"])
    return folder


def result_of(colorized, name):
    """The path of a picture's result: it has the picture's name, or .png after it."""
    if Path(name).suffix in (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"):
        return colorized / "out" / name
    return colorized / "out" / f"{name}.png"


@every_picture
def test_every_kind_of_picture_is_read_as_it_is_to_be_seen(name, colorized):
    picture = PICTURES[name]

    read = data.read_picture(colorized / "in" / name).image

    if picture.loss == 0:
        assert np.array_equal(pixels(read), pixels(picture.image))
    error = lab_of(read) - lab_of(picture.image)
    assert np.abs(error[..., 0]).max() <= picture.loss
    # Another colour would be tens of ab away in the mean; what JPEG and 8 bits of Lab lose is 2.
    assert np.abs(error[..., 1:]).mean() < 3


@every_picture
def test_training_sees_every_kind_of_picture_squashed_on_white(name, colorized):
    read = data.read_picture(colorized / "in" / name).image

    seen = data.decode(colorized / "in", 16, name)

    expected = read.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(seen, expected)


@every_picture
def test_a_result_has_its_pictures_size_and_the_format_of_its_name(name, colorized):
    path = result_of(colorized, name)

    result = Image.open(path)

    assert result.size == PICTURES[name].image.size
    assert result.format == Image.registered_extensions()[path.suffix]
    # Otherwise a viewer would turn what is upright.
    assert result.getexif().get(0x0112, 1) == 1


@every_picture
def test_a_result_keeps_its_pictures_lightness(name, colorized):
    picture = PICTURES[name]

    error = lightness_of(result_of(colorized, name)) - lightness_of(picture.image)

    if picture.alpha:
        error = error[np.asarray(picture.alpha) > 0]
    # A rounded RGB is at most half a level off in each channel: 0.6 of L* near black. A JPEG was
    # rounded before, too.
    assert np.abs(error).max() < 2 * picture.loss + 0.7


# Black and white, and this one pixel, have no colour whatever the network says.
COLOURLESS = ("1-1.png", "bit.png", "bit-g4.tif", "key-grey-1.png")


@pytest.mark.parametrize("name", [name for name in PICTURES if name not in COLOURLESS])
def test_a_result_is_coloured_where_it_is_neither_black_nor_white(name, colorized):
    result = pixels(result_of(colorized, name))

    assert np.ptp(result, axis=2).max() > 8


@every_picture
def test_a_result_has_its_pictures_alpha(name, colorized):
    alpha = PICTURES[name].alpha

    result = Image.open(result_of(colorized, name))

    assert result.has_transparency_data == bool(alpha)
    if alpha:
        assert np.array_equal(result.convert("RGBA").getchannel("A"), alpha)


@pytest.mark.parametrize("name", [name for name, picture in PICTURES.items() if picture.alpha])
def test_what_alpha_hides_is_white_in_the_result(name, colorized):
    hidden = np.asarray(PICTURES[name].alpha) == 0

    result = pixels(result_of(colorized, name))

    assert hidden.any()
    assert (result[hidden] == 255).all()


@pytest.mark.parametrize("name", [name for name in PICTURES if name.endswith(("jpg", "jpeg"))])
def test_a_jpeg_is_written_at_quality_95_with_colour_at_full_resolution(name, colorized):
    buffer = io.BytesIO()
    COLOUR.save(buffer, "jpeg", quality=95, subsampling=0)
    expected = Image.open(buffer)

    result = Image.open(result_of(colorized, name))

    assert result.quantization == expected.quantization
    assert result.layer == expected.layer


# What Pillow would misread without a word: its file, and what is said.
RAMP = np.linspace(-3, 9, 50 * 37, dtype=np.float32).reshape(37, 50)
GREY_ALPHA = in_planes(np.dstack([LEVELS, np.asarray(MASK)]))
SEPARATE_ALPHA = {"extrasamples": ["unassalpha"], "planarconfig": "separate"}
LOW_MAP = (np.arange(768).reshape(3, 256) % 256).astype(np.uint16)

MISREAD = {}
MISREAD["32-bit.tif"] = (tiff(FLAT.astype(np.uint32) * 65537), "32 bits a channel")
MISREAD["float.tif"] = (tiff(RAMP), "floating point")
MISREAD["float.pfm"] = (b"Pf\n50 37\n-1.0\n" + RAMP.tobytes(), "floating point")
MISREAD["signed.tif"] = (tiff(LEVELS.astype(np.int8)), "signed values")
MISREAD["12-bit.tif"] = (tagged(tiff(FLAT), 258, 258, 3, 1, 12), "neither 8 nor 16 bits")
MISREAD["white-is-0-16.tif"] = (tiff(FLAT, photometric="miniswhite"), "0 is white")
MISREAD["planar-16.tif"] = (tiff(PLANES, **IN_PLANES), "16 bits in planes")
MISREAD["preview.tif"] = (tiff(LEVELS, subfiletype=3), "its first page is a preview")
# The tag of before 1992: 2 is a preview.
OLD_PREVIEW = tagged(tiff(LEVELS, subfiletype=1), 254, 255, 3, 1, 2)
MISREAD["old-preview.tif"] = (OLD_PREVIEW, "its first page is a preview")
MISREAD["palette-8.tif"] = (tiff(LEVELS, photometric="palette", colormap=LOW_MAP), "a palette")
MISREAD["no-word-of-black.tif"] = (without(tiff(LEVELS), 262), "whether 0 is black")
MISREAD["planar-grey-alpha.tif"] = (
    tiff(GREY_ALPHA, photometric="minisblack", compression="zlib", **SEPARATE_ALPHA),
    "grey with alpha in planes")
FOUR_PLANES = tiff(in_planes(FOUR), photometric="rgb", compression="zlib", **SEPARATE_ALPHA)
MISREAD["four-planes.tif"] = (without(FOUR_PLANES, 338), "four planes")
MISREAD["key-grey-2.png"] = (png(LEVELS >> 6, 2, [1]), "transparent level")
MISREAD["key-grey-4.png"] = (png(LEVELS >> 4, 4, [7]), "transparent level")
MISREAD["key-grey-16.png"] = (
    saved(Image.fromarray(FLAT), "png", transparency=5), "transparent level")
MISREAD["key-rgb-16.png"] = (png(DEEP_RGB, 16, DEEP_RGB[3, 3]), "transparent level")

# What is broken.
BROKEN = {}
BROKEN["cut.png"] = (saved(COLOUR, "png")[:-300], "truncated")
BROKEN["cut.jpeg"] = (saved(COLOUR, "jpeg")[:-300], "truncated")
BROKEN["huge.ppm"] = (b"P6 60000 60000 255\n", "limit")
BROKEN["empty.png"] = (b"", "save it as JPEG or PNG")
BROKEN["text.png"] = (b"no", "save it as JPEG or PNG")

REFUSED = MISREAD | BROKEN
every_refused = pytest.mark.parametrize("name", REFUSED)


@every_refused
def test_a_picture_that_would_come_out_wrong_is_refused_by_name(name, sample_py, capsys):
    blob, reason = REFUSED[name]
    Path(name).write_bytes(blob)

    assert sample_py(f"{name} out") == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: not colorized: ")
    assert reason in line


@pytest.mark.parametrize("name", MISREAD)
def test_what_pillow_misreads_is_refused_with_the_remedy(name):
    blob, _ = MISREAD[name]
    Path(name).write_bytes(blob)

    with pytest.raises(ValueError, match="convert it to JPEG, or to PNG of 8 bits a channel"):
        data.read_picture(name)


@every_refused
def test_a_picture_that_would_come_out_wrong_is_not_trained_on(name):
    blob, _ = REFUSED[name]
    Path(name).write_bytes(blob)

    assert not data.decode(Path(), 16, name).any()


@every_refused
def test_where_a_picture_fails_what_was_there_stays(name, sample_py):
    blob, _ = REFUSED[name]
    Path(name).write_bytes(blob)
    put(GREY, result_of(Path(), name), "out/grid.png")
    before = tree()

    assert sample_py(f"{name} out --overwrite") == 1

    assert tree() == before


def test_what_the_results_format_cannot_hold_is_named(sample_py, capsys):
    Path("a.jpg").write_bytes(saved(CUT_OUT, "png"))

    assert sample_py("a.jpg out") == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("a.jpg: not colorized: ")
    assert "cannot write mode RGBA as JPEG" in line
    assert not tree("out")


# --- Reading pictures: EXIF, resolution, XMP -----------------------------------------------------

EXIF_HEADER = b"Exif\0\0"
TEXT = "© José Müller, Bärbels Rosen".encode() + b"\0"
MAKER_NOTE = bytes(range(256))


INTEGERS = {  # the types of TIFF, and what struct calls them
    "short": (3, "H"),
    "long": (4, "I"),
    "signed": (8, "h"),
}


def exif(order="<", orientation=1, integer="short", odd=b"", more=b""):
    """EXIF by hand (TIFF 6.0, section 2), as a camera may have it: more than Pillow can write.

    order: of the bytes, "<" or ">". integer: the orientation's type, of INTEGERS. odd: another
    entry, of 12 bytes. more: bytes at the end.
    """
    name = {"<": b"II", ">": b"MM"}[order]
    count = 3 + bool(odd)
    # Behind the header, the entries and the 0 that ends them.
    text_at = 8 + 2 + 12 * count + 4
    note_at = text_at + len(TEXT)
    # What a short number leaves of its four bytes may be anything.
    type_of_tag, letter = INTEGERS[integer]
    number = struct.pack(f"{order}{letter}", orientation).ljust(4, b"\xab")
    value = struct.pack(f"{order}HHI", 0x0112, type_of_tag, 1) + number
    description = struct.pack(f"{order}HHII", 0x010E, 2, len(TEXT), text_at)
    note = struct.pack(f"{order}HHII", 0x927C, 7, len(MAKER_NOTE), note_at)
    entries = description + value + odd + note

    header = struct.pack(f"{order}2sHIH", name, 42, 8, count)
    return header + entries + bytes(4) + TEXT + MAKER_NOTE + more


EXIF_SUFFIXES = (".jpg", ".png", ".webp")


def exif_files():
    """Of every file of with_exif the order of its bytes, the type of its orientation, and that."""
    files = {}
    for suffix in EXIF_SUFFIXES:
        for name, order in (("II", "<"), ("MM", ">")):
            for integer in ("short", "long"):
                for orientation in range(1, 9):
                    path = f"{name}-{integer}-{orientation}{suffix}"
                    files[path] = (order, integer, orientation)
    return files


EXIF_FILES = exif_files()
every_exif = pytest.mark.parametrize("name", EXIF_FILES)


@pytest.fixture(scope="module")
def with_exif(ckpt, tmp_path_factory):
    """A folder with the pictures of EXIF_FILES in its in/, and their results in its out/."""
    folder = tmp_path_factory.mktemp("exif")
    (folder / "in").mkdir()
    for name, (order, integer, orientation) in EXIF_FILES.items():
        made = exif(order, orientation, integer)
        COLOUR.save(folder / "in" / name, exif=EXIF_HEADER + made)
    sample.main([f"{folder}/in", f"{folder}/out", "--ckpt", ckpt, "--grid", "0"])
    return folder


def turned_by_hand(folder, name):
    """A picture of with_exif as it is to be seen."""
    # Pillow opens it as it lies: only a TIFF comes turned.
    image = Image.open(folder / "in" / name)
    _, _, orientation = EXIF_FILES[name]
    if orientation == 1:
        return image
    return image.transpose(TURNS[orientation])


@every_exif
def test_exif_is_kept_byte_for_byte_but_for_its_orientation(name, with_exif):
    order, integer, _ = EXIF_FILES[name]
    expected = exif(order, 1, integer)

    blob = Path(with_exif, "out", name).read_bytes()

    assert blob.count(expected) == 1


@every_exif
def test_a_picture_is_turned_as_its_exif_says(name, with_exif):
    expected = turned_by_hand(with_exif, name)

    read = data.read_picture(with_exif / "in" / name).image

    assert np.array_equal(pixels(read), pixels(expected))


@every_exif
def test_training_sees_a_picture_turned_as_its_exif_says(name, with_exif):
    expected = turned_by_hand(with_exif, name)

    seen = data.decode(with_exif / "in", 16, name)

    assert np.array_equal(seen, expected.resize((16, 16), Image.Resampling.BICUBIC))


@every_exif
def test_a_result_lies_as_its_picture_is_seen(name, with_exif):
    expected = turned_by_hand(with_exif, name)

    result = with_exif / "out" / name

    # JPEG, at quality 95. Turned otherwise, it would be tens of L* off.
    assert np.abs(lightness_of(result) - lightness_of(expected)).max() < 3


def test_text_in_exif_stays_readable_for_others(with_exif):
    result = Image.open(with_exif / "out/MM-short-6.jpg")

    # Pillow has it as Latin-1.
    description = result.getexif()[0x010E].encode("latin-1")
    assert description.decode() == "© José Müller, Bärbels Rosen"


@pytest.mark.parametrize("suffix", EXIF_SUFFIXES)
def test_an_orientation_of_another_type_turns_nothing_and_stays(suffix, sample_py):
    # A signed number, which EXIF does not allow, but Pillow takes: turned by it and kept, it would
    # turn the picture twice.
    made = exif(orientation=6, integer="signed")
    COLOUR.save(f"a{suffix}", exif=EXIF_HEADER + made)

    assert sample_py(f"a{suffix} out --grid 0") == 0

    assert Image.open(f"out/a{suffix}").size == COLOUR.size
    assert made in Path(f"out/a{suffix}").read_bytes()


# Pillow reads a width that is a fraction, and cannot write it.
FRACTION = struct.pack("<HHII", 0x0100, 5, 1, 8)


def test_a_tag_that_pillow_cannot_write_stops_no_picture(sample_py):
    made = exif(orientation=6, odd=FRACTION)
    COLOUR.save("a.jpg", exif=EXIF_HEADER + made)

    assert sample_py("a.jpg out --grid 0") == 0

    assert Image.open("out/a.jpg").size == (37, 50)
    assert exif(orientation=1, odd=FRACTION) in Path("out/a.jpg").read_bytes()


GARBAGE = [
    b"no EXIF at all",
    # Cut within the header and within the entries; a directory beyond the end.
    b"MM",
    exif(orientation=6)[:30],
    b"II*\0\xff\xff\xff\x7f",
    # Whole, but of no known order of bytes, and of another version.
    b"XX" + exif(orientation=6)[2:],
    b"II+\0" + exif(orientation=6)[4:],
]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("suffix", EXIF_SUFFIXES)
def test_exif_that_cannot_be_read_costs_the_exif_and_not_the_picture(suffix, garbage, sample_py):
    # With a resolution: without one, Pillow looks for it in the EXIF, and forgives.
    COLOUR.save(f"a{suffix}", dpi=(300, 300), exif=EXIF_HEADER + garbage)

    assert sample_py(f"a{suffix} out --grid 0") == 0

    result = Image.open(f"out/a{suffix}")
    assert result.size == COLOUR.size
    assert "exif" not in result.info
    assert data.decode(Path(), 16, f"a{suffix}").any()


def in_segments(blob, *contents):
    """A JPEG with these contents in segments APP1 behind its start."""
    segments = [struct.pack(">2sH", b"\xff\xe1", 2 + len(body)) + body for body in contents]
    return blob[:2] + b"".join(segments) + blob[2:]


# A segment has 65,535 bytes with its own length of two.
FULL = 65_533 - len(EXIF_HEADER + exif())


def test_exif_as_long_as_a_segment_is_kept(sample_py):
    made = exif(orientation=6, more=bytes(FULL))
    Path("a.jpg").write_bytes(in_segments(saved(COLOUR, "jpeg"), EXIF_HEADER + made))

    assert sample_py("a.jpg out --grid 0") == 0

    assert exif(orientation=1, more=bytes(FULL)) in Path("out/a.jpg").read_bytes()


def test_exif_of_two_segments_is_dropped_and_the_picture_turned_and_written(sample_py):
    made = exif(orientation=6, more=bytes(FULL))
    segments = (EXIF_HEADER + made, EXIF_HEADER + b"more")
    Path("a.jpg").write_bytes(in_segments(saved(COLOUR, "jpeg"), *segments))

    assert sample_py("a.jpg out --grid 0") == 0

    result = Image.open("out/a.jpg")
    assert result.size == (37, 50)
    assert "exif" not in result.info


ASKS_FOR_6 = "<x:xmpmeta xmlns:x='adobe:ns:meta/'><x tiff:Orientation=\"6\"/></x:xmpmeta>"


def save_with_xmp(suffix, **options):
    """Save a picture as a.suffix whose XMP has an orientation."""
    if suffix == ".png":
        xmp = PngImagePlugin.PngInfo()
        xmp.add_itxt("XML:com.adobe.xmp", ASKS_FOR_6)
        options["pnginfo"] = xmp
    else:
        options["xmp"] = ASKS_FOR_6.encode()
    COLOUR.save(f"a{suffix}", **options)


@pytest.mark.parametrize("suffix", EXIF_SUFFIXES)
def test_an_orientation_in_xmp_alone_is_used_up(suffix, sample_py):
    save_with_xmp(suffix)

    assert sample_py(f"a{suffix} out --grid 0") == 0

    assert Image.open(f"out/a{suffix}").size == (37, 50)
    # It would turn the picture again.
    assert b"xmpmeta" not in Path(f"out/a{suffix}").read_bytes()


def test_the_orientation_of_exif_comes_before_that_of_xmp():
    save_with_xmp(".png", exif=EXIF_HEADER + exif(orientation=3))

    read = data.read_picture("a.png").image

    assert np.array_equal(pixels(read), pixels(COLOUR)[::-1, ::-1])


@pytest.mark.parametrize("format", ["jpeg", "tiff"])
def test_a_result_in_tiff_has_no_exif(format, sample_py):
    made = Image.Exif()
    made[0x010E] = "Vera's roses"
    made[0x0112] = 6
    made.get_ifd(0x8769)[0x9003] = "1921:05:04 03:02:01"
    COLOUR.save("a.tif", format, exif=made)

    assert sample_py("a.tif out --grid 0") == 0

    result = Image.open("out/a.tif")
    assert result.format == "TIFF"
    assert result.size == (37, 50)
    assert result.tag_v2.keys().isdisjoint({0x010E, 0x8769})
    assert result.tag_v2.get(0x0112, 1) == 1


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_the_resolution_is_kept(suffix, sample_py):
    COLOUR.save(f"a{suffix}", dpi=(300, 200))

    assert sample_py(f"a{suffix} out --grid 0") == 0

    # PNG counts whole pixels a metre.
    assert Image.open(f"out/a{suffix}").info["dpi"] == pytest.approx((300, 200), abs=0.01)


def test_a_tiff_without_a_resolution_gets_none(sample_py):
    COLOUR.save("a.tif")

    assert sample_py("a.tif out --grid 0") == 0

    assert 282 not in Image.open("out/a.tif").tag_v2


# --- Files ---------------------------------------------------------------------------------------

def test_work_that_has_not_begun_is_cancelled_when_the_loop_over_it_is_left():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        with data.in_threads(work, range(100), threads=1) as results:
            next(results)
            raise KeyboardInterrupt

    # One is done and one may be under way; a slow machine may have begun a few more.
    assert len(begun) < 20


def test_a_second_ctrl_c_waits_for_what_is_under_way_as_the_first_does():
    begun = threading.Event()
    done = []

    def work(item):
        begun.set()
        # The loop is left and waits.
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        with data.in_threads(work, [0], threads=1):
            begun.wait()
            raise KeyboardInterrupt

    assert done == [0]


@pytest.fixture
def bmp():
    """Call to write photos/new.bmp; not compressed, so that all have one size."""
    folder = make_photos("photos")

    def write(seed, time_ns):
        photo(seed=seed).save(folder / "new.bmp")
        os.utime(folder / "new.bmp", ns=(time_ns, time_ns))
        return data.Photos(folder, 32)
    return write


def test_the_cache_serves_a_file_of_the_same_size_and_time(bmp):
    first = bmp(seed=98, time_ns=10**18)
    second = bmp(seed=97, time_ns=10**18)

    assert first.contents == second.contents


# A second later, and a tenth of a second: files of one copy are as near.
@pytest.mark.parametrize("later", [10**9, 10**8])
def test_the_cache_notices_a_file_that_changed(later, bmp):
    first = bmp(seed=98, time_ns=10**18)
    second = bmp(seed=97, time_ns=10**18 + later)

    assert first.contents != second.contents
    assert len(tree("cache")) == 2


def test_the_cache_holds_a_file_for_each_size_and_none_that_looks_like_a_picture():
    folder = make_photos("photos")

    for size in (32, 48, 32):
        data.Photos(folder, size)

    assert len(tree("cache")) == 2
    assert not any(map(data.is_picture, tree("cache")))


def test_the_cache_is_never_written_to_through_the_images():
    folder = make_photos("photos")
    first = data.Photos(folder, 32)

    first.images[:] = 0

    assert data.Photos(folder, 32).contents == first.contents


@pytest.mark.parametrize("lost_rows", [1, 0.5, 20])
def test_a_cache_that_lost_rows_is_decoded_anew(lost_rows):
    folder = make_photos("photos")
    data.Photos(folder, 32)
    (cached,) = Path("cache").iterdir()
    whole = cached.read_bytes()
    os.truncate(cached, int(len(whole) * (1 - lost_rows / 20)))

    photos = data.Photos(folder, 32)

    assert cached.read_bytes() == whole
    assert len(photos.images) == 20


def test_what_cannot_be_read_is_left_out_and_named_also_from_the_cache(capsys):
    folder = make_photos("photos")
    put(photo(), "photos/cut.png")
    os.truncate("photos/cut.png", 300)

    for _ in range(2):
        photos = data.Photos(folder, 32)

        said = capsys.readouterr().out
        assert "1 of 21 images left out" in said
        assert "again): cut.png\n" in said
        assert sum(map(len, (photos.train, photos.val, photos.test))) == 20


# Of 22 and of 23 images: a tenth lies between.
@pytest.mark.parametrize("grey, warned", [(2, False), (3, True)])
def test_more_than_a_tenth_of_grey_is_named_also_from_the_cache(grey, warned, capsys):
    folder = make_photos("photos")
    for i in range(grey):
        photo(seed=50 + i, mode="L").save(folder / f"{i}.png")

    for _ in range(2):
        data.Photos(folder, 32)

        said = capsys.readouterr().out
        line = f"warning: {grey} of {20 + grey} images are black and white: they teach grey"
        assert (line in said) == warned


def test_fewer_than_ten_images_are_refused():
    folder = make_photos("photos", count=9)

    with pytest.raises(data.UsageError, match="9 readable images, at least 10 are needed"):
        data.Photos(folder, 32)


def test_too_few_images_name_the_links_that_were_not_entered():
    make_photos("elsewhere")
    Path("photos").mkdir()
    Path("photos/link").symlink_to(Path("elsewhere").resolve())

    with pytest.raises(data.UsageError, match="links to folders are not entered"):
        data.Photos(Path("photos"), 32)


def test_identical_images_that_cannot_be_split_are_refused():
    def same(seed):
        return photo()
    folder = make_photos("photos", count=10, draw=same)

    with pytest.raises(data.UsageError, match="too many identical images"):
        data.Photos(folder, 32)


def test_a_part_file_of_a_killed_process_is_no_photograph():
    folder = make_photos("photos")
    whole = data.Photos(folder, 32)
    part = Path("photos/a/00.png").read_bytes()
    Path("photos/.0123456789abcdef77.part").write_bytes(part)

    assert data.Photos(folder, 32).contents == whole.contents


@pytest.fixture
def full_disk():
    """Call with a number of bytes: a file that grows beyond it fails as on a full disk."""
    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    yield limit
    limit(resource.RLIM_INFINITY)


def test_a_full_disk_leaves_no_cut_off_checkpoint(full_disk, capsys):
    make_photos("photos")
    data.Photos("photos", 32)

    # Between the sizes of the epoch's picture and of last.pt.
    full_disk(150_000)
    assert train_py(PRE) == 1

    assert "cannot write runs/last.pt (is there room?)" in capsys.readouterr().err
    assert list(tree("runs")) == ["runs/epoch-0001.png"]


def test_a_full_disk_leaves_no_cut_off_cache(full_disk, refused):
    make_photos("photos")

    # Less than 20 images of 48 x 48.
    full_disk(100_000)

    refused(train_py, PRE, "cannot write cache/", status=1)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_full_disk_leaves_no_cut_off_picture(suffix, full_disk, sample_py, capsys):
    put(noise((200, 200)), f"in/a{suffix}")
    # Of an earlier run: it stays.
    put(GREY, f"out/a{suffix}")
    before = tree()

    # Less than 40,000 random levels take in any format.
    full_disk(10_000)
    assert sample_py("in out --overwrite --grid 0") == 1

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"in/a{suffix}: not colorized: cannot write out/a{suffix}")
    assert tree() == before


@pytest.fixture
def flowers(monkeypatch):
    """Flowers102, whose download fails as often as errors are appended to this list."""
    from torchvision.datasets import Flowers102
    errors = []

    def fetch(self, root, download):
        make_photos(root / "flowers-102" / "jpg")
        if errors:
            raise errors.pop()
    monkeypatch.setattr(Flowers102, "__init__", fetch)
    return errors


def test_a_missing_default_folder_is_downloaded(flowers):
    photos = data.Photos("data", 32)

    assert len(photos.images) == 20
    assert not Path("data.part").exists()


def test_a_download_cut_short_names_what_to_do_and_is_no_data(flowers):
    flowers.append(RuntimeError("no route to host"))

    with pytest.raises(data.UsageError, match="no route to host.*by hand.*--data demo"):
        data.Photos("data", 32)

    assert Path("data.part").exists()
    assert not Path("data").exists()


def test_another_missing_folder_is_not_downloaded(flowers):
    with pytest.raises(data.UsageError, match="--data photos: no folder of images"):
        data.Photos("photos", 32)


def test_the_demo_needs_no_download(flowers):
    photos = data.Photos("demo", 32)

    assert photos.images.shape == (428, 48, 48, 3)


# --- Mistakes of the command line ----------------------------------------------------------------

TRAIN_MISTAKES = [
    "--size 100",
    "--size 16",
    "--size 1000000",
    "--size big",
    "--width 0",
    "--width 10000",
    "--batch-size 0",
    "--batch-size 2.5",
    f"--batch-size {'9' * 401}",
    f"{TINY} --batch-size 15",
    "--epochs",
    "--epochs -1",
    "--pretrain-epochs -1",
    "--pretrain-epochs 0 --epochs 0",
    "--critic-steps 0",
    "--generator-steps 0",
    "--lambda-l1 -1",
    "--lambda-gp nan",
    "--lr -1",
    "--lr inf",
    "--pretrain-lr fast",
    "--aged 1.5",
    "--aged nan",
    "--ema 1.5",
    "--seed -1",
    "--amp fp8",
    "--device gpu",
    "--device hpu",
    "--device cuda:99",
    "--sample-every 0",
    "--frobnicate",
    "--data file",
    "--data absent",
    f"{TINY} --out file",
    "--data photos --out photos/runs",
    "--data photos --eval g.pt --out photos/runs",
]


@pytest.mark.parametrize("command", TRAIN_MISTAKES)
def test_mistakes_of_train_py_are_one_line_that_names_the_last_option(command, refused):
    data.Photos(make_photos("photos"), 32)  # into the cache
    Path("file").touch()

    *_, last = [word for word in command.split() if word.startswith("--")]
    refused(train_py, command, last)


@pytest.mark.parametrize("option", [
    "--device gpu", "--size 3", "--grid -1", "--grid 1001", "--strength -1", "--strength 11",
    "--strength nan"])
def test_mistakes_of_sample_py_are_one_line_that_names_the_option(option, sample_py, refused):
    put(COLOUR, "in/a.png")

    flag, _ = option.split()
    refused(sample_py, f"in out {option}", flag)


def test_an_input_that_is_not_there_is_named(sample_py, refused):
    put(COLOUR, "in/a.png")

    refused(sample_py, "in missing out", "input missing: no such file or folder")


@pytest.mark.parametrize("name", ["a.heic", "a.jp2", "a.tga", "a.psd", "folder"])
def test_an_input_without_a_picture_is_refused_with_the_remedy(name, sample_py, refused):
    put(COLOUR, "in/a.png")
    for path in (Path("a.heic"), Path("a.psd"), Path("folder/a.heic")):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    COLOUR.save("a.jp2")
    COLOUR.save("a.tga")

    refused(sample_py, f"in {name} out", f"input {name}: no picture of a kind", "as JPEG or PNG")


@pytest.mark.parametrize("out", ["file", "in/a.png", "new.BMP"])
def test_an_out_that_is_a_files_name_is_refused(out, sample_py, refused):
    put(COLOUR, "in/a.png")
    Path("file").touch()

    refused(sample_py, f"in {out}", f"out {out}: a file's name", "the folder")


def test_a_forgotten_out_is_a_usage_error(sample_py, refused):
    put(COLOUR, "in/a.png")

    refused(sample_py, "in", "out")


# Equal names; on a disk that tells no case apart; in Unicode's composed and decomposed form.
@pytest.mark.parametrize("first, second", [
    ("a.png", "a.png"),
    ("a.png", "A.PNG"),
    ("caf\xe9.png", "cafe\u0301.png"),
    ("a.gif", "a.gif.png"),
])
def test_two_inputs_with_a_result_of_one_name_are_told_to_name_their_parent(
        first, second, sample_py, refused):
    put(COLOUR, f"1920/{first}", f"1930/{second}")

    pair = f"input 1930/{second} and 1920/{first} would both become"
    refused(sample_py, "1920 1930 out", pair, "name their parent folder")
    refused(sample_py, f"1920/{first} 1930/{second} out", pair, "name their parent folder")


@pytest.mark.parametrize("first, second", [
    ("A.PNG", "a.png"),
    ("cafe\u0301.png", "caf\xe9.png"),
    ("a.gif", "a.gif.png"),
    ("SUB/a.png", "sub/a.png"),
])
def test_two_pictures_of_one_input_with_a_result_of_one_name_are_told_to_rename(
        first, second, sample_py, refused):
    put(COLOUR, f"in/{first}", f"in/{second}")

    pair = f"input in/{second} and in/{first} would both become"
    refused(sample_py, "in out", pair, "rename one")


@pytest.mark.parametrize("name", ["grid.png", "GRID.PNG"])
@pytest.mark.parametrize("command", ["in Out", "in/{} Out"])
def test_a_picture_that_would_become_the_grid_is_told_to_rename_or_leave_the_grid(
        command, name, sample_py, refused):
    put(COLOUR, f"in/{name}")

    refused(sample_py, command.format(name), f"in/{name}", "--grid 0", "rename one")


def test_one_picture_named_twice_is_one(sample_py, capsys):
    put(COLOUR, "in/a.png")

    assert sample_py("in/a.png in out --grid 0") == 0

    assert capsys.readouterr().out.count("out/a.png") == 1


# --- Checkpoints that are none -------------------------------------------------------------------

def test_a_checkpoint_that_is_not_there_is_named(sample_py, refused):
    put(COLOUR, "in/a.png")

    refused(sample_py, "in out --ckpt none.pt", "none.pt: No such file")


def test_an_empty_checkpoint_is_named(sample_py, refused):
    put(COLOUR, "in/a.png")
    Path("empty.pt").touch()

    refused(sample_py, "in out --ckpt empty.pt", "empty.pt: damaged, or made by other code")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["head.weight", "down1.1.running_var"])
def test_a_weight_that_is_infinite_or_no_number_is_refused(name, value):
    generator = models.UNet(4)
    generator.state_dict()[name].flatten()[0] = value
    torch.save(checkpoint(generator), "g.pt")

    with pytest.raises(data.UsageError, match="g.pt: some weights are infinite or not a number"):
        models.load_generator(Path("g.pt"), CPU)


def test_last_pt_as_a_checkpoint_is_told_what_it_is_and_what_to_name(sample_py, refused):
    make_photos("photos")
    assert train_py(PRE) == 0

    refused(sample_py, "photos out --ckpt runs/last.pt",
            "runs/last.pt: the state of a run, for --resume; name the g.pt beside it")


def test_what_the_unpickler_refused_is_named():
    torch.save(checkpoint(models.UNet(4)) | {"size": Path()}, "g.pt")

    with pytest.raises(data.UsageError, match="g.pt: damaged, or made by other code.*PosixPath"):
        models.load_generator(Path("g.pt"), CPU)


def test_a_weight_of_another_size_is_named():
    torch.save(checkpoint(models.UNet(8)), "g.pt")

    with pytest.raises(data.UsageError, match="g.pt: damaged.*size mismatch for down1.0.weight"):
        models.load_generator(Path("g.pt"), CPU)


# --- Runs that were stopped ----------------------------------------------------------------------

@pytest.fixture
def stop_after(monkeypatch):
    """Call with a file's name: Ctrl-C comes when that file is renamed into place, once."""
    def arm(name):
        replace = os.replace

        def stop(part, path):
            replace(part, path)
            if path.name == name:
                monkeypatch.setattr(os, "replace", replace)
                raise KeyboardInterrupt
        monkeypatch.setattr(os, "replace", stop)
    return arm


def generator_of(path):
    """The weights in a checkpoint that train.py made."""
    return torch.load(path)["generator"]


def figures(out):
    """The log of a run, but for its speed."""
    return [row | {"images_per_s": 0} for row in read_log(out)]


# A run of both phases, in a second.
BOTH = f"{TINY} --pretrain-epochs 1 --epochs 2"


def test_a_part_file_of_a_killed_process_does_not_take_out():
    make_photos("photos")
    Path("runs").mkdir()
    Path("runs/.0123456789abcdef.part").write_bytes(b"half")

    assert train_py(PRE) == 0


def test_g_pt_without_last_pt_is_refused_with_the_remedy(refused):
    make_photos("photos")
    Path("runs").mkdir()
    Path("runs/g.pt").touch()

    refused(train_py, f"{PRE} --resume", "runs has a g.pt, but no last.pt",
            "--init that g.pt into another --out")


@pytest.mark.parametrize("name", ["last.pt", "g.pt"])
def test_a_run_stopped_between_its_files_is_resumed_and_they_are_written_again(name, stop_after):
    make_photos("photos")
    assert train_py(f"{PRE} --out whole") == 0
    stop_after(name)
    assert train_py(f"{PRE} --out stopped") == 130
    assert not Path("stopped/log.csv").exists()

    assert train_py(f"{PRE} --out stopped --resume") == 0

    assert_identical(generator_of("stopped/g.pt"), generator_of("whole/g.pt"))
    assert figures("stopped") == figures("whole")


def test_resume_writes_g_pt_again_from_last_pt_before_it_trains(stop_after):
    make_photos("photos")
    assert train_py(PRE) == 0
    expected = generator_of("runs/g.pt")
    for name in ("runs/g.pt", "runs/log.csv"):
        Path(name).unlink()

    # Stopped at the beginning of WGAN-GP: no epoch of it is saved.
    stop_after("pretrained.pt")
    assert train_py(f"{PRE} --epochs 1 --resume") == 130

    assert_identical(generator_of("runs/g.pt"), expected)
    assert len(read_log()) == 1


def test_a_log_that_cannot_be_written_is_said_and_the_run_goes_on(capsys):
    make_photos("photos")
    # As when a spreadsheet holds it: it cannot be replaced.
    Path("runs/log.csv").mkdir(parents=True)

    assert train_py(f"{BOTH} --resume") == 0

    assert "warning: cannot write runs/log.csv" in capsys.readouterr().err
    assert torch.load("runs/last.pt")["options"]["epoch"] == 3
    assert Path("runs/test.txt").exists()


def test_pretrained_pt_is_what_l1_alone_had_reached():
    make_photos("photos")
    assert train_py(f"{PRE} --out l1") == 0

    assert train_py(f"{BOTH} --out both") == 0

    kept = torch.load("both/pretrained.pt")
    assert_identical(kept["generator"], generator_of("l1/g.pt"))
    assert kept["history"][-1]["epoch"] == 1


def test_pretrained_pt_is_what_init_named_where_there_is_no_l1():
    make_photos("photos")
    assert train_py(f"{PRE} --out first") == 0

    assert train_py(f"{BOTH} --pretrain-epochs 0 --init first/g.pt") == 0

    assert_identical(generator_of("runs/pretrained.pt"), generator_of("first/g.pt"))


@pytest.mark.parametrize("options", ["--pretrain-epochs 0 --epochs 1", "--epochs 0"])
def test_there_is_no_pretrained_pt_of_random_weights_nor_without_wgan_gp(options):
    make_photos("photos")

    assert train_py(f"{PRE} {options}") == 0

    assert not Path("runs/pretrained.pt").exists()


@pytest.mark.parametrize("lost", [True, False])
def test_pretrained_pt_is_the_same_after_a_stop_and_resume(lost, stop_after):
    make_photos("photos")
    stop_after("pretrained.pt")
    assert train_py(BOTH) == 130
    expected = generator_of("runs/pretrained.pt")
    if lost:
        Path("runs/pretrained.pt").unlink()

    assert train_py(f"{BOTH} --resume") == 0

    assert_identical(generator_of("runs/pretrained.pt"), expected)


# --- Slow: processes, and mutated pictures -------------------------------------------------------

def start(script, command):
    """Start a script with its command line, and go on."""
    return subprocess.Popen(
        [sys.executable, HERE / script, *command.split()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def send_after_a_save(number, last, command):
    """Train until last.pt is saved, send a signal, and return what was said, and the status."""
    before = last.stat().st_mtime_ns
    process = start("train.py", command)
    while process.poll() is None and last.stat().st_mtime_ns == before:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate()
    return said, process.returncode


def test_a_run_that_is_killed_and_stopped_resumes_exactly():
    make_photos("photos")
    command = f"{TINY} --pretrain-epochs 2 --resume"
    assert train_py(f"{command} --epochs 8 --out whole") == 0
    # Resumed at a change of phase, and within the second.
    assert train_py(f"{command} --epochs 0 --out stopped") == 0
    assert train_py(f"{command} --epochs 1 --out stopped") == 0
    last = Path("stopped/last.pt")
    command = f"{command} --epochs 8 --out stopped"

    killed = send_after_a_save(signal.SIGKILL, last, command)
    stopped = send_after_a_save(signal.SIGINT, last, command)
    assert train_py(command) == 0

    assert killed == ("", -signal.SIGKILL)
    line = "stopped; --resume goes on from stopped's last save, if any\n"
    assert stopped == (line, 130)
    state = torch.load(last)
    expected = torch.load("whole/last.pt")
    for name in ("generator", "critic", "ema", "optimizer_g", "optimizer_c", "scaler"):
        assert_identical(state[name], expected[name])
    assert figures("stopped") == figures("whole")
    assert len(figures("whole")) == 10


WORKER = """
import os
import sys
from contextlib import redirect_stdout

import torch
import torch.distributed as dist

import data
import train

rank = os.environ["RANK"]
rows = []
batch = data.Photos.batch


def spy(photos, chosen, crop=False, aged=0.0):
    if crop:
        rows.append((chosen.tolist(), torch.initial_seed()))
    return batch(photos, chosen, crop, aged)


class Run(train.Run):
    def check_finite(self, means, epoch):
        # What is transposed is laid out in another order.
        mean = [dist.get_rank() * tensor for tensor in (torch.ones(2), torch.eye(2, 3).T)]
        train.average(mean)
        networks = (self.generator, self.critic, self.ema)
        weights = [list(network.parameters()) for network in networks]
        state = {"weights": weights, "means": means, "mean": mean, "rows": rows}
        torch.save(state, f"{rank}.pt")


data.Photos.batch = spy
train.Run = Run
status = train.main(sys.argv[1:])
with open(f"{rank}.txt", "w") as file, redirect_stdout(file):
    train.main("--eval runs/g.pt --data photos --device cpu".split())
sys.exit(status)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder in which two processes trained together, their states, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    make_photos(folder / "photos")
    (folder / "worker.py").write_text(WORKER)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = f"{torchrun} worker.py {PRE} --epochs 1 --batch-size 14".split()

    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True, text=True, timeout=120)

    assert result.returncode == 0, result.stderr
    return folder, torch.load(folder / "0.pt"), torch.load(folder / "1.pt"), result.stdout


def test_two_processes_stay_bit_identical(two_processes):
    _, first, second, _ = two_processes

    assert_identical(first["weights"], second["weights"])
    assert_identical(first["means"], second["means"])


def test_two_processes_average_tensors_of_every_layout(two_processes):
    _, first, second, _ = two_processes

    expected = [torch.full((2,), 0.5), torch.eye(3, 2) / 2]
    assert_identical(first["mean"], expected)
    assert_identical(second["mean"], expected)


def test_two_processes_share_each_batch_and_crop_it_differently(two_processes, monkeypatch):
    folder, first, second, _ = two_processes
    monkeypatch.chdir(folder)
    train_rows = data.Photos("photos", 32).train

    assert len(first["rows"]) == 2
    for epoch in range(2):
        ours, our_seed = first["rows"][epoch]
        theirs, their_seed = second["rows"][epoch]
        order = np.random.default_rng([0, epoch]).permutation(14)
        assert len(ours) == 7
        assert sorted(ours + theirs) == sorted(train_rows[order].tolist())
        assert our_seed != their_seed


def test_two_processes_decode_and_report_once(two_processes):
    *_, said = two_processes

    assert said.count("decoded into") == 1
    assert said.count("epoch 2 ") == 1


def test_two_processes_print_the_table_of_eval_once(two_processes):
    folder, *_ = two_processes

    first = Path(folder, "0.txt").read_text()
    second = Path(folder, "1.txt").read_text()

    assert first.count("no colour ") == 1
    assert second == ""


def test_a_run_of_two_processes_is_not_resumed_by_one(two_processes, monkeypatch, refused):
    folder, *_ = two_processes
    monkeypatch.chdir(folder)

    command = f"{PRE} --epochs 1 --batch-size 14 --resume"
    refused(train_py, command, "nproc-per-node 1", "has 2")


def test_ctrl_c_leaves_whole_pictures_and_skip_existing_goes_on(ckpt, sample_py, capsys):
    make_photos("in", 150)
    process = start("sample.py", f"--ckpt {ckpt} --device cpu in out")
    assert process.stdout.readline().startswith("out/a/00.png: ")

    process.send_signal(signal.SIGINT)
    _, error = process.communicate()

    assert (process.returncode, error) == (130, "stopped; --skip-existing goes on\n")
    before = tree("out")
    assert 0 < len(before) < 150
    for path in before:
        Image.open(path).load()

    assert sample_py("in out --skip-existing --grid 0") == 0
    said = capsys.readouterr().out
    assert f"{150 - len(before)} colorized " in said
    assert f"{len(before)} done before" in said
    assert len(tree("out")) == 150
    assert before.items() < tree("out").items()


def without_a_console(script, command):
    """Run a script whose standard error is closed, as under pythonw. Returns the exit status."""
    line = f'"{sys.executable}" "{HERE / script}" {command} 2>&-'
    return subprocess.run(line, shell=True, stdout=subprocess.DEVNULL).returncode


def test_without_a_console_all_pictures_are_colorized(ckpt):
    make_photos("in", 12)
    Path("in/a/00.png").write_bytes(b"broken")

    assert without_a_console("sample.py", f"--ckpt {ckpt} --device cpu in out --grid 0") == 1

    assert len(tree("out")) == 11


def test_without_a_console_a_run_trains():
    make_photos("photos")

    assert without_a_console("train.py", PRE) == 0

    assert Path("runs/g.pt").exists()


def mutated(blob, rng, other):
    """A file with flipped bits, and perhaps cut, or gone on as another."""
    blob = bytearray(blob)
    place = rng.randrange(len(blob))
    start_of_other = rng.randrange(len(other))
    for _ in range(rng.choice((1, 4, 30))):
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    tail = rng.choice((blob[place:], b"", other[start_of_other:]))
    return blob[:place] + tail


def test_mutated_files_are_colorized_or_named(sample_py, capsys):
    rng = random.Random(0)
    count = int(os.environ.get("MUTATIONS", 300))
    formats = ("png", "jpeg", "tiff", "bmp", "webp", "gif")
    files = {format: saved(COLOUR, format) for format in formats}
    Path("in").mkdir()
    for i in range(count):
        format = rng.choice(formats)
        other = files[rng.choice(formats)]
        Path("in", f"{i:05}.{format}").write_bytes(mutated(files[format], rng, other))

    assert sample_py("in out --grid 0") == 1

    lines = capsys.readouterr().err.splitlines()
    named = {line.split(": not colorized: ")[0] for line in lines}
    written = {path for path in tree("in") if result_of(Path(), path.removeprefix("in/")).exists()}
    assert named | written == tree("in").keys()
    assert not named & written
    # Of both many: neither is everything broken, nor is everything taken.
    assert min(len(named), len(written)) > count / 10
