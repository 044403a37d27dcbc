"""An autoencoder for MNIST in six linear layers, 784 → 144 → 288 → 20 → 288 → 288 → 784.

    python autoencoder.py           train it, save pictures, check it, print the success message
    python autoencoder.py search    choose its settings by how natural its digits are

Written for a task: at most six linear layers and none wider than 800, a code of 20 numbers,
the Euclidean norm of each image's residual as loss, batches of 50, Adam at a rate of 0.001.
For speed, training joins four batches for a step, and the rate cycles up to 12 times that.

Mean squared error per pixel on MNIST's test images: 0.00483 ± 0.00002 over three seeds.
The best linear code of 20 numbers (PCA) has 0.0235.

The first half of the file is that task: model, data, training, test function. The second
half generates digits, measures how natural they are, and searches for settings. The
command line comes last.
"""

import argparse
import contextlib
import inspect
import itertools
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

# A thread of PyTorch that has nothing to do keeps its core busy for a while, which slows
# down a busy machine. Let it fall asleep sooner; this only works before PyTorch's import.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import MNIST
from torchvision.utils import save_image

# ---- The model and its objective ---------------------------------------------------------

def cross_entropy(recon_x: Tensor, x: Tensor) -> Tensor:
    """Treats each pixel as the probability that it is white."""
    if not recon_x.isfinite().all():
        return recon_x.sum()  # not finite either; PyTorch's own would raise an error here
    return F.binary_cross_entropy(recon_x, x, reduction="sum")


LOSSES = {  # each is summed over the images of a batch; recon_x and x are (batch, inp_size)
    "euclidean": lambda recon_x, x: torch.linalg.vector_norm(recon_x - x, dim=1).sum(),
    "squared": lambda recon_x, x: (recon_x - x).square().sum(),
    "absolute": lambda recon_x, x: (recon_x - x).abs().sum(),
    "cross-entropy": cross_entropy,
}


class AutoEncoder(nn.Module):
    """An encoder E and a decoder D: linear layers with SiLU between them.

    inp_size         numbers in an image
    hid_size         numbers in its code
    encoder_sizes    units of the encoder's hidden layers, from the image to the code
    decoder_sizes    units of the decoder's hidden layers, from the code to the image
    loss             reconstruction loss, a name in LOSSES
    l1               weight of the L1 norm of all parameters in the loss of a batch
    dropout          probability of leaving out a hidden unit, in training
    refinements      how often `encode` corrects its code; 0 is the textbook's encoder
    """

    def __init__(self, inp_size: int, hid_size: int,
                 encoder_sizes=(144, 288), decoder_sizes=(288, 288),
                 loss="euclidean", l1=0.0, dropout=0.0, refinements=1):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {loss!r}")
        self.loss = loss
        self.l1 = l1
        self.dropout = dropout
        self.refinements = refinements

        # The task wants every linear layer to be a direct child of the model, so they get
        # names: encoder1, encoder2, … and decoder1, decoder2, … `run_layers` finds them.
        sizes = [inp_size, *encoder_sizes, hid_size]  # 784, 144, 288, 20
        for number, (size_in, size_out) in enumerate(itertools.pairwise(sizes), start=1):
            self.add_module(f"encoder{number}", nn.Linear(size_in, size_out))
        sizes = [hid_size, *decoder_sizes, inp_size]  # 20, 288, 288, 784
        for number, (size_in, size_out) in enumerate(itertools.pairwise(sizes), start=1):
            self.add_module(f"decoder{number}", nn.Linear(size_in, size_out))

    def run_layers(self, side: str, x: Tensor) -> Tensor:
        """`x` through the layers of one side, "encoder" or "decoder"."""
        layers = [layer for name, layer in self.named_children() if name.startswith(side)]
        for layer in layers[:-1]:
            x = F.silu(layer(x))
            x = F.dropout(x, self.dropout, self.training)
        return layers[-1](x)

    def encode(self, x: Tensor) -> Tensor:
        """Images (batch, inp_size) → codes (batch, hid_size).

        The code that E finds in one pass is well short of the best one for its image: this
        is known as the amortisation gap. So the code is decoded, the outcome is encoded,
        and the code moves by the difference, as often as `refinements` says:

            h ← h + E(x) − E(D(h)),    starting at h = E(x).

        If it came to rest, E(D(h)) = E(x): to the encoder, the reconstruction would look
        like the image. Gradients go through all of it in training. After Marino, Yue and
        Mandt 2018 (arXiv:1807.09356).
        """
        first = self.run_layers("encoder", x)  # (batch, hid_size)
        h = first
        for _ in range(self.refinements):
            h = h + first - self.run_layers("encoder", self.decode(h))
        return h

    def decode(self, h: Tensor) -> Tensor:
        """Codes (batch, hid_size) → images (batch, inp_size), each value in [0, 1]."""
        return torch.sigmoid(self.run_layers("decoder", h))

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, inp_size) → their reconstructions (batch, inp_size)."""
        return self.decode(self.encode(x))

    def loss_function(self, recon_x: Tensor, x: Tensor) -> Tensor:
        """The objective on a batch, both (batch, inp_size) → a scalar to back-propagate.

        The task's objective, over all images, with φ and θ the parameters of D and E, is

            L(X, φ, θ) = Σ_i ‖x_i − D(E(x_i))‖₂  +  λ (‖φ‖₁ + ‖θ‖₁).

        A batch contributes its own images' part of the sum and the whole penalty, so that
        an epoch of S steps adds the penalty S times. For the objective's λ, let l1 = λ / S.
        """
        loss = LOSSES[self.loss](recon_x, x)
        if self.l1:
            loss = loss + self.l1 * sum(p.abs().sum() for p in self.parameters())
        return loss


# ---- Data --------------------------------------------------------------------------------

class Data(NamedTuple):
    """Images (n, 1, 28, 28) in [0, 1], labels (n,) from 0 to 9, and the data set's name."""
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits of a computer font, turned, slanted, stretched and moved at random.

    They stand in for MNIST where there is no network. Returns images (count, 1, 28, 28)
    in [0, 1] and labels (count,).
    """
    font = ImageFont.load_default(size=100)  # Pillow's own
    glyphs = []
    for digit in "0123456789":
        glyph = Image.new("L", (112, 112))
        draw = ImageDraw.Draw(glyph)
        draw.text((56, 56), digit, 255, font, anchor="mm", stroke_width=2)
        pixels = bytearray(glyph.tobytes())
        glyphs.append(torch.frombuffer(pixels, dtype=torch.uint8) / 255)
    glyphs = torch.stack(glyphs).view(10, 1, 112, 112)
    glyphs = F.avg_pool2d(glyphs, 4)  # (10, 1, 28, 28), with soft edges

    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    upright = torch.tensor([[1.05, 0.0, 0.0], [0.0, 1.05, 0.0]])
    spread = torch.tensor([[0.2, 0.4, 0.1], [0.2, 0.2, 0.1]])
    uniform = 2 * torch.rand(count, 2, 3, generator=generator) - 1  # in [-1, 1]
    maps = upright + spread * uniform  # (count, 2, 3), affine
    grid = F.affine_grid(maps, [count, 1, 28, 28], align_corners=False)
    images = F.grid_sample(glyphs[labels], grid, align_corners=False)
    return images.clamp(0, 1), labels


def load_data(folder: str | Path = "data") -> Data:
    """MNIST from `folder`, downloaded if it is not there.

    If it cannot be downloaded, drawn digits and a printed line that says so. Raises
    ValueError if the files are damaged, OSError if `folder` cannot be read or written.
    """
    try:
        train = MNIST(folder, train=True, download=True)
        test = MNIST(folder, train=False, download=True)
    except Exception as error:
        raw = Path(folder) / "MNIST" / "raw"
        four_files = len(list(raw.glob("*-ubyte"))) == 4
        if four_files and not isinstance(error, OSError):
            raise ValueError(f"the data in {raw} are damaged ({error}): delete that folder, "
                             "and run again to download them") from error
        if not isinstance(error, RuntimeError):  # torchvision's word for "no mirror answers"
            raise
        print("MNIST could not be downloaded. Drawn digits take its place, so the figures "
              "below are not MNIST's. To have MNIST, run this again with a network, or put "
              f"its four files into {raw}.", flush=True)
        train_part = draw_digits(60_000, seed=0)
        test_part = draw_digits(10_000, seed=1)
        return Data(*train_part, *test_part, "drawn digits")
    return Data(train.data.unsqueeze(1) / 255, train.targets,
                test.data.unsqueeze(1) / 255, test.targets, "MNIST")


def make_loader(images: Tensor, labels: Tensor, batch_size=50, seed=0) -> DataLoader:
    """A loader of (images, labels), in a new random order each epoch.

    It takes a batch out of the tensors at once, where the usual one goes image by image.
    """
    order = RandomSampler(images, generator=torch.Generator().manual_seed(seed))
    batches = BatchSampler(order, batch_size, drop_last=False)
    return DataLoader(TensorDataset(images, labels), sampler=batches, batch_size=None)


# ---- Training ----------------------------------------------------------------------------

def merged_batches(loader: DataLoader, merge: int):
    """The images of `loader` without their labels, `merge` of its batches joined to one."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, merge)):
        yield torch.cat([images for images, _ in group])


@contextlib.contextmanager
def one_cycle(optimizer: torch.optim.Optimizer, steps: int, peak: float | None):
    """A schedule of the learning rate over `steps` steps, which restores the rate on exit.

    The rate rises linearly from 0 to `peak` times the optimizer's own in the first fifth of
    the steps, and falls linearly to 0 in the others. If `peak` is None, it is constant.
    """
    def factor(step):
        if peak is None:
            return 1.0
        done = (step + 1) / (steps + 1)  # share of the training, between 0 and 1
        warm_up = 0.2                    # share of the training in which the rate rises
        return peak * min(done / warm_up, (1 - done) / (1 - warm_up))

    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates):
        group["initial_lr"] = rate  # LambdaLR multiplies this, and keeps one that it finds
    try:
        yield LambdaLR(optimizer, factor)
    finally:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Over a loader of (images, labels): the average loss per image, and the mean squared
    error per pixel."""
    device = next(model.parameters()).device
    model.eval()
    loss = error = count = 0
    for images, _ in loader:
        x = images.to(device).flatten(1)
        recon_x = model(x)
        loss += model.loss_function(recon_x, x).item()
        error += (recon_x - x).square().mean(dim=1).sum().item()
        count += len(x)
    return loss / count, error / count


@torch.no_grad()
def save_reconstructions(model: nn.Module, images: Tensor, path: Path) -> None:
    """A picture: a row of images (n, 1, height, width) above their reconstructions."""
    device = next(model.parameters()).device
    model.eval()
    recon_x = model(images.to(device).flatten(1)).view(images.shape)
    rows = torch.cat([images, recon_x.to(images.device)])
    save_image(rows, path, nrow=len(images), pad_value=0.5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer,
          train_loader: DataLoader, test_loader: DataLoader | None,
          epochs: int = 10, pics: str | Path = "pics",
          peak: float | None = 12, merge: int = 4, quiet: bool = False) -> nn.Module:
    """Train `model` on its own loss_function(recon_x, x), on its own device; return it.

    The loaders give (images, labels), images of shape (batch, 1, height, width) in [0, 1].
    Each epoch prints the average loss per image, in training and on the test images, and
    saves `pics`/reconstruction_<epoch>.png: eight test images above their reconstructions.
    (A penalty counts once a batch, so with one the two averages are not comparable.)

    peak     the learning rate goes through one cycle, from 0 up to `peak` times that of
             the optimizer and down to 0; afterwards the optimizer has its own rate again.
             None leaves the rate alone.
    merge    so many of the loader's batches are joined for one step: the task wants batches
             of 50, and larger steps are faster. 1 takes the batches as they come.
    quiet    prints and saves nothing, and does not use `test_loader`, which may be None.

    Raises ValueError if a loader is empty, OSError if a picture cannot be written, and
    FloatingPointError if the loss is not finite, before a step would spoil the model.
    """
    loaders = [train_loader] if quiet else [train_loader, test_loader]
    if any(len(loader) == 0 for loader in loaders):
        raise ValueError("a loader has no images")
    if not quiet:
        Path(pics).mkdir(parents=True, exist_ok=True)
        shown = next(merged_batches(test_loader, merge=8))[:8]  # a batch may have only one
        rate = optimizer.param_groups[0]["lr"]
        cycle = "constant" if peak is None else f"0 to {peak} times {rate} and back to 0"
        print(f"learning rate: {cycle}; batches in a step: {merge}", flush=True)

    device = next(model.parameters()).device
    steps_per_epoch = math.ceil(len(train_loader) / merge)
    with one_cycle(optimizer, epochs * steps_per_epoch, peak) as schedule:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            model.train()
            total = count = 0
            for images in merged_batches(train_loader, merge):
                x = images.to(device).flatten(1)  # (200, 1, 28, 28) → (200, 784)
                loss = model.loss_function(model(x), x)
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the training loss is {value} in epoch {epoch}: are the images in "
                        "[0, 1]? If so, lower the learning rate")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += value
                count += len(x)

            if not quiet:
                test_loss, _ = evaluate(model, test_loader)
                path = Path(pics) / f"reconstruction_{epoch}.png"
                save_reconstructions(model, shown, path)
                seconds = time.perf_counter() - start
                print(f"epoch {epoch:2}/{epochs}  train loss {total / count:.4f}  "
                      f"test loss {test_loss:.4f}  {seconds:.1f} s", flush=True)
    return model.eval()


# ---- The test function -------------------------------------------------------------------

def check_limits(model: nn.Module) -> None:
    """Assert what the task asks of a model with 784 inputs and a code of 20 numbers."""
    x = torch.randn(1, 784, device=next(model.parameters()).device)
    with torch.no_grad():
        h = model.encode(x)
        recon_x = model.decode(h)
    shape = tuple(h.shape)
    assert shape == (1, 20), f"the hidden representation has shape {shape}, not (1, 20)"
    shape = tuple(recon_x.shape)
    assert shape == (1, 784), f"the reconstruction has shape {shape}, not (1, 784)"

    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = {name.rpartition(".")[0] for name in trainable}  # encoder1.weight → encoder1
    assert len(layers) <= 6, f"{len(layers)} layers are trainable, and at most 6 may be"
    children = dict(model.named_children())
    for layer in layers:
        is_linear = isinstance(children.get(layer), nn.Linear)
        assert is_linear, f"{layer or 'a parameter'} is not an nn.Linear child of the model"
    for name, parameter in model.named_parameters():
        assert max(parameter.shape, default=0) <= 800, f"{name} has a dimension above 800"


def pca_error(train_images: Tensor, test_images: Tensor, size: int) -> float:
    """Mean squared error per pixel of the best linear code of `size` numbers (PCA), which
    is fitted to the training images; images (n, 784)."""
    mean = train_images.mean(dim=0)
    _, vectors = torch.linalg.eigh(torch.cov(train_images.T))
    directions = vectors[:, -size:]  # (784, size): the eigenvalues are ascending
    residual = test_images - mean
    residual = residual - residual @ directions @ directions.T
    return residual.square().mean().item()


def test_work(data: str | Path = "data", pics: str | Path = "pics", epochs: int = 10,
              seed: int = 0, lr: float = 1e-3, device: str | None = None, **settings):
    """The provided test: train an autoencoder on MNIST and print Success!🎉.

    The model has to keep the task's limits, and to beat the best linear code of its size
    on the test images. If not, an AssertionError says what failed. `settings` are
    arguments of AutoEncoder; `device` is the fastest there is, if None. Returns the trained
    model and the data.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    digits = load_data(data)
    train_loader = make_loader(digits.train_images, digits.train_labels, 50, seed)
    test_loader = make_loader(digits.test_images, digits.test_labels, 50, seed)
    try:
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        model = AutoEncoder(inp_size=784, hid_size=20, **settings).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        check_limits(model)
    except Exception as error:
        raise AssertionError(f"error during model creation: {error}") from error
    try:
        train(model, optimizer, train_loader, test_loader, epochs, pics)
    except Exception as error:
        raise AssertionError(f"error during training: {error}") from error

    _, error = evaluate(model, test_loader)
    train_x, test_x = digits.train_images.flatten(1), digits.test_images.flatten(1)
    linear_error = pca_error(train_x, test_x, size=20)
    print(f"mean squared error per pixel on the test images ({digits.name}): {error:.5f}, "
          f"of the best linear code (PCA): {linear_error:.5f}\n"
          f"{time.perf_counter() - start:.0f} s in all; pictures in {pics}")
    assert error < linear_error, "the model does not beat the best linear code of its size"
    try:
        print("Success!🎉")
    except UnicodeEncodeError:  # a console without the emoji
        print("Success!")
    return model, digits


# ---- Generation, and how natural it is ---------------------------------------------------

class Density(NamedTuple):
    """A mixture of k Gaussians over codes of h numbers."""
    weights: Tensor  # (k,), with sum 1
    means: Tensor    # (k, h)
    factors: Tensor  # (k, h, h): a Gaussian's covariance is factor @ factor.T


@torch.no_grad()
def fit_density(model: AutoEncoder, images: Tensor, components=100) -> Density:
    """Fit a mixture of Gaussians to the codes of images (n, inp_size).

    A plain autoencoder does not say which codes are likely, so it cannot generate; with a
    density over its codes it can (Ghosh et al. 2020, arXiv:1903.12436). Here the codes are
    put into clusters by k-means (Lloyd 1982), and each cluster gets a Gaussian.
    """
    model.eval()
    device = next(model.parameters()).device
    codes = model.encode(images.to(device)).cpu().double()  # (n, h)
    n, h = codes.shape
    means = codes[:: max(1, n // components)][:components].clone()  # (k, h), evenly spaced
    for _ in range(20):
        cluster = torch.cdist(codes, means).argmin(dim=1)  # (n,)
        counts = cluster.bincount(minlength=len(means)).double()  # (k,)
        sums = torch.zeros_like(means).index_add(0, cluster, codes)
        means = torch.where(counts[:, None] > 0, sums / counts[:, None], means)

    residual = codes - means[cluster]
    products = residual[:, :, None] * residual[:, None, :]  # (n, h, h)
    sums = torch.zeros(len(means), h, h, dtype=codes.dtype).index_add(0, cluster, products)
    covariances = sums / counts.clamp(min=1)[:, None, None]
    ridge = 1e-3 * codes.var(dim=0).mean() + 1e-9  # so that no Gaussian is flat
    factors = torch.linalg.cholesky(covariances + ridge * torch.eye(h))
    return Density((counts / n).float(), means.float(), factors.float())


@torch.no_grad()
def generate(model: AutoEncoder, density: Density, count: int, seed: int = 0) -> Tensor:
    """Decode `count` codes from `density`: images (count, inp_size), in random order.

    Chance plays a small part, so that measures of the images have little noise: each
    Gaussian gives its exact share of the codes, and normal vectors come in pairs z and −z.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    places = (torch.arange(count) + 0.5) / count  # evenly in [0, 1]
    component = torch.bucketize(places, density.weights.cumsum(dim=0))
    component = component.clamp(max=len(density.weights) - 1)  # the sum may be 0.9999999

    half = torch.randn((count + 1) // 2, density.means.shape[1], generator=generator)
    noise = torch.stack([half, -half], dim=1).flatten(0, 1)[:count]  # (count, h)
    offsets = torch.einsum("nij,nj->ni", density.factors[component], noise)
    codes = density.means[component] + offsets
    codes = codes[torch.randperm(count, generator=generator)]
    return model.decode(codes.to(next(model.parameters()).device))


def save_generated(model: AutoEncoder, digits: Data, path: Path) -> None:
    """A picture of a hundred generated digits in ten rows."""
    density = fit_density(model, digits.train_images[:10_000].flatten(1))
    images = generate(model, density, 100).view(-1, 1, 28, 28)
    save_image(images, path, nrow=10, pad_value=0.5)


def harden(images: Tensor) -> Tensor:
    """Ink or paper: a soft threshold at 0.6 of the brightness of each image (n, 784).

    What is left is the shape of the strokes. Otherwise a digit that is a little dimmer or
    softer than others counts as far worse than one that is no digit.
    """
    top = images.topk(10, dim=1).values.mean(dim=1, keepdim=True)  # the ten brightest pixels
    return torch.sigmoid(12 * (images / top.clamp(min=1e-3) - 0.6))


class Classifier(nn.Module):
    """A small classifier of digits. Its last hidden layer, scaled to length 10, serves as
    the features in which sets of images are compared."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, kernel_size=5, stride=2), nn.ReLU(),   # (n, 16, 12, 12)
            nn.Conv2d(16, 32, kernel_size=3, stride=2), nn.ReLU(),  # (n, 32, 5, 5)
            nn.Flatten(),
            nn.Linear(800, 64), nn.ReLU(),
        )
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 784) → logits (n, 10)."""
        return self.out(self.hidden(harden(x)))

    @torch.no_grad()
    def describe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 784) → their features (n, 64) and most likely classes (n,)."""
        hidden = self.hidden(harden(x))
        return 10 * F.normalize(hidden), self.out(hidden).argmax(dim=1)


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0, epochs=6,
                     kind=Classifier) -> Classifier:
    """Train a Classifier on images (n, 784) that no autoencoder to be judged has seen."""
    torch.manual_seed(seed)
    model = kind()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    steps = epochs * math.ceil(len(images) / 100)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of two sets of features, (n, d) and (m, d).

    It is that of the Gaussians with the sets' means μ and covariances C,

        |μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½)

    (Dowson and Landau 1982). In features of the Inception network it is the FID (Heusel et
    al. 2017, arXiv:1706.08500). For small sets it is biased upwards.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^½

    # C_a C_b has the eigenvalues of the symmetric C_a^½ C_b C_a^½.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (shift + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def class_balance(classes: Tensor, real_classes: Tensor) -> float:
    """The smallest ratio of a class's share of the generated to its share of the real
    images: 1 if all shares agree, 0 if a class is missing. Both are classes (n,)."""
    shares = classes.bincount(minlength=10) / len(classes)
    real_shares = real_classes.bincount(minlength=10) / len(real_classes)
    return (shares / real_shares).min().item()


@torch.no_grad()
def copy_ratio(model: AutoEncoder, generated: Tensor, held_out: Tensor, seen: Tensor,
               count: int = 500) -> float:
    """How far generated digits are from those that the density was fitted to, `seen`.

    The median distance to the nearest of them, divided by that of held-out digits: 1 for
    new digits, 0 for copies. A decoded copy differs from its original as much as any
    reconstruction does, so everything goes through the autoencoder first. `count` images
    are enough for a median; all are (n, 784). After Meehan et al. 2020 (arXiv:2004.05675),
    whose test is finer.
    """
    model.eval()
    seen = model(seen)
    nearest = torch.cdist(model(generated[:count]), seen).amin(dim=1)
    usual = torch.cdist(model(held_out[:count]), seen).amin(dim=1)
    return (nearest.median() / usual.median()).item()


def linear_digits(train_images: Tensor, count: int, seed: int = 0, size: int = 20) -> Tensor:
    """A baseline: `count` images from a Gaussian over the `size` leading principal
    components of training images (n, 784), which is what a linear model generates."""
    variances, directions = torch.linalg.eigh(torch.cov(train_images.T))  # ascending
    scaled = directions[:, -size:] * variances[-size:].sqrt()  # (784, size)
    noise = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return (train_images.mean(dim=0) + noise @ scaled.T).clamp(0, 1)


# ---- The search for settings -------------------------------------------------------------

DEFAULT = {}  # what AutoEncoder does if it is told nothing
PLAIN = {"encoder_sizes": (400,), "decoder_sizes": (400,), "refinements": 0}  # 784-400-20
MIN_BALANCE = 0.5   # below it a class is missing; good settings have 0.7 to 0.9
MIN_NOVELTY = 0.85  # below it digits are copies; good settings have 0.97 to 1.1
REPEATS = 3         # trainings of each setting that is confirmed or tested


class Trial(NamedTuple):
    """A setting, and how it is to be trained and judged."""
    name: str
    setting: dict  # arguments of AutoEncoder
    seed: int
    epochs: int
    part: str      # name in `split_data` of the images that it is judged by


def random_setting(seed: str) -> dict:
    """Arguments of AutoEncoder, all drawn at once; `l1` on a logarithmic scale.

    One half of the settings have no L1 penalty, and one half no dropout.
    """
    draw = random.Random(seed)
    hidden_layers = draw.choice([0, 1, 2])  # on each side
    encoder_sizes = tuple(draw.randint(64, 400) for _ in range(hidden_layers))
    decoder_sizes = tuple(draw.randint(64, 400) for _ in range(hidden_layers))
    loss = draw.choice(list(LOSSES))
    l1 = float(f"{10 ** draw.uniform(-6, -2):.1e}")  # two digits are enough
    l1 = draw.choice([0.0, l1])
    dropout = round(draw.uniform(0, 0.3), 2)
    dropout = draw.choice([0.0, dropout])
    refinements = draw.choice([0, 1])
    return {"encoder_sizes": encoder_sizes, "decoder_sizes": decoder_sizes, "loss": loss,
            "l1": l1, "dropout": dropout, "refinements": refinements}


def cost(setting: dict) -> int:
    """Parameters times passes, the work of a training step: what makes a setting cheap."""
    model = AutoEncoder(784, 20, **setting)
    return sum(p.numel() for p in model.parameters()) * (1 + model.refinements)


def split_data(digits: Data, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Disjoint parts of the data: name → images (n, 784) and labels (n,).

    Of 60,000 training images 40,000 train the autoencoders, 10,000 the classifier, 5,000
    serve to choose and 5,000 to confirm the choice.
    """
    count = len(digits.train_images)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    images = digits.train_images[order].flatten(1)
    labels = digits.train_labels[order]
    twelfth = count // 12
    sizes = [count - 4 * twelfth, 2 * twelfth, twelfth, twelfth]
    names = ["train", "classifier", "choose", "confirm"]
    parts = dict(zip(names, zip(images.split(sizes), labels.split(sizes))))
    return parts | {"test": (digits.test_images.flatten(1), digits.test_labels)}


def judge(generated: Tensor, real: Tensor, classifier: Classifier) -> dict:
    """Two measures of generated against real digits, both (n, 784)."""
    features, classes = classifier.describe(generated)
    real_features, real_classes = classifier.describe(real)
    return {"distance": frechet_distance(features, real_features),
            "balance": class_balance(classes, real_classes)}


def train_setting(setting: dict, images: Tensor, labels: Tensor, epochs: int,
                  seed: int) -> AutoEncoder:
    """A model of this setting, trained on images (n, 784) with the defaults of `train`."""
    torch.manual_seed(seed)
    model = AutoEncoder(784, 20, **setting)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    loader = make_loader(images, labels, seed=seed)
    return train(model, optimizer, loader, None, epochs, quiet=True)


def run_trial(trial: Trial, parts: dict, classifier: Classifier) -> dict:
    """Train a setting, and measure the digits that it generates."""
    images, labels = parts["train"]
    real, _ = parts[trial.part]
    try:
        model = train_setting(trial.setting, images, labels, trial.epochs, trial.seed)
    except FloatingPointError:  # it diverged: such a setting comes last
        return {"distance": math.inf, "balance": 0.0, "novelty": 0.0, "error": math.inf,
                "digits": torch.zeros(20, 784)}

    seen = images[:10_000]  # 100 for each Gaussian
    density = fit_density(model, seen)
    count = min(20_000, 4 * len(real))
    generated = generate(model, density, count, trial.seed)
    with torch.no_grad():
        error = (model(real) - real).square().mean().item()
    return judge(generated, real, classifier) | {
        "novelty": copy_ratio(model, generated, real, seen),
        "error": error,
        "digits": generated[:20].clone(),  # or all would be saved with them
    }


def run_trials(trials: list[Trial], parts: dict, classifier: Classifier, out: Path,
               context: str) -> dict[str, dict]:
    """Run `trials`: their names → their results. Processes under torchrun share the work.

    Each result is kept in a file of the folder `out`. It is used again for the same trial
    in the same `context`: data, seed, version of PyTorch, defaults of model and training.
    """
    rank, processes = 0, 1
    if dist.is_initialized():
        rank, processes = dist.get_rank(), dist.get_world_size()
    longest_first = sorted(trials, key=lambda trial: -cost(trial.setting))
    results = {}
    for trial in longest_first[rank::processes]:
        start = time.perf_counter()
        key = f"{trial} {context}"
        path = out / f"{trial.name}.pt"
        result = torch.load(path) if path.exists() else {}
        if result.get("key") != key:
            result = run_trial(trial, parts, classifier) | {"key": key}
            unfinished = path.with_suffix(f".{rank}")
            torch.save(result, unfinished)
            unfinished.replace(path)  # so the file is there as a whole, or not at all
        results[trial.name] = result
        seconds = time.perf_counter() - start
        print(f"{trial.name:27} {result['distance']:8.3f}  {seconds:5.1f} s", flush=True)

    if dist.is_initialized():
        gathered = [None] * processes
        dist.all_gather_object(gathered, results)
        results = {name: result for part in gathered for name, result in part.items()}
    return results


def passes(result: dict) -> bool:
    """Whether no class is missing and the digits are not copies."""
    return result["balance"] >= MIN_BALANCE and result["novelty"] >= MIN_NOVELTY


def rank_key(result: dict) -> tuple:
    """Sorts results: those that pass the guards first, then by distance."""
    return not passes(result), result["distance"]


def cheapest_of_the_best(scores: dict[str, list[float]], costs: dict[str, int]) -> str:
    """The name of the cheapest setting that cannot be told apart from the best.

    Two settings are told apart if all scores of the one are worse than all of the other.
    With three scores each, that happens to equally good settings in 1 of 10 cases.
    """
    best = min(scores, key=lambda name: sum(scores[name]))
    tied = [name for name in scores if min(scores[name]) <= max(scores[best])]
    return min(tied, key=costs.get)


def print_report(title: str, rows: dict[str, list[dict]]) -> None:
    """A row for each setting: mean ± standard deviation over its results."""
    columns = ["distance", "balance", "novelty", "error"]
    print(f"\n{title:15}" + "".join(f"{column:>17}" for column in columns))
    for name, results in rows.items():
        line = f"{name:15}"
        for column in columns:
            values = torch.tensor([result[column] for result in results if column in result])
            cell = f"{values.mean():.4f}" if len(values) else ""
            cell += f" ± {values.std():.4f}" if len(values) > 1 else ""
            line += f"{cell:>17}"
        print(line)


def as_options(setting: dict) -> str:
    """A setting as options of the command line."""
    words = []
    for name, value in setting.items():
        values = value if isinstance(value, tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def search(data: str | Path = "data", out: str | Path = "search", epochs: int = 3,
           trials: int = 20, seed: int = 0) -> dict:
    """Choose arguments of AutoEncoder by how natural the digits are that it generates.

    1. Random settings are trained and judged by held-out digits. The best two are finalists.
    2. The finalists, the default and 784-400-20 are trained anew, with fresh seeds, and
       judged by fresh images. The cheapest of those that tie with the best wins.
    3. The winner is shown on the test images beside the default, 784-400-20 and the typical
       setting, which is the middle one of the random settings. All are trained anew.

    Started again, it goes on where it stopped. Delete the folder `out` to start afresh, as
    after a change of this code. Processes under torchrun share the trials. Returns the
    winner.
    """
    torch.set_num_threads(1)  # so that the winner is the same for any number of processes
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # of this process on its machine
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    if local_rank > 0:
        dist.barrier()  # until the first process here has downloaded the data
    digits = load_data(data)
    if dist.is_initialized() and local_rank == 0:
        dist.barrier()
    parts = split_data(digits)
    classifier = train_classifier(*parts["classifier"], seed)
    defaults = [str(inspect.signature(function)) for function in (AutoEncoder, train)]
    context = f"{digits.name} {len(digits.train_images)} {seed} {torch.__version__} {defaults}"

    def run_stage(stage, settings, part, seeds):
        """Each setting with each seed: its name → a list of results."""
        todo = [Trial(f"{stage} {name} seed {s}", setting, s, epochs, part)
                for name, setting in settings.items() for s in seeds]
        results = run_trials(todo, parts, classifier, out, context)
        return {name: [results[f"{stage} {name} seed {s}"] for s in seeds] for name in settings}

    # Random search
    settings = {f"random {i}": random_setting(f"{seed} {i}") for i in range(1, trials + 1)}
    tried = run_stage("try", settings, "choose", [seed])
    ranked = sorted(settings, key=lambda name: rank_key(tried[name][0]))

    # Confirmation
    candidates = {name: settings[name] for name in ranked[:2]}
    candidates |= {"default": DEFAULT, "784-400-20": PLAIN}
    seeds = [seed + 100 + repeat for repeat in range(REPEATS)]
    confirmed = run_stage("confirm", candidates, "confirm", seeds)
    passing = [name for name in candidates if all(map(passes, confirmed[name]))]
    if not passing:
        print("No setting passes the guards, so all take part in the choice.", flush=True)
        passing = list(candidates)
    scores = {name: [result["distance"] for result in confirmed[name]] for name in passing}
    winner = cheapest_of_the_best(scores, {name: cost(candidates[name]) for name in scores})

    # Test
    typical = settings[ranked[len(ranked) // 2]]
    shown = {"default": DEFAULT, "784-400-20": PLAIN, "typical": typical}
    shown[winner] = candidates[winner]
    seeds = [seed + 200 + repeat for repeat in range(REPEATS)]
    tested = run_stage("test", shown, "test", seeds)
    if not dist.is_initialized() or dist.get_rank() == 0:
        real, train_x = parts["test"][0], parts["train"][0]
        linear = linear_digits(train_x, 20_000, seed)
        tested["real digits"] = [judge(train_x[:20_000], real, classifier)]
        tested["PCA"] = [judge(linear, real, classifier)]
        print_report("when tried", {name: tried[name] for name in ranked})
        print_report("on fresh images", confirmed)
        print_report("on test images", tested)

        rows = [tried[name][0]["digits"] for name in ranked]  # the best on top
        sheet = torch.cat(rows).view(-1, 1, 28, 28)
        save_image(sheet, out / "contact_sheet.png", nrow=20, pad_value=0.5)
        print(f"\nThe winner is {winner}. To train it:\n"
              f"python autoencoder.py --epochs {epochs} {as_options(candidates[winner])}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return candidates[winner]


# ---- The command line --------------------------------------------------------------------

def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def make_parser(searching: bool) -> argparse.ArgumentParser:
    """The options of a training, or of a search."""
    parser = argparse.ArgumentParser(
        prog="autoencoder.py search" if searching else "autoencoder.py",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="data", help="folder of MNIST, downloaded if it is not there")
    add("--seed", type=int, default=0, help="random seed")
    if searching:
        parser.description = (
            "Choose settings by how natural the digits are that they generate. Two processes: "
            "torchrun --standalone --nproc-per-node 2 autoencoder.py search")
        add("--out", default="search", help="folder for results, from which a search goes on")
        add("--epochs", type=positive, default=3, help="passes over the training images")
        add("--trials", type=positive, default=20, help="random settings to try")
        return parser

    parser.description = (
        "Train an autoencoder on MNIST, check it and print a message of success. "
        "`autoencoder.py search --help` tells how to search for better settings.")
    model = inspect.signature(AutoEncoder).parameters  # so that defaults are written once
    add("--pics", default="pics", help="folder for pictures")
    add("--epochs", type=positive, default=10, help="passes over the training images")
    add("--device", help="cpu, cuda or mps; if not given, the fastest there is")
    add("--lr", type=float, default=1e-3, help="Adam's rate; its cycle peaks at 12 times this")
    add("--encoder-sizes", type=positive, nargs="*", metavar="N",
        default=model["encoder_sizes"].default, help="units of the encoder's hidden layers")
    add("--decoder-sizes", type=positive, nargs="*", metavar="N",
        default=model["decoder_sizes"].default, help="units of the decoder's hidden layers")
    add("--loss", choices=LOSSES, default=model["loss"].default, help="of a reconstruction")
    add("--l1", type=float, default=model["l1"].default,
        help="weight of the L1 norm of all parameters in the loss of a batch")
    add("--dropout", type=float, default=model["dropout"].default,
        help="probability of leaving out a hidden unit in training")
    add("--refinements", type=int, choices=range(10), metavar="N",
        default=model["refinements"].default, help="how often the encoder corrects its code")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    searching = argv[:1] == ["search"]
    parser = make_parser(searching)
    options = vars(parser.parse_args(argv[1:] if searching else argv))
    try:
        if searching:
            sys.stdout.reconfigure(errors="replace")  # for consoles without ±
            search(**options)
        else:
            # More threads hardly help so small a network, and others may need the cores.
            torch.set_num_threads(min(4, max(1, torch.get_num_threads() // 2)))
            model, digits = test_work(**options)
            save_generated(model, digits, Path(options["pics"]) / "generated.png")
    except AssertionError as error:
        parser.exit(1, f"{error}\n")
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")


if __name__ == "__main__":
    main()
