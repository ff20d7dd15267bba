"""Train the colorizer: L1 pre-training, then WGAN-GP; or evaluate a checkpoint.

    python train.py --epochs 110 --size 128
    torchrun --nproc-per-node 2 train.py --epochs 110 --size 128
    python train.py --eval g.pt

Isola et al. 2018, pix2pix (arXiv:1611.07004): the patch critic, and L1 beside it. Gulrajani et al.
2017, Improved Training of Wasserstein GANs (arXiv:1704.00028): the loss and its penalty.
"""
import argparse
import copy
import csv
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.utils import save_image

from data import Photos, UsageError, denormalize, lab_to_rgb, live, replacing
from models import PatchCritic, UNet, load_checkpoint, load_generator, pick_device

TERMS = ("l1", "adversarial", "wasserstein", "penalty")  # logged; pre-training has the first alone
MAY_DIFFER = {"data", "device", "epochs", "eval", "init", "out", "resume", "sample_every"}


# ---------------------------------------------------------------------------------------------
# Losses

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
    In float32 also under autocast: the second-order gradient is too small for 16 bits.
    """
    with torch.autocast(L.device.type, enabled=False):
        epsilon = torch.rand(len(L), 1, 1, 1, device=L.device)
        mixed = torch.lerp(fake_ab.float(), real_ab, epsilon).requires_grad_()
        total = score(critic, L, mixed).sum()
        (gradient,) = torch.autograd.grad(total, mixed, create_graph=True)
        # vector_norm's gradient at 0 is 0, where that of sqrt(sum(g ** 2)) is NaN.
        norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return ((norm - 1) ** 2).mean()


# ---------------------------------------------------------------------------------------------
# Steps

def average_gradients(network):
    """Average the gradients over the processes of torchrun; a single process keeps its own.

    By hand rather than DistributedDataParallel, which does not support the penalty's double
    backward.
    """
    if dist.is_initialized():
        gradients = [p.grad for p in network.parameters()]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


def step(network, optimizer, loss, scaler):
    """Update one network by one loss. The scaler, enabled for float16 alone, skips overflows."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    average_gradients(network)
    scaler.step(optimizer)
    scaler.update()


@torch.no_grad()
def update_ema(ema, generator, updates, decay):
    """Move ema, batch-norm statistics included, towards generator.

    The decay warms up (as in TensorFlow's ExponentialMovingAverage), so that a short run does not
    evaluate its initial weights.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    pairs = zip(ema.state_dict().values(), generator.state_dict().values())
    averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    torch._foreach_lerp_(averages, values, 1 - decay)


def pretrain_step(run, L, ab):
    """One L1 step of the generator. Returns its terms."""
    with run.autocast():
        l1 = (run.generator(L) - ab).abs().mean()
    step(run.generator, run.optimizer_g, l1, run.scaler)
    return [l1]


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
    return [l1, -fake_score.mean(), -loss, penalty]


def learning_rate(args, epoch):
    """Learning rate at a time counted in epochs, fractions included.

    Pre-training: a warm-up over its first tenth, then a half cosine to 0 (Loshchilov and Hutter
    2017). Adversarial phase: constant, so that a longer run is the same run, gone on.
    """
    if epoch >= args.pretrain_epochs:
        return args.lr
    done = epoch / args.pretrain_epochs
    return args.pretrain_lr * min(done / 0.1, 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9))


def train_epoch(run, photos, epoch):
    """Train through the training part once. Returns the terms, (steps, 1 or 4), and images/s.

    All that is random follows from (seed, epoch), so a resumed run needs no generator's state.
    """
    args, size = run.args, run.args.batch_size
    train_step = pretrain_step if epoch < args.pretrain_epochs else adversarial_step
    rng = np.random.default_rng([args.seed, epoch])  # the same on all processes
    rows = photos.train[rng.permutation(len(photos.train))]
    torch.manual_seed(int(rng.integers(2**32)) + run.rank)  # crops and mixes: their own on each

    run.generator.train()
    steps, terms, start = len(rows) // size, [], time.perf_counter()
    for i in range(steps):
        for optimizer in (run.optimizer_g, run.optimizer_c):
            optimizer.param_groups[0]["lr"] = learning_rate(args, epoch + (i + 0.5) / steps)
        batch = rows[i * size : (i + 1) * size][run.rank :: run.processes]
        L, ab = photos.batch(batch, run.device, crop=True)
        terms.append(torch.stack(train_step(run, L, ab)).detach())  # no step waits for the device
        update_ema(run.ema, run.generator, epoch * steps + i, args.ema)
        if run.rank == 0:
            rate = (i + 1) * size / (time.perf_counter() - start)
            live(f"epoch {epoch + 1}: step {i + 1}/{steps}, {rate:.0f} images/s")
    terms = torch.stack(terms)
    if dist.is_initialized():
        dist.all_reduce(terms)
        terms /= run.processes
    terms = terms.cpu()  # waits for the device, once an epoch
    return terms, steps * size / (time.perf_counter() - start)


def check_finite(run, terms, epoch):
    """Raise FloatingPointError, naming the step and the term, where training has diverged."""
    remedy = "nothing of this epoch was saved; try a lower --lr or --pretrain-lr"
    for i, name in (~terms.isfinite()).nonzero()[:1].tolist():
        raise FloatingPointError(f"epoch {epoch + 1}, step {i + 1} of {len(terms)}: "
                                 f"{TERMS[name]} is {terms[i, name]}; {remedy}")
    for network in (run.generator, run.critic):  # the last step's update has had no loss yet
        if not all(p.isfinite().all() for p in network.parameters()):
            raise FloatingPointError(f"epoch {epoch + 1}, step {len(terms)} of {len(terms)}: "
                                     f"weights of {type(network).__name__}; {remedy}")


# ---------------------------------------------------------------------------------------------
# Evaluation

def to_uint8(L, ab):
    """L and ab as networks see them, to (N, H, W, 3) uint8 RGB on the CPU."""
    rgb = lab_to_rgb(denormalize(L, ab.float()))
    return (rgb * 255).round().byte().permute(0, 2, 3, 1).cpu()


def colourfulness(images):
    """Colourfulness of pictures (N, H, W, 3) uint8: Hasler and Suesstrunk 2003, section 5.

    Returns (N,): 0 is grey, 109 extremely colourful.
    """
    r, g, b = images.float().flatten(1, 2).unbind(2)
    rg, yb = r - g, (r + g) / 2 - b
    return torch.hypot(rg.std(1), yb.std(1)) + 0.3 * torch.hypot(rg.mean(1), yb.mean(1))


@torch.no_grad()
def evaluate(predict, photos, rows, device, ssim=False):
    """Means over the images of PSNR (dB, 8-bit RGB), colourfulness and, if asked for, SSIM.

    predict: from L (N, 1, H, W) and the real ab (N, 2, H, W) to the ab that is judged.
    A picture identical to the real one counts as 100 dB, just above what one level off makes.
    """
    metrics = []
    for chunk in rows.split(64):
        L, ab = photos.batch(chunk, device)
        fakes, reals = to_uint8(L, predict(L, ab)), to_uint8(L, ab)
        for fake, real, colour in zip(fakes.numpy(), reals.numpy(), colourfulness(fakes).tolist()):
            with np.errstate(divide="ignore"):
                psnr = min(100.0, peak_signal_noise_ratio(real, fake))
            metrics.append((psnr, colour))
            if ssim:
                metrics[-1] += (structural_similarity(real, fake, channel_axis=2),)
    return dict(zip(("psnr", "colourfulness", "ssim"), np.mean(metrics, 0).tolist()))


def print_table(path, data, device):
    """Evaluate the generator in path on the test part of the split that it was trained with."""
    generator, info = load_generator(path, device, flag="--eval")
    photos = Photos(data, info["size"], info["seed"])
    if photos.test_digest != info["test_digest"]:
        print("warning: these are not the images that the checkpoint was trained on: its training "
              "images may be among the ones tested here")
    total = sum(photos.batch(chunk, device)[1].mean((2, 3)).sum(0)
                for chunk in photos.train.split(64))
    mean_ab = (total / len(photos.train))[None, :, None, None]
    predictors = {
        "no colour": lambda L, ab: torch.zeros_like(ab),
        "mean colour of the training part": lambda L, ab: mean_ab.expand_as(ab),
        f"generator, epoch {info['epoch']}": lambda L, ab: generator(L),
        "real": lambda L, ab: ab,
    }
    title = f"{len(photos.test)} test images at {info['size']} x {info['size']}"
    print(f"{title:34} PSNR dB   SSIM  colourfulness")
    for name, predict in predictors.items():
        means = evaluate(predict, photos, photos.test, device, ssim=True)
        print("{:34} {psnr:7.2f}  {ssim:.3f}  {colourfulness:13.1f}".format(name, **means))
    if data == "demo":
        print("demo: the parts overlap, so these figures show that it learns, not how well")


# ---------------------------------------------------------------------------------------------
# Checkpoints

class Run:
    """All that training changes, and where it runs: networks, optimizers, EMA, scaler, log."""

    STATEFUL = ("generator", "critic", "ema", "optimizer_g", "optimizer_c", "scaler")

    def __init__(self, args, device, rank=0, processes=1):
        self.args, self.device, self.rank, self.processes = args, device, rank, processes
        torch.manual_seed(args.seed)
        layout = dict(device=device, memory_format=torch.channels_last)
        self.generator = UNet(args.width).to(**layout)
        self.critic = PatchCritic(args.width).to(**layout)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        adam = dict(lr=args.lr, betas=(0.5, 0.9), fused=device.type == "cuda")
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), **adam)
        self.optimizer_c = torch.optim.Adam(self.critic.parameters(), **adam)
        self.dtype = amp_dtype(args.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.epoch, self.log = 0, []
        if args.compile:
            self.generator.compile()  # in place: the state's keys stay as they are

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def options(self):
        """The options that the result depends on, as plain types."""
        options = {k: v for k, v in vars(self.args).items() if k not in MAY_DIFFER}
        return options | {"processes": self.processes}

    def save(self, photos):
        """Write g.pt, log.csv and, last, last.pt: a kill in between repeats the epoch."""
        out, args = self.args.out, self.args
        weights = {name: value.half() if value.is_floating_point() else value
                   for name, value in self.ema.state_dict().items()}
        save(out / "g.pt", {
            "generator": weights, "width": args.width, "size": args.size, "seed": args.seed,
            "epoch": self.epoch, "test_digest": photos.test_digest, "metrics": self.log[-1],
            "options": self.options(),
        })
        with replacing(out / "log.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.log[-1])
            writer.writeheader()
            writer.writerows(self.log)
        state = {name: getattr(self, name).state_dict() for name in self.STATEFUL}
        save(out / "last.pt", state | {
            "options": self.options(), "contents": photos.contents, "epoch": self.epoch,
            "log": self.log,
        })

    def start_from(self, generator, info):
        """Begin with another run's generator. Raises UsageError where its width is not --width."""
        if info["width"] != self.args.width:
            raise UsageError(f"--width {self.args.width}: the generator in --init "
                             f"{self.args.init} has --width {info['width']}")
        for network in (self.generator, self.ema):
            network.load_state_dict(generator.state_dict())

    def load(self, checkpoint, photos):
        """Go on from last.pt. Raises UsageError where an option or the data differ."""
        for name, value in self.options().items():
            saved = checkpoint["options"].get(name)
            if value != saved:
                flag = f"--{name.replace('_', '-')}"
                flag = "torchrun --nproc-per-node" if name == "processes" else flag
                raise UsageError(f"{flag} {value}: the run in {self.args.out} has {saved}; "
                                 "resume with that, or start another --out")
        if checkpoint["contents"] != photos.contents:
            raise UsageError(f"--data {self.args.data}: not the images that the run in "
                             f"{self.args.out} was trained on")
        done, epochs = checkpoint["epoch"], self.args.epochs
        if done > self.args.pretrain_epochs + epochs:
            raise UsageError(f"--epochs {epochs}: the run in {self.args.out} has done "
                             f"{done - self.args.pretrain_epochs}; ask for as many or more")
        for name in self.STATEFUL:
            getattr(self, name).load_state_dict(checkpoint[name])
        self.epoch, self.log = checkpoint["epoch"], checkpoint["log"]


def save(path, checkpoint):
    """torch.save, whole or not at all. Raises OSError where that fails."""
    try:
        with replacing(path) as part:
            torch.save(checkpoint, part)
    except RuntimeError as error:  # how torch.save reports a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot write {path}, is the disk full? {reason}") from error


def save_picture(run, photos):
    """Draw OUT/epoch-NNNN.png: grey, colorized and real rows of the first eight of the val part."""
    L, ab = photos.batch(photos.val[:8], run.device)
    with torch.no_grad():
        rows = [to_uint8(L, x) for x in (torch.zeros_like(ab), run.ema(L), ab)]
    with replacing(run.args.out / f"epoch-{run.epoch:04}.png") as part:
        save_image(torch.cat(rows).permute(0, 3, 1, 2) / 255, part, nrow=len(L), format="png")


# ---------------------------------------------------------------------------------------------
# Command line

def amp_dtype(amp, device):
    """The 16-bit type of --amp, or None for float32."""
    if amp == "auto" and device.type == "cuda":  # a T4 emulates bfloat16, slowly
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"from {low} to {high}" if high < math.inf else f"at least {low}"
            raise argparse.ArgumentTypeError(f"must be {limit}, not {text}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message: invalid int value
    return parse


def parse_args(argv=None):
    """The options as a namespace; a wrong one ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(
        description=" ".join(__doc__.split("\n\n")[:2]),
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", default="data", metavar="DIR",
        help="folder of images; where it does not exist Flowers102 is downloaded into it; "
             "demo: crops of photographs that scikit-image ships")
    parser.add_argument("--size", type=number(int, 32, 1024), default=128,
        help="side of the training images in pixels, a multiple of 16")
    parser.add_argument("--width", type=number(int, 1, 512), default=64,
        help="channels of the first block of both networks (U-Net and PatchGAN: 64)")
    parser.add_argument("--batch-size", type=number(int, 1), default=32,
        help="images a step, over all processes")
    parser.add_argument("--pretrain-epochs", type=number(int, 0), default=20,
        help="epochs of L1 alone")
    parser.add_argument("--epochs", type=number(int, 0), default=110,
        help="epochs of WGAN-GP after that")
    parser.add_argument("--critic-steps", type=number(int, 1), default=1,
        help="critic steps a batch (WGAN-GP: 5)")
    parser.add_argument("--generator-steps", type=number(int, 1), default=2,
        help="generator steps a batch (WGAN-GP: 1)")
    parser.add_argument("--lambda-l1", type=number(float, 0), default=100.0,
        help="weight of the L1 loss, of ab / 110 (pix2pix: 100)")
    parser.add_argument("--lambda-gp", type=number(float, 0), default=10.0,
        help="weight of the gradient penalty (WGAN-GP: 10)")
    parser.add_argument("--pretrain-lr", type=number(float, 0), default=1e-3,
        help="highest learning rate of pre-training")
    parser.add_argument("--lr", type=number(float, 0), default=1e-4,
        help="learning rate of the adversarial phase (WGAN-GP: 1e-4)")
    parser.add_argument("--ema", type=number(float, 0, 1), default=0.999,
        help="decay, a batch, of the weights' moving average; 0 for none")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="16-bit arithmetic; auto: what the CUDA device has, elsewhere off")
    parser.add_argument("--compile", action="store_true",
        help="compile the generator with torch.compile")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0,
        help="of the split and of training")
    parser.add_argument("--sample-every", type=number(int, 1), default=5, metavar="EPOCHS",
        help="epochs between pictures in OUT")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="OUT",
        help="folder for g.pt, last.pt, log.csv and pictures")
    parser.add_argument("--init", type=Path, metavar="CKPT",
        help="start from this g.pt, of the same width, at any size and with any photographs")
    parser.add_argument("--resume", action="store_true",
        help="go on from OUT/last.pt where there is one")
    parser.add_argument("--eval", type=Path, metavar="CKPT",
        help="evaluate this generator on the test part of --data, and train nothing")
    args = parser.parse_args(argv)
    if args.size % 16:
        parser.error(f"argument --size: must be a multiple of 16, not {args.size}")
    if args.pretrain_epochs + args.epochs == 0:
        parser.error("argument --epochs: 0, and --pretrain-epochs 0: nothing to train")
    return args


def finish_epoch(run, photos, terms, rate, start):
    """Evaluate, print a line, and write the epoch's files. On one process alone."""
    args, seconds = run.args, lambda: time.perf_counter() - start
    pretraining = run.epoch <= args.pretrain_epochs
    row = {"epoch": run.epoch, "phase": "pretrain" if pretraining else "wgan-gp"}
    means = dict(zip(TERMS, terms.mean(0).tolist()))
    val = evaluate(lambda L, ab: run.ema(L), photos, photos.val, run.device)
    row |= dict.fromkeys(TERMS) | means | {f"val_{name}": value for name, value in val.items()}
    run.log.append(row | {"images_per_s": rate, "seconds": seconds()})

    total = args.pretrain_epochs + args.epochs
    left = ((args.pretrain_epochs if pretraining else total) - run.epoch) * seconds() / 60
    live("")
    losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    print(f"epoch {run.epoch}/{total} {row['phase']}  {losses}  val {val['psnr']:.2f} dB, "
          f"colourfulness {val['colourfulness']:.1f}  {rate:.0f} images/s, "
          f"{left:.0f} min left in this phase", flush=True)
    if run.epoch % args.sample_every == 0 or run.epoch == total:
        save_picture(run, photos)
    run.save(photos)


def train(args):
    """Train by the options and evaluate the result."""
    # Setup: one device a process, and the processes in one group.
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True
    last = args.out / "last.pt"
    if last.exists() and not args.resume:
        raise UsageError(f"--out {args.out}: holds a run; go on with --resume, or name another")
    if args.resume and not last.exists() and rank == 0:
        print(f"--resume: no {last}, starting afresh")
    checkpoint = load_checkpoint(last, "--resume", "contents") if last.exists() else None
    if args.batch_size % processes:
        raise UsageError(f"--batch-size {args.batch_size}: not a multiple of {processes} processes")
    if processes > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))  # long enough to decode

    # Data: the first process decodes, then all read the cache.
    if processes > 1 and rank > 0:
        dist.barrier()
    photos = Photos(args.data, args.size, args.seed)
    if processes > 1 and rank == 0:
        dist.barrier()
    if args.batch_size > len(photos.train):
        raise UsageError(f"--batch-size {args.batch_size}: more than the {len(photos.train)} "
                         "training images")
    if device.type == "cuda" and photos.images.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
        photos.images = photos.images.to(device)

    # Networks
    run = Run(args, device, rank, processes)
    if checkpoint:
        run.load(checkpoint, photos)
    elif args.init:
        run.start_from(*load_generator(args.init, device, flag="--init"))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out}: {error.strerror}; name another folder") from error
    if rank == 0:
        print(", ".join(f"{name} {value}" for name, value in vars(args).items()))
        print(f"{len(photos.train)} training, {len(photos.val)} validation and {len(photos.test)} "
              f"test images, on {device}", flush=True)

    # Loop
    for epoch in range(run.epoch, args.pretrain_epochs + args.epochs):
        start = time.perf_counter()
        terms, rate = train_epoch(run, photos, epoch)
        check_finite(run, terms, epoch)
        run.epoch = epoch + 1
        if rank == 0:
            finish_epoch(run, photos, terms, rate, start)
    if processes > 1:
        dist.destroy_process_group()
    if rank == 0:
        print_table(args.out / "g.pt", args.data, device)


def main(argv=None):
    """Run the command line. Returns the exit status: 0, 1 (failed), 2 (usage) or 130 (Ctrl-C)."""
    args = parse_args(argv)
    try:
        if args.eval:
            print_table(args.eval, args.data, pick_device(args.device))
        else:
            train(args)
    except UsageError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(f"train.py: error: --batch-size {args.batch_size}: out of memory; lower it, --width "
              "or --size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        remedy = "" if args.eval else f"; --resume goes on from the last whole epoch in {args.out}"
        print(f"\nstopped{remedy}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
