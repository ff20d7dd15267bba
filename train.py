"""Train the colorizer: L1 pre-training, then WGAN-GP; or evaluate a checkpoint.

    python train.py --epochs 110 --size 128
    torchrun --nproc-per-node 2 train.py --epochs 110 --size 128
    python train.py --eval g.pt

Isola et al. 2018, pix2pix (arXiv:1611.07004): the patch critic, and L1 beside it. Gulrajani et al.
2017, Improved Training of Wasserstein GANs (arXiv:1704.00028): the loss and its penalty.
"""
import os
import signal
if __name__ == "__main__":  # before torch is imported, which takes seconds
    if "OMP_WAIT_POLICY" not in os.environ:  # waiting threads sleep sooner: README, Speed
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C meanwhile: no traceback
import argparse
import copy
import csv
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from skimage.metrics import structural_similarity
from torchvision.utils import save_image

from data import (
    DEFAULT_DATA, Parser, Photos, UsageError, denormalize, lab_to_rgb, live, number, replacing,
    run_command, say,
)
from models import (
    PatchCritic, UNet, load_checkpoint, load_generator, misfit, pick_device, to_device,
)

SAVE_SECONDS = 30  # between two saves: a save writes 642 MB at width 64
# What may differ from the run that --resume goes on with.
MAY_DIFFER = {"data", "device", "epochs", "eval", "init", "out", "resume", "sample_every"}


# --- Losses --------------------------------------------------------------------------------------

def score(critic, L, ab):
    """One score an image, (N,): the mean of the critic's map.

    L: (N, 1, H, W), ab: (N, 2, H, W), both in [-1, 1]. The same definition in the losses and in
    the penalty, since the mean's gradient is smaller than the sum's by the size of the map.
    """
    return critic(torch.cat([L, ab], 1)).float().mean((1, 2, 3))


def generator_loss(l1, fake_score, lambda_l1):
    """lambda_l1 * L1 - E[score of the colorized]: near the photograph, and real to the critic.

    l1: mean absolute error of ab / 110; fake_score: (N,).
    """
    return lambda_l1 * l1 - fake_score.mean()


def critic_loss(real_score, fake_score):
    """E[score of the colorized] - E[score of the real] (Gulrajani et al. 2017, eq. 3, first part).

    Minus this is the critic's estimate of the Wasserstein distance.
    """
    return fake_score.mean() - real_score.mean()


def gradient_penalty(critic, L, real_ab, fake_ab):
    """E[(||d score / d ab|| - 1)^2] between real and colorized (Gulrajani et al. 2017, eq. 3).

    L: (N, 1, H, W); real_ab, fake_ab: (N, 2, H, W). One random mix an image; the L2 norm is over
    the image's whole gradient. L is the condition, the same in both, so the line between a real and
    a colorized picture varies in ab alone, and the gradient is taken there.
    Outside autocast: a second-order gradient loses too much in 16 bits. (On a GPU cuDNN computes
    convolutions of float32 in TF32, of 10 bits, unless told otherwise.)
    """
    with torch.autocast(L.device.type, enabled=False):
        epsilon = torch.rand(len(L), 1, 1, 1, device=L.device)
        mixed = torch.lerp(fake_ab.float(), real_ab, epsilon).requires_grad_()
        total = score(critic, L, mixed).sum()
        (gradient,) = torch.autograd.grad(total, mixed, create_graph=True)
        # vector_norm's gradient at 0 is 0, where that of sqrt(sum(g ** 2)) is NaN.
        norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return ((norm - 1) ** 2).mean()


# --- Steps ---------------------------------------------------------------------------------------

def average(tensors):
    """Average each tensor, in place, over the processes of torchrun; a single one keeps its own.

    Of gradients too, since DistributedDataParallel does not support the penalty's double backward.
    """
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def step(network, optimizer, loss, scaler):
    """Update one network by one loss. The scaler, enabled for float16 alone, skips overflows."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    average(p.grad for p in network.parameters())
    scaler.step(optimizer)
    scaler.update()


@torch.no_grad()
def update_ema(ema, generator, updates, decay):
    """Move ema, batch-norm statistics included, towards generator.

    The decay warms up (as in TensorFlow's ExponentialMovingAverage), so that a short run does not
    evaluate its initial weights.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    for mean, value in zip(ema.state_dict().values(), generator.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)


def pretrain_step(run, L, ab):
    """One L1 step of the generator. Returns its terms."""
    with run.autocast():
        l1 = (run.generator(L) - ab).abs().mean()
    step(run.generator, run.optimizer_g, l1, run.scaler)
    return {"l1": l1.detach()}


def adversarial_step(run, L, ab):
    """Critic steps, then generator steps, on one batch. Returns the terms of the last of each."""
    args = run.args
    with run.autocast():
        fake_ab = run.generator(L)
    for _ in range(args.critic_steps):
        with run.autocast():
            # Detached: the critic's step must not reach the generator.
            loss = critic_loss(score(run.critic, L, ab), score(run.critic, L, fake_ab.detach()))
        penalty = gradient_penalty(run.critic, L, ab, fake_ab.detach())
        # One backward for both: the penalty alone leaves the last bias without a gradient.
        step(run.critic, run.optimizer_c, loss + args.lambda_gp * penalty, run.scaler)

    run.critic.requires_grad_(False)  # saves the critic's own gradients
    for i in range(args.generator_steps):
        with run.autocast():
            if i > 0:  # the first step's is the critic's: the generator has not changed since
                fake_ab = run.generator(L)
            l1, fake_score = (fake_ab - ab).abs().mean(), score(run.critic, L, fake_ab)
            objective = generator_loss(l1, fake_score, args.lambda_l1)
        step(run.generator, run.optimizer_g, objective, run.scaler)
    run.critic.requires_grad_(True)
    terms = {"l1": l1, "adversarial": -fake_score.mean(), "wasserstein": -loss, "penalty": penalty}
    return {name: term.detach() for name, term in terms.items()}


def learning_rate(args, epoch):
    """Learning rate at a time counted in epochs, fractions included.

    Pre-training: a warm-up over its first tenth, then a half cosine to 0 (Loshchilov and Hutter
    2017). Adversarial phase: constant, so that a longer run is the same run, gone on.
    """
    if epoch >= args.pretrain_epochs:
        return args.lr
    done = epoch / args.pretrain_epochs
    return args.pretrain_lr * min(done / 0.1, 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9))


# --- Evaluation ----------------------------------------------------------------------------------

def to_uint8(L, ab):
    """L and ab as networks see them, to RGB (N, 3, H, W) uint8."""
    return (lab_to_rgb(denormalize(L, ab.float())) * 255).round().byte()


def colourfulness(images):
    """Colourfulness of pictures (N, 3, H, W) uint8: Hasler and Suesstrunk 2003, section 5.

    Returns (N,): 0 is grey, 109 extremely colourful.
    """
    r, g, b = images.float().flatten(2).unbind(1)
    rg, yb = r - g, (r + g) / 2 - b
    return torch.hypot(rg.std(1), yb.std(1)) + 0.3 * torch.hypot(rg.mean(1), yb.mean(1))


def chunks(photos, rows):
    """Rows in pieces that take as much memory as 64 images of 128 x 128."""
    return rows.split(max(1, 64 * 128**2 // photos.size**2))


@torch.no_grad()
def evaluate(predict, photos, rows, ssim=False):
    """Figures of every image: PSNR (dB, 8-bit RGB), colourfulness and, if asked for, SSIM.

    predict: from L (N, 1, H, W) and the real ab (N, 2, H, W) to the ab that is judged. Returns a
    dict of tensors (N,). An image identical to the real one counts as 100 dB, just above what one
    level off makes.
    """
    figures = []
    for chunk in chunks(photos, rows):
        L, ab = photos.batch(chunk)
        fake, real = to_uint8(L, predict(L, ab)), to_uint8(L, ab)
        error = (fake.float() - real.float()).square().mean((1, 2, 3))
        figures.append({"psnr": (10 * torch.log10(255**2 / error)).clamp_max(100),
                        "colourfulness": colourfulness(fake)})
        if ssim:
            pairs = zip(fake.cpu().numpy(), real.cpu().numpy())
            figures[-1]["ssim"] = torch.tensor(
                [structural_similarity(*pair, channel_axis=0) for pair in pairs])
    return {name: torch.cat([part[name] for part in figures]).cpu() for name in figures[0]}


@torch.no_grad()
def save_picture(generator, photos, rows, path):
    """Draw the images of these rows below each other: grey, colorized and real."""
    L, ab = photos.batch(rows)
    lines = [to_uint8(L, colour) for colour in (torch.zeros_like(ab), generator(L), ab)]
    with replacing(path) as part:
        save_image(torch.cat(lines) / 255, part, nrow=len(rows), format="png")


def report(args, path, device, photos=None):
    """Print the table of a generator on its test part; keep it, and eight pictures, in --out.

    photos: what it was trained on, where that is at hand; otherwise read from --data.
    """
    generator, info = load_generator(path, device)
    photos = photos or Photos(args.data, info["size"], info["seed"], device)
    theirs, ours = info["test_means"], torch.tensor(photos.test_means)
    known = theirs.shape == ours.shape and (theirs - ours).abs().mean() < 2  # of 255
    if not known:
        say("warning: these are not the images that the checkpoint was made with: those it was "
            "trained on may be among the ones tested here")
    rows = photos.train
    total = sum(photos.batch(chunk)[1].mean((2, 3)).sum(0) for chunk in chunks(photos, rows))
    mean_ab = (total / len(rows))[None, :, None, None]
    predictors = {
        "no colour": lambda L, ab: torch.zeros_like(ab),
        "mean colour of the training part": lambda L, ab: mean_ab.expand_as(ab),
        f"generator, epoch {info['epoch']}": lambda L, ab: generator(L),
        "real": lambda L, ab: ab,
    }
    title = f"{len(photos.test)} test images at {info['size']} x {info['size']}"
    lines = [f"{path}: " + ", ".join(f"{name} {value}" for name, value in info["options"].items()),
             f"{title:34} PSNR dB   SSIM  colourfulness  worse than no colour"]
    for name, predict in predictors.items():
        figures = evaluate(predict, photos, photos.test, ssim=True)
        grey = figures["psnr"] if name == "no colour" else grey
        means = {key: values.mean().item() for key, values in figures.items()}
        worse = (figures["psnr"] < grey).float().mean().item()
        lines.append("{:34} {psnr:7.2f}  {ssim:.3f}  {colourfulness:13.1f}  {worse:20.0%}".format(
            name, worse=worse, **means))
    if args.data == "demo" and known:
        lines.append("demo: the parts overlap, so these figures show that it learns, not how well")
    for line in lines:
        say(line)
    with replacing(args.out / "test.txt") as part:
        part.write_text("\n".join(lines) + "\n", errors="backslashreplace")
    save_picture(generator, photos, photos.test[:8], args.out / "test.png")


# --- Checkpoints ---------------------------------------------------------------------------------

class Run:
    """All that training changes: networks, optimizers, moving average, scaler, epoch and log."""

    STATEFUL = ("generator", "critic", "ema", "optimizer_g", "optimizer_c", "scaler")

    def __init__(self, args, device):
        self.args, self.device = args, device
        torch.manual_seed(args.seed)
        self.generator = to_device(UNet(args.width), device)
        self.critic = to_device(PatchCritic(args.width), device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), betas=(0.5, 0.9))
        self.optimizer_c = torch.optim.Adam(self.critic.parameters(), betas=(0.5, 0.9))
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.epoch, self.log, self.saved = 0, [], -math.inf

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def options(self):
        """The options that the result depends on, as plain types."""
        return {name: value for name, value in vars(self.args).items() if name not in MAY_DIFFER}

    def start_from(self, path):
        """Begin with the generator of another run's g.pt. Raises UsageError for another width."""
        generator, info = load_generator(path, self.device)
        width = generator.head.in_channels
        if width != self.args.width:
            raise UsageError(f"--width {self.args.width}: --init {path} has width {width}; take "
                             "that")
        for network in (self.generator, self.ema):
            network.load_state_dict(generator.state_dict())

    def check_finite(self, means, epoch):
        """Raise FloatingPointError for terms that are not finite, or weights beyond float16."""
        weights = [*self.generator.parameters(), *self.critic.parameters()]
        if not (all(map(math.isfinite, means.values()))
                and all(weight.half().isfinite().all() for weight in weights)):  # as in g.pt
            raise FloatingPointError(f"epoch {epoch + 1} diverged ({means}); nothing of it was "
                                     "saved; try a lower --lr or --pretrain-lr")

    def save(self, photos):
        """Write g.pt, log.csv and, last, last.pt: a kill in between repeats the epochs since."""
        out = self.args.out
        weights = {name: value.half() if value.ndim > 1 else value  # statistics may pass 65504
                   for name, value in self.ema.state_dict().items()}
        with replacing(out / "g.pt") as part:
            torch.save({"generator": weights, "size": self.args.size, "seed": self.args.seed,
                        "epoch": self.epoch, "options": self.options(),
                        "test_means": photos.test_means}, part)
        with replacing(out / "log.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.log[-1])
            writer.writeheader()
            writer.writerows(self.log)
        state = {name: getattr(self, name).state_dict() for name in self.STATEFUL}
        with replacing(out / "last.pt") as part:
            torch.save(state | {"options": self.options(), "contents": photos.contents,
                                "epoch": self.epoch, "log": self.log}, part)
        self.saved = time.monotonic()

    def load(self, path):
        """Go on from last.pt. Returns the digest of the images that it was trained on.

        Raises UsageError where an option differs, or the networks of a changed models.py.
        """
        checkpoint = load_checkpoint(path, "optimizer_g")
        try:
            saved, contents = dict(checkpoint["options"]), checkpoint["contents"]
            self.epoch, self.log = int(checkpoint["epoch"]), list(checkpoint["log"])
            for name, value in self.options().items():
                if saved[name] != value:
                    flag = "torchrun --nproc-per-node" if name == "processes" else f"--{name}"
                    raise UsageError(f"{flag.replace('_', '-')} {value}: the run in {path.parent} "
                                     f"has {saved[name]}; resume with that, or start another --out")
            for name in self.STATEFUL:
                getattr(self, name).load_state_dict(checkpoint[name])
            for optimizer in (self.optimizer_g, self.optimizer_c):  # which does not look at shapes
                if any(s["exp_avg"].shape != p.shape for p, s in optimizer.state.items()):
                    raise ValueError("moments of another shape")
        except UsageError:
            raise
        except Exception as error:
            raise misfit(path, error) from error
        done, epochs = self.epoch - self.args.pretrain_epochs, self.args.epochs
        if done > epochs:
            raise UsageError(f"--epochs {epochs}: the run in {path.parent} has done {done}; ask "
                             "for as many or more")
        return contents


# --- Command line --------------------------------------------------------------------------------

def parse_args(argv=None):
    """The options as a namespace; a wrong one ends the program with one line and status 2."""
    parser = Parser("train.py", "python train.py [options]", __doc__, formatter_class=Parser.Help)
    add = parser.add_argument
    add("--data", default=DEFAULT_DATA, metavar="DIR", help="folder of images; where the default "
        "does not exist, Flowers102 is downloaded into it; demo: crops of scikit-image's pictures")
    add("--size", type=number(int, 32, 1024), default=128, help="side in pixels, a multiple of 16")
    add("--width", type=number(int, 1, 512), default=64,
        help="channels of the first block of both networks (U-Net and PatchGAN: 64)")
    add("--batch-size", type=number(int, 1), default=32, help="images a step, over all processes")
    add("--pretrain-epochs", type=number(int, 0), default=100, help="epochs of L1 alone")
    add("--epochs", type=number(int, 0), default=110, help="epochs of WGAN-GP after that")
    add("--critic-steps", type=number(int, 1), default=1,
        help="critic steps a batch (WGAN-GP: 5, each on a batch of its own)")
    add("--generator-steps", type=number(int, 1), default=2,
        help="generator steps a batch (WGAN-GP: 1)")
    add("--lambda-l1", type=number(float, 0), default=300.0,
        help="weight of the L1 loss, of ab / 110 (pix2pix: 100)")
    add("--lambda-gp", type=number(float, 0), default=10.0,
        help="weight of the gradient penalty (WGAN-GP: 10)")
    add("--pretrain-lr", type=number(float, 0), default=1e-3,
        help="highest learning rate of pre-training: a warm-up, then a half cosine to 0")
    add("--lr", type=number(float, 0), default=1e-4,
        help="learning rate of the adversarial phase, constant (WGAN-GP: 1e-4)")
    add("--ema", type=number(float, 0, 1), default=0.999,
        help="decay, a batch, of the weights' moving average; 0 for none")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="16-bit arithmetic; auto: what the CUDA device has, elsewhere off")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the split and of training")
    add("--sample-every", type=number(int, 1), default=5, metavar="EPOCHS",
        help="epochs between pictures in OUT")
    add("--out", type=Path, default=Path("runs"), help="folder for everything that is written")
    add("--init", type=Path, metavar="CKPT",
        help="start from this g.pt, of the same width, at any size and with any photographs")
    add("--resume", action="store_true", help="go on from OUT/last.pt where there is one")
    add("--eval", type=Path, metavar="CKPT",
        help="evaluate this generator on the test part of --data, at its own size and seed")
    args = parser.parse_args(argv)
    if args.size % 16:
        parser.error(f"argument --size: must be a multiple of 16, not {args.size}")
    if args.pretrain_epochs + args.epochs == 0:
        parser.error("argument --epochs: 0, and --pretrain-epochs 0: nothing to train")
    if args.data != "demo" and args.out.resolve().is_relative_to(Path(args.data).resolve()):
        parser.error(f"--out {args.out}: lies in --data {args.data}, where its pictures would be "
                     "taken for photographs; name another")
    return args


# --- Training ------------------------------------------------------------------------------------

def join_processes(args):
    """Join the processes of torchrun, if it started this one. Returns the device and the rank.

    Resolves --amp auto, since a run goes on with what it began with, and notes the number of
    processes among the options.
    """
    launched = dist.is_torchelastic_launched()
    if launched and args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    if args.amp == "auto":  # a T4 emulates bfloat16, slowly
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if cuda else "off"
    args.processes = 1
    if launched:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1),  # to decode
                                device_id=device if cuda else None)
        args.processes = dist.get_world_size()
    return device, dist.get_rank() if launched else 0


def load_photos(args, device, epoch):
    """The photographs. The first process of each machine decodes, then the others read its cache.

    Raises UsageError for a batch that does not fit them or the processes, and where these do not
    see the same images, or not the same last.pt.
    """
    if args.batch_size % args.processes:
        raise UsageError(f"--batch-size {args.batch_size}: not a multiple of {args.processes} "
                         "processes")
    first = args.processes == 1 or os.environ["LOCAL_RANK"] == "0"
    if not first:
        dist.barrier()
    photos = Photos(args.data, args.size, args.seed, device)
    if args.processes > 1:
        if first:
            dist.barrier()
        seen = [None] * args.processes
        dist.all_gather_object(seen, (photos.contents, epoch))
        if len(set(seen)) > 1:
            raise UsageError(f"--data {args.data}, --out {args.out}: not the same images, or not "
                             "the same last.pt, on all machines")
    if args.batch_size > len(photos.train):
        raise UsageError(f"--batch-size {args.batch_size}: more than the {len(photos.train)} "
                         "training images; lower it to that or less")
    return photos


def open_out(args, photos):
    """Take --out for this run: log.csv, made exclusively, is the mark. Print what begins."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        open(args.out / "log.csv", "a" if args.resume else "x").close()
    except OSError as error:
        raise UsageError(f"--out {args.out}: {error.strerror} ({error.filename}); go on with "
                         "--resume, or name another folder") from error
    if args.resume and not (args.out / "last.pt").exists():
        say(f"--resume: no {args.out / 'last.pt'}, starting afresh")
    say(", ".join(f"{name} {value}" for name, value in vars(args).items()))
    say(f"{len(photos.train)} training, {len(photos.val)} validation and {len(photos.test)} test "
        f"images, on {photos.device}")


def finish_epoch(run, photos, means, start):
    """Evaluate, log, print a line, draw and save. On one process alone."""
    args, total = run.args, run.args.pretrain_epochs + run.args.epochs
    images = len(photos.train) // args.batch_size * args.batch_size
    rate = images / (time.perf_counter() - start)
    figures = evaluate(lambda L, ab: run.ema(L), photos, photos.val)
    val = {f"val_{name}": values.mean().item() for name, values in figures.items()}
    seconds = time.perf_counter() - start
    phase = "pretrain" if run.epoch <= args.pretrain_epochs else "wgan-gp"
    terms = dict.fromkeys(("l1", "adversarial", "wasserstein", "penalty")) | means
    run.log.append({"epoch": run.epoch, "phase": phase} | terms | val
                   | {"images_per_s": rate, "seconds": seconds})

    # A batch of WGAN-GP takes about as long as so many steps of L1.
    cost = [1] * args.pretrain_epochs + [args.critic_steps + args.generator_steps] * args.epochs
    left = sum(cost[run.epoch:]) / cost[run.epoch - 1] * seconds / 60
    losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    say(f"epoch {run.epoch}/{total} {phase}  {losses}  val {val['val_psnr']:.2f} dB, colourfulness "
        f"{val['val_colourfulness']:.1f}  {rate:.0f} images/s, {left:.0f} min left")
    if run.epoch % args.sample_every == 0 or run.epoch == total:
        save_picture(run.ema, photos, photos.val[:8], args.out / f"epoch-{run.epoch:04}.png")
    if run.epoch == total or time.monotonic() - run.saved >= SAVE_SECONDS:
        run.save(photos)


def train(args):
    """Train by the options, and report on the result."""
    # Setup
    for name in ("log.csv", "last.pt", "g.pt"):
        if (args.out / name).exists() and not args.resume:
            raise UsageError(f"--out {args.out}: holds the {name} of a run; --resume goes on with "
                             "it, or name another")
    device, rank = join_processes(args)
    torch.backends.cudnn.benchmark = True
    run, last, contents = Run(args, device), args.out / "last.pt", None
    if last.exists():  # and --resume
        contents = run.load(last)
    elif args.init:
        run.start_from(args.init)

    # Data
    photos = load_photos(args, device, run.epoch)
    if contents not in (None, photos.contents):
        raise UsageError(f"--data {args.data}: not the images that the run in {args.out} was "
                         "trained on")
    if rank == 0:
        open_out(args, photos)

    # Loop. All that is random follows from (seed, epoch): a resumed run needs no generator's state.
    batch, steps = args.batch_size, len(photos.train) // args.batch_size
    for epoch in range(run.epoch, args.pretrain_epochs + args.epochs):
        rng = np.random.default_rng([args.seed, epoch])  # the same on all processes
        rows = photos.train[rng.permutation(len(photos.train))]
        torch.manual_seed(int(rng.integers(2**32)) + rank)  # crops and mixes: their own on each
        history, start = [], time.perf_counter()
        for i in range(steps):
            for optimizer in (run.optimizer_g, run.optimizer_c):
                optimizer.param_groups[0]["lr"] = learning_rate(args, epoch + (i + 0.5) / steps)
            chosen = rows[i * batch : (i + 1) * batch][rank :: args.processes]
            L, ab = photos.batch(chosen, crop=True)
            if epoch < args.pretrain_epochs:
                terms = pretrain_step(run, L, ab)
            else:
                terms = adversarial_step(run, L, ab)
            history.append(terms)  # on the device: no step waits for it
            update_ema(run.ema, run.generator, epoch * steps + i, args.ema)
            if rank == 0:
                rate = (i + 1) * batch / (time.perf_counter() - start)
                live(f"epoch {epoch + 1}: step {i + 1}/{steps}, {rate:.0f} images/s, "
                     f"{(steps - i - 1) * batch / rate:.0f} s left in it")
        means = {name: torch.stack([t[name] for t in history]).mean() for name in history[0]}
        average(means.values())
        means = {name: mean.item() for name, mean in means.items()}  # waits for the device
        run.check_finite(means, epoch)
        run.epoch = epoch + 1
        if rank == 0:
            finish_epoch(run, photos, means, start)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        report(args, args.out / "g.pt", device, photos)


def main(argv=None):
    """Run the command line. Returns the exit status: 0, 1 (failed), 2 (usage) or 130 (stopped)."""
    args = parse_args(argv)
    if args.eval:
        return run_command("train.py", lambda: report(args, args.eval, pick_device(args.device)))
    return run_command("train.py", lambda: train(args),
                       stopped=f"; --resume goes on from the last save in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
