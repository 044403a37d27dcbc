"""Tests of autoencoder.py, and of what ANSWERS.md measures.

    python -m pytest -k "not answer"    the script alone: less than a minute
    python -m pytest                    also the tables and claims of the four answers
    python test_autoencoder.py          the tutorial recipe, which the script is compared with

The script does things; the tests claim things. First the contract: what the task's own test
function asks, in our words. Then a plain training loop that knows nothing of the script but
the class. Then the script's promises, part by part. Then a section for each answer: its
experiment, which measures, and its test, which claims.

SEEDS=7,8,9,10,11 measures the answers with other seeds, LONG=1 with the twenty that they
state, PICTURES=folder draws their pictures.
"""

import contextlib
import copy
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import MNIST

import autoencoder as ae

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"

torch.set_num_threads(1)  # which suits small networks, and processes beside each other
DIGITS = ae.Data(*ae.draw_digits(2000, seed=1), *ae.draw_digits(500, seed=2), "drawn digits")
SMALL = {"encoder_sizes": (32,), "decoder_sizes": (32,)}


@pytest.fixture(scope="session", autouse=True)
def sigterm_ends_the_tests_as_ctrl_c_does():
    """So SIGTERM also ends the processes that tests have started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def mnist():
    """MNIST, fetched if it is not there. Where it cannot be had, its tests are skipped."""
    digits = ae.load_data(DATA)
    if digits.name != "MNIST":
        pytest.skip("MNIST is not in the folder data, and cannot be downloaded")
    return digits


# ---- The contract ------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {},
    {"refinements": 0},
    {"encoder_sizes": (), "decoder_sizes": ()},
    {"encoder_sizes": (800,), "decoder_sizes": (800, 800), "dropout": 0.5, "refinements": 2},
])
def test_model_passes_the_published_check(settings):
    model = ae.AutoEncoder(inp_size=784, hid_size=20, **settings)
    x = torch.randn(1, 784)
    h = model.encode(x)
    recon_x = model.decode(h)
    assert h.dim() == 2 and h.size(1) == 20
    assert recon_x.dim() == 2 and recon_x.size(1) == 784

    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = {name.split(".")[0] for name in trainable}
    assert len(layers) <= 6
    assert all(size <= 800 for p in model.parameters() for size in p.shape)
    children = dict(model.named_children())
    for layer in layers:
        assert type(children[layer]) is nn.Linear
    ae.check_limits(model)


def test_arguments_are_positional_and_forward_decodes_what_it_encodes():
    model = ae.AutoEncoder(30, 4)
    x = torch.rand(5, 30)
    assert model.encode(x).shape == (5, 4)
    assert torch.equal(model(x), model.decode(model.encode(x)))


def test_loss_is_the_objective():
    """Σ ‖x − y‖₂ + λ ‖parameters‖₁, in NumPy; the gradient against finite differences."""
    torch.manual_seed(0)
    model = ae.AutoEncoder(6, 2, (4,), (3,), l1=0.5).double()
    for p in model.parameters():
        p.data *= 3  # so that the refinement matters
    x = torch.rand(5, 6, dtype=torch.float64)
    y = model(x)
    residual = (x - y).detach().numpy()
    parameters = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    objective = np.sqrt((residual ** 2).sum(axis=1)).sum() + 0.5 * np.abs(parameters).sum()
    loss = model.loss_function(y, x)
    assert loss.shape == () and loss.item() == pytest.approx(objective)

    def loss_of(*parameters):
        return model.loss_function(model(x), x)

    assert torch.autograd.gradcheck(loss_of, tuple(model.parameters()))


def test_train_runs_ten_epochs_prints_and_saves_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20, **SMALL)
    loader = DataLoader(TensorDataset(*DIGITS[2:4]), batch_size=50)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert ae.train(model, optimizer, loader, loader) is model
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    losses = []
    for epoch, line in enumerate(lines, start=1):
        form = rf"epoch +{epoch}/10  train loss ([\d.]+)  test loss ([\d.]+)  [\d.]+ s"
        losses.append(float(re.fullmatch(form, line).group(2)))
        assert Path(f"pics/reconstruction_{epoch}.png").is_file()
    assert losses[-1] < 0.8 * losses[0]


def test_success_is_the_last_line_below_right_figures(tmp_path, monkeypatch, capsys):
    def counted(train_x, test_x, size):
        return len(train_x) / len(test_x) / size

    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)
    monkeypatch.setattr(ae, "pca_error", counted)
    model = ae.test_work(pics=tmp_path, epochs=1, lr=0.0005, device="cpu")
    first, *_, errors, _, last = capsys.readouterr().out.splitlines()
    assert "4 batches" in first and "12 times" in first  # it trains by the fast recipe
    assert last == "Success!🎉" and "(PCA): 0.20000" in errors
    x = DIGITS.test_images.flatten(1)
    error = float(re.search(r"\(drawn digits\): ([\d.]+)", errors)[1])
    assert error == pytest.approx((model(x) - x).square().mean().item(), abs=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["generated.png", "reconstruction_1.png"]
    assert Image.open(tmp_path / "generated.png").size == (10 * 30 + 2, 10 * 30 + 2)


@pytest.mark.parametrize("name, value, message", [
    ("AutoEncoder", None, "Error during model creation"),
    ("train", None, "Error during training"),
])
def test_a_fault_is_announced_and_seen(tmp_path, monkeypatch, capsys, name, value, message):
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)
    monkeypatch.setattr(ae, name, value)
    with pytest.raises(TypeError, match="not callable"):
        ae.test_work(pics=tmp_path, device="cpu")
    out = capsys.readouterr().out
    assert message in out and "Success" not in out


@pytest.mark.parametrize("error, pictures", [(0.05, True), (0.01, False)])
def test_success_needs_a_lower_error_than_pca_and_all_pictures(
        tmp_path, monkeypatch, capsys, error, pictures):
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)
    monkeypatch.setattr(ae, "evaluate", lambda model, loader: (1.0, error))
    monkeypatch.setattr(ae, "pca_error", lambda train_x, test_x, size: 0.05)
    if not pictures:
        (tmp_path / "generated.png").mkdir()  # it is in the way
    with pytest.raises(AssertionError if pictures else OSError):
        ae.test_work(pics=tmp_path, epochs=1, device="cpu", **SMALL)
    assert "Success" not in capsys.readouterr().out


class Broken(ae.AutoEncoder):
    """A model that breaks one limit of the task."""

    def __init__(self, inp_size, hid_size, fault):
        super().__init__(inp_size, hid_size, (32,), (32,), refinements=0)
        self.fault = fault
        if fault == "deep":
            self.more1, self.more2, self.more3 = (nn.Linear(2, 2) for _ in range(3))
        if fault == "wide":
            self.more = nn.Linear(2, 801)
        if fault == "nested":
            self.more = nn.Sequential(nn.Linear(2, 2))
        if fault == "convolution":
            self.more = nn.Conv2d(1, 1, 3)
        if fault == "bare":
            self.more = nn.Parameter(torch.ones(2))

    def encode(self, x):
        h = super().encode(x)
        return h[:, :19] if self.fault == "code" else h

    def decode(self, h):
        if self.fault == "code":
            return torch.zeros(1, 784)
        y = super().decode(h)
        return y.unsqueeze(1) if self.fault == "image" else y


@pytest.mark.parametrize("fault, message", [
    ("code", r"\(1, 19\), not \(1, 20\)"),
    ("image", r"\(1, 1, 784\), not \(1, 784\)"),
    ("deep", "7 layers"),
    ("wide", "more.weight has a dimension above 800"),
    ("nested", r"more\.0.weight does not belong to an nn.Linear child"),
    ("convolution", "more.weight does not belong to an nn.Linear"),
    ("bare", "more does not belong to an nn.Linear"),
])
def test_a_model_that_breaks_a_limit_is_not_even_trained(monkeypatch, fault, message):
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)
    monkeypatch.setattr(ae, "AutoEncoder", lambda **sizes: Broken(**sizes, fault=fault))
    monkeypatch.setattr(ae, "train", lambda *arguments: pytest.fail("it was trained"))
    with pytest.raises(AssertionError, match=message):
        ae.test_work(device="cpu")


# ---- A training loop of one's own, and the tutorial's ------------------------------------

def test_autoencoder_learns_in_a_foreign_loop_with_a_foreign_loader():
    """A loop as in PyTorch's tutorials: nothing of the script but the class takes part."""
    torch.manual_seed(0)
    dataset = list(zip(DIGITS.train_images, DIGITS.train_labels.tolist()))
    loader = DataLoader(dataset, batch_size=32, shuffle=True)
    model = ae.AutoEncoder(784, 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    averages = []
    for epoch in range(3):
        total = 0.0
        for images, labels in loader:
            x = images.view(images.size(0), -1)
            loss = model.loss_function(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        averages.append(total / len(dataset))
    assert averages[-1] < 0.8 * averages[0]


class TutorialModel(nn.Sequential):
    """784-529-274-20 and back with ReLU, as a tutorial would write it."""

    def __init__(self):
        super().__init__(
            nn.Linear(784, 529), nn.ReLU(), nn.Linear(529, 274), nn.ReLU(), nn.Linear(274, 20),
            nn.Linear(20, 274), nn.ReLU(), nn.Linear(274, 529), nn.ReLU(), nn.Linear(529, 784),
            nn.Sigmoid())

    def loss_function(self, recon_x, x):
        return torch.linalg.vector_norm(recon_x - x, dim=1).sum()


def tutorial_recipe(folder, epochs=10):
    """The same task by the book: images loaded one by one, batches of 50, Adam at 0.001."""
    start = time.perf_counter()
    torch.manual_seed(0)
    loaders = [DataLoader(MNIST(folder, train=part, transform=transforms.ToTensor()),
                          batch_size=50, shuffle=True) for part in (True, False)]
    model = TutorialModel()
    ae.train(model, torch.optim.Adam(model.parameters(), lr=1e-3), *loaders, epochs)
    _, error = ae.evaluate(model, loaders[1])
    print(f"tutorial recipe: mean squared error per pixel on the test images {error:.5f}, "
          f"{time.perf_counter() - start:.0f} s in all")


def test_answer_the_script_reaches_its_error_on_mnist(tmp_path, mnist, under_way, capfd):
    """A whole training, beside the answers' experiments, which `under_way` starts here."""
    with capfd.disabled():
        model = ae.test_work(DATA, tmp_path, device="cpu")
    test_loader = DataLoader(TensorDataset(*mnist[2:4]), batch_size=1000)
    assert ae.evaluate(model, test_loader)[1] <= 0.0051
    train_x, test_x = mnist.train_images.flatten(1), mnist.test_images.flatten(1)
    assert ae.pca_error(train_x, test_x, 20) == pytest.approx(0.0235, abs=0.0001)


# ---- The model ---------------------------------------------------------------------------

@pytest.mark.parametrize("settings, refinements", [
    ({}, 1), ({"refinements": 0}, 0), ({"refinements": 2}, 2)])
def test_reconstruction_is_its_formula(settings, refinements):
    """Six layers written out, SiLU as x / (1 + exp(−x)), in the order that `print` shows."""
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20, **settings)
    layers = list(model.children())
    assert [layer.in_features for layer in layers] == [784, 144, 288, 20, 288, 288]
    assert [layer.out_features for layer in layers] == [144, 288, 20, 288, 288, 784]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def encoder(x):
        return layers[2](silu(layers[1](silu(layers[0](x)))))

    def decoder(h):
        return 1 / (1 + torch.exp(-layers[5](silu(layers[4](silu(layers[3](h)))))))

    x = torch.rand(5, 784)
    h = encoder(x)
    for _ in range(refinements):
        h = h + encoder(x) - encoder(decoder(h))
    torch.testing.assert_close(model.encode(x), h)
    torch.testing.assert_close(model(x), decoder(h))


def test_a_layer_that_is_used_twice_is_used_twice():
    twice = ae.AutoEncoder(32, 32, (32, 32), (), refinements=0)
    twice.encoder2 = twice.encoder1
    x = torch.rand(5, 32)
    hidden = F.silu(twice.encoder1(F.silu(twice.encoder1(x))))
    torch.testing.assert_close(twice.encode(x), twice.encoder3(hidden))


def test_dropout_leaves_out_hidden_units_in_training_only():
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20, (400,), (), dropout=0.25, refinements=0)
    with torch.no_grad():
        model.encoder1.weight.zero_()
        model.encoder1.bias.fill_(1.0)  # each hidden unit is silu(1)
        model.encoder2.weight.fill_(1.0)
        model.encoder2.bias.zero_()
    x = torch.rand(2000, 784)
    one = F.silu(torch.tensor(1.0)).item()
    kept = model.encode(x).detach()[:, 0] / (one / 0.75)  # of 400 units
    assert kept.mean() == pytest.approx(300, abs=2)
    assert kept.std() == pytest.approx(75 ** 0.5, rel=0.1)  # of a binomial distribution
    model.eval()
    assert model.encode(x)[:, 0].tolist() == pytest.approx([400 * one] * 2000, rel=1e-4)


@pytest.mark.parametrize("name, formula", [
    ("euclidean", lambda y, x: np.sqrt(((x - y) ** 2).sum(axis=1)).sum()),
    ("squared", lambda y, x: ((x - y) ** 2).sum()),
    ("absolute", lambda y, x: np.abs(x - y).sum()),
    ("cross-entropy", lambda y, x: -(x * np.log(y) + (1 - x) * np.log(1 - y)).sum()),
])
def test_each_loss_is_its_formula(name, formula):
    x, y = torch.rand(2, 4, 784, dtype=torch.float64)
    loss = ae.AutoEncoder(784, 20, loss=name).loss_function
    assert loss(y, x).item() == pytest.approx(formula(y.numpy(), x.numpy()), rel=1e-5)
    exact = x.round().requires_grad_()
    loss(exact, x.round()).backward()
    assert exact.grad.isfinite().all()


# ---- Training ----------------------------------------------------------------------------

def test_train_does_what_it_is_told(tmp_path, monkeypatch):
    """By default it is the plain loop, at the rate that the caller's own schedule sets."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20, **SMALL, loss="cross-entropy")
    plain = copy.deepcopy(model)
    loader = DataLoader(TensorDataset(*DIGITS[2:4]), batch_size=50)
    results = []
    for trained in (model, plain):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-5)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        if trained is model:
            ae.train(model, optimizer, loader, None, epochs=2)
        else:
            for images, _ in [*loader, *loader]:
                optimizer.zero_grad()
                x = images.flatten(1)
                plain.loss_function(plain(x), x).backward()
                optimizer.step()
        results.append(optimizer.param_groups[0]["lr"])
    assert results[0] == results[1] < 1e-6
    for left, right in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(left, right)
    assert os.listdir(tmp_path) == []  # without a test loader it saves nothing


def test_the_fast_recipe_joins_batches_and_goes_through_one_cycle():
    rates, sizes = [], []
    model = ae.AutoEncoder(784, 20, **SMALL)
    first, *others = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 3e-5}, {"params": others}],
                                lr=1e-5, momentum=0.9)
    optimizer.register_step_pre_hook(
        lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    loader = DataLoader(TensorDataset(*DIGITS[2:4]), batch_size=50)  # 10 batches, 3 steps
    ae.train(model, optimizer, loader, None, epochs=7, fast=True)
    assert sizes == 7 * [200, 200, 100]
    cycle = np.interp(np.arange(22), [0, 0.3 * 22 - 1, 21], [12 / 25, 12, 12 / 25e4])
    assert np.array(rates) == pytest.approx(cycle[:21, None] * [3e-5, 1e-5])
    assert 0 < optimizer.param_groups[1]["lr"] < 1e-9  # afterwards
    assert optimizer.param_groups[1]["momentum"] == 0.9


def test_losses_are_averages_per_image(tmp_path, capsys):
    """Also where the last batch is smaller; in training they are those before each step."""
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20, **SMALL, loss="squared", dropout=0.5)
    images = torch.cat([DIGITS.test_images[:50], torch.zeros(30, 1, 28, 28)])
    loader = DataLoader(TensorDataset(images, DIGITS.test_labels[:80]), batch_size=50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ae.train(model, optimizer, loader, loader, epochs=1, pics=tmp_path)
    *_, line = capsys.readouterr().out.splitlines()
    train_loss, test_loss = map(float, re.findall(r"loss ([\d.]+)", line))
    x = images.flatten(1)
    squares = (model(x) - x).square().sum(dim=1)
    assert test_loss == pytest.approx(squares.mean().item(), abs=1e-4)
    loss, error = ae.evaluate(model, loader)
    assert loss == pytest.approx(squares.mean().item(), rel=1e-5)
    assert error == pytest.approx(squares.mean().item() / 784, rel=1e-5)
    assert train_loss != pytest.approx(test_loss, rel=1e-4)  # with dropout
    model.dropout = 0.0
    assert not ae.train(model, optimizer, loader, loader, epochs=1, pics=tmp_path).training
    train_loss, test_loss = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    assert float(train_loss) == pytest.approx(float(test_loss), abs=2e-4)


@pytest.mark.parametrize("batch_size", [50, 1])
def test_pictures_show_the_first_eight_test_images_above_their_reconstructions(
        tmp_path, batch_size):
    model = ae.AutoEncoder(784, 20, **SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = DataLoader(TensorDataset(*DIGITS[2:4]), batch_size=batch_size)
    ae.train(model, optimizer, loader, loader, epochs=1, pics=tmp_path)
    picture = np.array(Image.open(tmp_path / "reconstruction_1.png"))[:, :, 0] / 255
    assert picture.shape == (2 * 30 + 2, 8 * 30 + 2)
    shown = DIGITS.test_images[:8]
    made = model(shown.flatten(1)).detach().view(shown.shape)
    for row, images in enumerate([shown, made]):
        for column, image in enumerate(images):
            top, left = 2 + 30 * row, 2 + 30 * column
            part = picture[top:top + 28, left:left + 28]
            assert np.abs(part - image[0].numpy()).max() < 0.005


def test_a_loss_that_is_not_finite_is_an_error():
    model = ae.AutoEncoder(784, 20, loss="cross-entropy")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    loader = DataLoader(TensorDataset(*DIGITS[2:4]), batch_size=50)
    with pytest.raises(FloatingPointError, match="epoch 1.*lower the learning rate"):
        ae.train(model, optimizer, loader, None, epochs=2)


def test_pca_error_matches_a_singular_value_decomposition():
    train_x, test_x = (images.flatten(1) for images in (DIGITS[0], DIGITS[2]))
    mean = train_x.numpy().mean(axis=0)
    _, _, directions = np.linalg.svd(train_x.numpy() - mean, full_matrices=False)
    centred = test_x.numpy() - mean
    residual = centred - centred @ directions[:20].T @ directions[:20]
    assert ae.pca_error(train_x, test_x, 20) == pytest.approx((residual ** 2).mean(), rel=1e-3)


# ---- Data --------------------------------------------------------------------------------

def write_mnist(folder, count):
    """Files as torchvision expects them, with drawn digits."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, seed in (("train", 1), ("t10k", 2)):
        images, labels = ae.draw_digits(count, seed)
        pixels = (255 * images).byte().numpy().tobytes()
        sizes = np.array([count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels)
        digits = labels.byte().numpy().tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + digits)


def test_mnist_is_read_as_whole_tensors(tmp_path):
    write_mnist(tmp_path, count=12)
    data = ae.load_data(tmp_path)
    images, labels = ae.draw_digits(12, 1)
    assert data.name == "MNIST" and torch.equal(data.train_labels, labels)
    torch.testing.assert_close(data.train_images, images, atol=1 / 255, rtol=0)
    assert torch.equal(data.test_labels, ae.draw_digits(12, 2)[1])


def says_nothing(connection):
    time.sleep(5)


def says_half(connection):
    connection.recv(1000)
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 9912422\r\n\r\nhalf")


@pytest.mark.parametrize("behaviour", ["refuses", says_nothing, says_half])
def test_without_a_usable_network_digits_are_drawn_and_a_line_says_so(
        tmp_path, monkeypatch, capsys, behaviour):
    def serve():
        with contextlib.suppress(OSError):  # when the test is over
            while True:
                connection, _ = server.accept()
                with connection:
                    behaviour(connection)

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if behaviour != "refuses":
            server.listen()
            threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setattr(ae, "TIMEOUT", 0.2)
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        monkeypatch.setattr(ae, "draw_digits", lambda count, seed: (count, seed))
        before = socket.getdefaulttimeout()
        data = ae.load_data(tmp_path / "new" / "folder")
    assert data == (60_000, 0, 10_000, 1, "drawn digits")
    out = capsys.readouterr().out
    assert "Drawn digits take its place" in out and str(tmp_path) in out
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("length", [9423, 0])  # of 9424 bytes
def test_damaged_files_are_not_taken_for_mnist(tmp_path, monkeypatch, capsys, length):
    write_mnist(tmp_path, count=12)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    monkeypatch.setattr(ae, "draw_digits", lambda count, seed: DIGITS[:2])
    assert ae.load_data(tmp_path).name == "drawn digits"
    assert f"delete {tmp_path / 'MNIST'}" in capsys.readouterr().out


def test_drawn_digits_are_bright_on_dark_and_told_apart_by_their_labels():
    images, labels = DIGITS[:2]
    assert images.shape == (2000, 1, 28, 28) and images.min() == 0 and images.max() <= 1
    assert images[:, :, 0].mean() < 0.01 < images.mean() < 0.3
    assert labels.unique().tolist() == list(range(10))
    means = torch.stack([images[labels == digit].mean(dim=0) for digit in range(10)])
    nearest = torch.cdist(DIGITS.test_images.flatten(1), means.flatten(1)).argmin(dim=1)
    assert (nearest == DIGITS.test_labels).float().mean() > 0.6
    assert torch.equal(ae.draw_digits(50, 1)[0], ae.draw_digits(50, 1)[0])
    assert not torch.equal(ae.draw_digits(50, 1)[0], ae.draw_digits(50, 2)[0])


def test_a_loader_gives_each_image_once_with_its_label_in_a_new_order():
    images, labels = torch.arange(120.0).view(-1, 1, 1, 1), torch.arange(120)
    loader = ae.make_loader(images, labels, batch_size=50, seed=0)
    epochs = [list(loader), list(loader)]
    orders = []
    for batches in epochs:
        assert [len(x) for x, _ in batches] == [50, 50, 20] and len(loader) == 3
        order = torch.cat([y for _, y in batches])
        assert torch.equal(torch.cat([x for x, _ in batches]).flatten(), order.float())
        assert order.sort().values.tolist() == list(range(120))
        orders.append(order)
    assert not torch.equal(*orders)
    again = torch.cat([y for _, y in ae.make_loader(images, labels, 50, seed=0)])
    assert torch.equal(again, orders[0])


# ---- Generation, and how natural it is ---------------------------------------------------

class Identity(nn.Module):
    """A model whose codes are its images."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=dtype))

    def encode(self, x):
        return x

    def decode(self, h):
        return h

    def forward(self, x):
        return x


def test_frechet_distance_is_that_of_the_formula():
    """For diagonal covariances: Σ (μ_a − μ_b)² + (σ_a − σ_b)²; and it forgets rotations."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 4000, 5, dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T
    b = (b - b.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(b.T))).T
    a, b = 2 * a, b * torch.tensor([1.0, 2, 3, 4, 5]) + 0.5
    expected = 5 * 0.25 + 1 + 0 + 1 + 4 + 9
    assert ae.frechet_distance(a, b) == pytest.approx(expected)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert ae.frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_and_generator_give_back_two_clouds(dtype):
    torch.manual_seed(0)
    mix = torch.tensor([[1.0, 0.5], [0.0, 0.3]])
    clouds = torch.randn(4000, 2) @ mix
    clouds[:1000] += 12
    clouds = clouds[torch.randperm(4000)].to(dtype)
    density = ae.fit_density(Identity(dtype), clouds, components=2)
    assert sorted(density.weights.tolist()) == pytest.approx([0.25, 0.75])
    generated = ae.generate(Identity(dtype), density, 8000, seed=1)
    assert generated.dtype == dtype
    near, far = (generated[(generated.mean(1) > 6) == side] for side in (False, True))
    assert (len(near), len(far)) == (6000, 2000)  # exact shares
    torch.testing.assert_close(far.mean(0), clouds[clouds.mean(1) > 6].mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(near.T), (mix.T @ mix).to(dtype), atol=0.06, rtol=0)
    assert 0.2 < (generated[:1000].mean(1) > 6).double().mean() < 0.3  # in random order
    assert torch.equal(generated, ae.generate(Identity(dtype), density, 8000, seed=1))
    assert not torch.equal(generated, ae.generate(Identity(dtype), density, 8000, seed=2))
    exact = density.weights @ density.means  # since normal vectors come in pairs
    torch.testing.assert_close(generated.mean(0).double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("codes", [torch.rand(5, 2), torch.eye(2).repeat(150, 1)])
def test_density_of_few_or_repeated_codes(codes):
    generated = ae.generate(Identity(), ae.fit_density(Identity(), codes), 1000)
    assert torch.cdist(generated, codes).amin(dim=1).max() < 0.2


def test_harden_is_its_formula():
    x = torch.tensor([5 * [0.4] + 5 * [0.6] + [0.3, 0.1, 0.0]])  # the ten brightest: 0.5
    expected = 1 / (1 + np.exp(-12 * (x.numpy() / 0.5 - 0.6)))
    torch.testing.assert_close(ae.harden(x), torch.from_numpy(expected))
    assert ae.harden(torch.zeros(1, 784)).max() < 0.01


def test_guards_see_a_missing_class_and_copies():
    classes = torch.arange(1000) % 10
    assert ae.class_balance(classes, classes) == 1
    assert ae.class_balance(classes[classes != 4], classes) == 0
    rare = torch.cat([classes, classes[classes != 4]])  # 100 fours of 1,900
    assert ae.class_balance(rare, classes) == pytest.approx(10 / 19)
    torch.manual_seed(0)
    seen, held_out, new = torch.rand(3, 600, 784)
    assert ae.copy_ratio(Identity(), seen.flip(0), held_out, seen) == 0
    assert ae.copy_ratio(Identity(), new, held_out, seen) == pytest.approx(1, abs=0.02)
    assert ae.copy_ratio(Identity(), 2 * new, held_out, seen) > 1.5
    medians = [torch.tensor(x)[:, None] for x in ([1.0, 1, 9], [2.0, 2, 2], [0.0])]
    assert ae.copy_ratio(Identity(), *medians) == 0.5
    model = ae.AutoEncoder(784, 20, **SMALL)
    decoded = [model(x).detach() for x in (new, held_out, seen)]
    assert ae.copy_ratio(model, new, held_out, seen) == pytest.approx(
        ae.copy_ratio(Identity(), *decoded))


@pytest.mark.parametrize("balance, novelty, passed", [
    (0.5, 0.85, True), (0.49, 1.0, False), (0.8, 0.84, False)])
def test_limits_of_the_guards(balance, novelty, passed):
    assert ae.passes({"balance": balance, "novelty": novelty}) == passed


def test_features_have_one_length_and_do_not_depend_on_brightness():
    classifier = ae.train_classifier(ae.harden(DIGITS[0].flatten(1)), DIGITS[1], epochs=3)
    x = DIGITS.test_images.flatten(1)
    features, classes = ae.describe(classifier, x)
    assert (classes == DIGITS.test_labels).float().mean() > 0.8
    assert features.norm(dim=1).tolist() == pytest.approx([10] * len(x), rel=1e-4)
    torch.testing.assert_close(ae.describe(classifier, 0.5 * x)[0], features, atol=1e-3, rtol=0)
    assert not torch.allclose(ae.describe(classifier, x.flip(1))[0], features, atol=1)
    with torch.no_grad():
        logits = classifier(ae.harden(x))
    assert torch.equal(logits.argmax(1), classes)


def test_judge_compares_what_is_generated_with_what_is_held_out(monkeypatch):
    made = {}
    monkeypatch.setattr(ae, "frechet_distance", lambda a, b: (a.sum() - b.sum()).item())
    monkeypatch.setattr(ae, "describe", lambda _, x: (x.sum(1), made.setdefault(len(x), x)))
    monkeypatch.setattr(ae, "class_balance", lambda a, b: (len(a), len(b)))
    model, seen, real = ae.AutoEncoder(784, 20, **SMALL), DIGITS[0][:500], DIGITS[2]
    scores = ae.judge(model, seen.flatten(1), real.flatten(1), None, seed=3)
    assert scores["balance"] == (20_000, 500)
    density = ae.fit_density(model, seen.flatten(1))
    generated = ae.generate(model, density, 20_000, seed=3)
    assert torch.equal(made[20_000], generated)
    assert scores["distance"] == pytest.approx(generated.sum().item() - real.sum().item())
    x = real.flatten(1)
    assert scores["error"] == pytest.approx((model(x) - x).square().mean().item())
    assert scores["novelty"] == ae.copy_ratio(model, generated, x, seen.flatten(1))


# ---- The search --------------------------------------------------------------------------

def test_parts_of_the_data_are_disjoint_and_mixed():
    images, labels = torch.arange(1200.0).view(-1, 1, 1, 1), torch.arange(1200)
    parts = ae.split_data(images, labels, seed=0)
    sizes = {name: len(part[0]) for name, part in parts.items()}
    assert sizes == {"train": 800, "classifier": 200, "choose": 100, "confirm": 100}
    for x, y in parts.values():
        assert torch.equal(x.flatten(), y.float())
        assert abs(y.double().mean() - 600) < 120
    together = torch.cat([y for _, y in parts.values()])
    assert together.sort().values.tolist() == list(range(1200))
    other = ae.split_data(images, labels, seed=1)
    assert not torch.equal(parts["confirm"][1], other["confirm"][1])


def test_random_settings_are_as_described_and_no_two_train_the_same():
    for seed in range(50):
        draws = ae.draw_settings(20, seed)
        assert draws == ae.draw_settings(20, seed) != ae.draw_settings(20, seed + 1)
        losses = [draw["loss"] for draw in draws]
        assert all(losses.count(loss) == 5 for loss in ae.LOSSES)
        depths = [len(draw["encoder_sizes"]) for draw in draws]
        assert depths.count(0) == 4 and set(depths) == {0, 1, 2}
        for draw in draws:
            assert len(draw["encoder_sizes"]) == len(draw["decoder_sizes"])
            assert 0.0003 < draw["lr"] < 0.0033 and draw["l1"] <= 0.01
            assert draw["encoder_sizes"] or draw["dropout"] == 0
            arguments = {name: draw[name] for name in draw if name != "lr"}
            ae.check_limits(ae.AutoEncoder(784, 20, **arguments))
        trained = {tuple(draw.values()) for draw in draws}
        assert len(trained) == 20
    draws = sum((ae.draw_settings(20, seed) for seed in range(50)), [])
    assert 0.4 < np.mean([draw["l1"] == 0 for draw in draws]) < 0.6
    assert 0.35 < np.mean([draw["dropout"] > 0 for draw in draws]) < 0.45
    assert np.median([draw["lr"] for draw in draws]) == pytest.approx(0.001, rel=0.15)


@pytest.mark.parametrize("count, t", [(2, 12.71), (3, 4.303), (5, 2.776), (99, 2.262)])
def test_interval_is_its_formula(count, t):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).numpy()
    half = t * values.std(ddof=1) / count ** 0.5
    expected = [values.mean() - half, values.mean() + half]
    assert ae.interval(torch.from_numpy(values)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shift, spread, verdict", [
    (0.05, 0.02, "equal"), (0.3, 0.02, "worse"), (0.3, 0.5, "undecided"),
    (0.1, 0.001, "equal"), (0.16, 0.001, "worse"), (0.1, 0.2, "undecided")])
def test_verdicts_follow_from_the_interval_of_paired_differences(shift, spread, verdict):
    luck = torch.tensor([0.5, -0.5, 0.3, -0.4, 0.1])  # shared by both: it cancels out
    best = 1 + luck
    other = best + shift + spread * torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0])
    for unit in (1, 0.1):  # the margin is a share of the best mean
        verdicts = ae.compare({"other": unit * other, "best": unit * best})
        assert verdicts == {"other": verdict, "best": "best"}


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A search whose trainings take no time. `score(setting, seed, images)` gives scores;
    the calls are noted."""
    def train_setting(setting, images, labels, epochs, seed):
        torch.manual_seed(seed)
        arguments = {name: setting[name] for name in setting if name != "lr"}
        model = ae.AutoEncoder(784, 20, **arguments)
        model.trained = setting, seed, epochs, len(images)
        notes.append(model.trained)
        return model

    def judge(model, seen, real, classifier, seed):
        setting, trained_seed, *_ = model.trained
        assert seed == trained_seed and torch.equal(seen, parts["train"][0])
        judged_by = [name for name, part in parts.items() if torch.equal(part[0], real)]
        good = {"distance": 1.0, "balance": 0.8, "novelty": 1.0, "error": 0.01}
        return good | score[0](setting, seed, *judged_by)

    def train_classifier(images, labels, seed):
        assert seed == 7 and torch.equal(images, ae.harden(parts["classifier"][0]))

    def run(how, images=DIGITS[0], out=tmp_path / "out", **options):
        notes.clear()
        score[:] = [how]
        parts.update(ae.split_data(images, DIGITS[1], seed=7))
        found = ae.search(images, DIGITS[1], 4, repetitions=3, seed=7, out=out, **options)
        return found, notes

    parts, score, notes = {}, [], []
    monkeypatch.setattr(ae, "train_classifier", train_classifier)
    monkeypatch.setattr(ae, "train_setting", train_setting)
    monkeypatch.setattr(ae, "judge", judge)
    return run


def last_draws_are_best(setting, seed, judged_by):
    """By the images that serve to choose; by the others, those set by hand are."""
    draws = ae.draw_settings(4, 7)
    if judged_by == "choose":
        return {"distance": 9.0 - draws.index(setting)}
    by_hand = setting in ae.BY_HAND.values()
    return {"distance": (1 if by_hand else 2) + 0.001 * (seed % 3)}


def test_search_tries_then_confirms_with_fresh_seeds_and_images(pretended):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found, notes = pretended(last_draws_are_best, epochs=2)
    draws = ae.draw_settings(4, 7)
    assert [draw["setting"] for draw in found.draws] == draws[::-1]
    candidates = [draws[3], draws[2], *ae.BY_HAND.values()]
    tried, confirmed = notes[:4], notes[4:]
    assert [setting for setting, *_ in tried] == draws and len(confirmed) == 12
    for setting in candidates:
        seeds = [seed for trained, seed, *_ in confirmed if trained == setting]
        assert len(set(seeds)) == 3 and 7 not in seeds
        assert sorted(seeds) == sorted(seed for _, seed, *_ in confirmed[:3])  # paired
    assert {(epochs, count) for *_, epochs, count in notes} == {(2, 1336)}
    names = ["best draw", "second draw", "default", "784-400-20"]
    assert list(found.candidates) == names and found.winner == "784-400-20"
    assert [found.verdicts[name] for name in names[:2]] == ["worse", "worse"]
    assert sorted([found.verdicts[name] for name in names[2:]]) == ["best", "equal"]
    assert torch.equal(found.seen, ae.split_data(*DIGITS[:2], seed=7)["train"][0])
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_what_misses_classes_or_copies_is_refused(pretended, tmp_path):
    def cheats(setting, seed, judged_by):
        scores = last_draws_are_best(setting, seed, judged_by)
        if setting == ae.BY_HAND["784-400-20"] and seed % 3 == 0:  # one training is enough
            scores |= {"novelty": 0.8}
        if setting == ae.draw_settings(4, 7)[3]:
            scores |= {"balance": 0.4}
        return scores

    found, _ = pretended(cheats)
    assert found.draws[-1]["setting"] == ae.draw_settings(4, 7)[3]
    assert found.verdicts["784-400-20"] == "refused" and found.winner == "default"
    found, _ = pretended(lambda *_: {"balance": 0.4}, out=tmp_path / "all")
    assert "refused" not in found.verdicts.values()  # unless all are


def test_an_undecided_setting_does_not_win(pretended):
    found, _ = pretended(lambda setting, seed, _: {
        "distance": (0.9, 1.0, 1.6)[seed % 3] if setting == ae.BY_HAND["784-400-20"]
        else 1.0 if setting == ae.BY_HAND["default"] else 5.0})
    assert found.verdicts["784-400-20"] == "undecided" and found.winner == "default"


def test_a_search_goes_on_where_it_stopped(pretended, tmp_path):
    whole, notes = pretended(last_draws_are_best)
    assert len(notes) == 16
    damaged, other, missing = [tmp_path / "out" / f"draw {i} seed 7.pt" for i in (1, 2, 3)]
    damaged.write_bytes(damaged.read_bytes()[:1000])
    missing.unlink()
    result = torch.load(other, weights_only=False)
    torch.save(result | {"setting": result["setting"] | {"lr": 0.5}}, other)
    again, notes = pretended(last_draws_are_best)
    assert [setting for setting, *_ in notes] == ae.draw_settings(4, 7)[:3]
    assert again.verdicts == whole.verdicts and len(list((tmp_path / "out").iterdir())) == 16
    assert len(pretended(last_draws_are_best, epochs=9)[1]) == 16
    assert len(pretended(last_draws_are_best, 0.5 * DIGITS[0], epochs=9)[1]) == 16


def test_a_setting_is_trained_as_the_test_function_trains(tmp_path, monkeypatch):
    """The same setting, seed and epochs on the same images: the same reconstructions."""
    setting = {"lr": 0.002, **SMALL}
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)
    monkeypatch.setattr(ae, "pca_error", lambda train_x, test_x, size: 0.5)
    one = ae.test_work(pics=tmp_path, epochs=2, seed=3, device="cpu", **setting)
    two = ae.train_setting(setting, *DIGITS[:2], epochs=2, seed=3).eval()
    x = DIGITS.test_images[:100]
    torch.testing.assert_close(one(x.flatten(1)), two(x.flatten(1)))


def run(*arguments, **environment):
    """Python in a process of its own, ended with this one."""
    with subprocess.Popen([sys.executable, *arguments], env=os.environ | environment,
                          encoding="utf-8", errors="replace",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            out, err = process.communicate(timeout=200)
        finally:
            process.terminate()  # at which torchrun ends its own processes
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


FEWER_DIGITS = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import autoencoder as ae; generate = ae.generate
ae.generate = lambda model, density, count, seed=0: generate(model, density, min(count, 1000), seed)
ae.main(sys.argv[1:])
"""


def test_two_processes_under_torchrun_find_what_one_finds(tmp_path):
    write_mnist(tmp_path, count=480)
    (tmp_path / "fast.py").write_text(FEWER_DIGITS)
    search = f"{tmp_path / 'fast.py'} search --data {tmp_path} --draws 3 --epochs 1 --out"
    alone = run(*search.split(), tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    together = run(*torchrun.split(), *search.split(), tmp_path / "together")
    assert together.returncode == 0, together.stderr

    report = alone.stdout[alone.stdout.index("distance  balance"):]
    assert report in together.stdout
    assert together.stdout.count(" seed ") == alone.stdout.count(" seed ") == 23  # none twice
    for name in ("best draw", "second draw", "default", "784-400-20", "middle draw"):
        assert len(re.findall(rf"^{name} +\d", report, re.MULTILINE)) == 1
    tested = [line for line in report.splitlines() if len(re.findall(r"\d ± \d", line)) == 2]
    assert 2 <= len(tested) <= 3  # the winner and those set by hand
    assert re.search(r"correlation of distance and error: -?[\d.]+", report)
    assert re.search(r"winner is .*\. To train it: python autoencoder.py --epochs 1 --", report)
    sheet = Image.open(tmp_path / "together" / "sheet.png")
    assert sheet.height % 3 == 0 and np.array(sheet)[:, :280].any()


# ---- The command line --------------------------------------------------------------------

def call(command, capfd):
    """Exit status of a command, and the lines that it writes to its two outputs."""
    status = 0
    try:
        ae.main(command.split())
    except SystemExit as ended:
        status = ended.code
    return status, *(text.strip().splitlines() for text in capfd.readouterr())


def test_command_runs_without_data_network_and_emoji(tmp_path):
    """It draws digits, and saves both kinds of pictures before it says Success."""
    options = (f"--epochs 1 --encoder-sizes 32 --decoder-sizes 32 --device cpu "
               f"--data {tmp_path}/data --pics {tmp_path}/pics")
    nobody = "http://127.0.0.1:9"
    done = run(HERE / "autoencoder.py", *options.split(), https_proxy=nobody, http_proxy=nobody,
               PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "Drawn digits take its place" in done.stdout
    assert done.stdout.splitlines()[-1] == "Success!?"
    assert (tmp_path / "pics/generated.png").is_file()
    assert (tmp_path / "pics/reconstruction_1.png").is_file()


def test_checks_are_made_under_python_o(tmp_path):
    code = (f"import os, sys; sys.path.insert(0, {str(HERE)!r}); os.chdir({str(tmp_path)!r}); "
            "import autoencoder as ae; digits = ae.draw_digits(100, 0); "
            "ae.load_data = lambda folder: ae.Data(*digits, *digits, 'digits'); "
            "ae.main('--encoder-sizes 9 9 9 9'.split())")
    done = run("-O", "-c", code)
    assert done.returncode == 1 and "8 layers are trainable" in done.stderr
    assert "Success" not in done.stdout


def test_every_option_arrives(monkeypatch):
    arrived = []
    for name in ("test_work", "search_command"):
        monkeypatch.setattr(ae, name, lambda **options: arrived.append(options))
    given = {
        "data": "d", "pics": "p", "epochs": 2, "seed": 3, "device": "cpu", "lr": 0.01,
        "encoder_sizes": [40, 50], "decoder_sizes": [60], "loss": "squared", "l1": 0.1,
        "dropout": 0.2, "refinements": 2}
    threads = torch.get_num_threads()
    ae.main(("--data d --pics p --epochs 2 --seed 3 --device cpu --lr 0.01 --l1 0.1 "
             "--encoder-sizes 40 50 --decoder-sizes 60 --loss squared "
             "--dropout 0.2 --refinements 2").split())
    ae.main("search --data d --out o --epochs 2 --draws 5 --seed 3".split())
    ae.main([])
    ae.main(["search"])
    for setting in ae.draw_settings(5, 0):
        ae.main(ae.as_options(setting).split())
    torch.set_num_threads(threads)
    searched = {"data": "d", "out": "o", "epochs": 2, "draws": 5, "seed": 3}
    assert arrived[:4] == [given, searched, {}, {}]  # what is not given keeps its default
    understood = [{name: tuple(value) if isinstance(value, list) else value
                   for name, value in options.items()} for options in arrived[4:]]
    assert understood == ae.draw_settings(5, 0)  # as a search prints them


@pytest.mark.parametrize("command, message", [
    ("--epochs 0", "not from 1"),
    ("--encoder-sizes 900", "900 is not from 1 to 800"),
    ("--lr -1", "-1 is not from"),
    ("--l1 nan", "nan is not from"),
    ("--dropout 2", "2 is not from"),
    ("search --draws 1", "1 is not from 2"),
    ("--lr 0.1 search", "unrecognized arguments: search"),
    ("search --lr 0.1", "unrecognized arguments: --lr"),
    ("search --out file", "file"),
    ("--pics file", "file"),
])
def test_what_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch, capfd, command, message):
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    ended, out, err = call(command, capfd)
    assert ended and message in err[-1] and "Traceback" not in "".join(err)
    assert "Success" not in "".join(out)


def test_import_has_no_side_effects(tmp_path):
    code = (f"import os, torch; os.chdir({str(tmp_path)!r}); state = torch.get_rng_state(); "
            "import autoencoder; assert torch.equal(state, torch.get_rng_state())")
    done = run("-c", code, PYTHONPATH=str(HERE))
    assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, "", "", [])


# ==== The answers =========================================================================
#
# Each section below is one answer of ANSWERS.md. An experiment is a function of a seed that
# returns its tables, {table: {row: {column: number}}}, and the experiment `x` is tested by
# `test_answer_x`, which compares what came out with the tables in ANSWERS.md, and claims what
# the answer draws from them. Tools for several answers come first.

LONG = "LONG" in os.environ  # also measure what takes too long for every day
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "").split(",") if seed]
SEEDS = SEEDS or list(range(20 if LONG else 5))
PICTURES = os.environ.get("PICTURES")  # the folder for pictures, if they are wanted


def start_worker():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def under_way(request, mnist):
    """The experiments of all chosen tests, each with all SEEDS, in one pool of processes."""
    chosen = {item.name for item in request.session.items}
    experiments = [run for run in EXPERIMENTS if f"test_answer_{run.__name__}" in chosen]
    count = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))  # a container may not use all that there are
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start_worker)
    try:
        yield {run: [pool.submit(run, seed) for seed in SEEDS] for run in experiments}
    finally:  # also after Ctrl-C, when some still run
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


@pytest.fixture
def measure(under_way, capfd):
    """Called with an experiment: {table: {row: {column: an array with a value a seed}}}.

    What its test prints is seen, and every 20 seconds how many experiments are done.
    """
    def wait_for(experiment):
        jobs = under_way[experiment]
        everything = [job for jobs in under_way.values() for job in jobs]
        while wait(jobs, timeout=20).not_done:
            done = sum(job.done() for job in everything)
            print(f"\n  {done} of {len(everything)} experiments done", end="", flush=True)
        results = [job.result() for job in jobs]
        return {
            table: {
                row: {column: np.array([result[table][row][column] for result in results])
                      for column in cells}
                for row, cells in rows.items()}
            for table, rows in results[0].items()}

    with capfd.disabled():
        yield wait_for


def check_table(name, measured, allowed):
    """The table of ANSWERS.md below `<!-- name -->` states the means that were measured.

    measured   row → column → an array with a value for each seed
    allowed    column → how far the two may differ, as pytest.approx takes it, {"abs": 0.01}
               or {"rel": 0.2}; for one cell also (row, column)

    A cell is empty, or begins with the mean: 0.84 ± 0.05. Prints measured beside stated.
    """
    lines = (HERE / "ANSWERS.md").read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")[2]
    lines = lines.partition("\n\n")[0].replace("*", "").splitlines()  # without bold type
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert [row for row, *_ in rows] == list(measured), f"the rows of {name} differ"
    assert header[1:] == [key for key in allowed if isinstance(key, str)], f"columns of {name}"
    differing = []
    print(f"\n{name}: measured with {len(SEEDS)} seeds | stated")
    for row, *cells in rows:
        print(f"  {row}")
        for column, cell in zip(header[1:], cells):
            if not cell:
                assert column not in measured[row], f"{name}, {row}, {column}: nothing is stated"
                continue
            stated = float(re.match(r"-?[\d.]+", cell.replace("−", "-").replace(",", ""))[0])
            values = measured[row][column]
            spread = f" ± {values.std(ddof=1):.3g}" if len(values) > 1 else ""
            near = values.mean() == pytest.approx(stated, **allowed.get((row, column),
                                                                        allowed[column]))
            print(f"    {column:40} {values.mean():.4g}{spread} | {cell}{'' if near else ' !'}")
            if not near:
                differing.append(f"{row}, {column}: {values.mean():.4g}, stated {cell}")
    assert not differing, f"{name}: " + "; ".join(differing)


def claim(text, values, stated):
    """A claim of an answer: an effect has the stated sign and at least half its size.

    `values` holds the effect as it was measured with each seed, `stated` what the answer says.
    """
    mean = np.mean(values)
    spread = f" ± {np.std(values, ddof=1):.3g}" if len(values) > 1 else ""
    print(f"  claim: {text}: {mean:.3g}{spread} | {stated}")
    assert mean / stated >= 0.5, f"{text}: {mean:.3g}, stated {stated}"


def auroc(high, low):
    """How often a score of `high` exceeds one of `low`: the area under the ROC curve."""
    low = low.sort().values
    below = torch.searchsorted(low, high)
    equal = torch.searchsorted(low, high, right=True) - below
    return ((below + equal / 2).mean() / len(low)).item()


def falling_adam(model, steps, rate):
    """Adam and its schedule: the rate falls linearly from `rate` to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    return optimizer, schedule


def descend(loss, optimizer, schedule):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


def flipped(x, share):
    """Binary values x, a random `share` of them flipped."""
    return (x - (torch.rand_like(x) < share).float()).abs() if share else x


class NetworkStack(nn.Module):
    """`count` separate networks with two hidden layers, ReLU and dropout, run at once."""

    def __init__(self, count, inputs, width=128, outputs=10, dropout=0.2):
        super().__init__()
        self.dropout = dropout
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for size_in, size_out in [(inputs, width), (width, width), (width, outputs)]:
            normal = torch.randn(count, size_in, size_out)
            self.weights.append(normal * (2 / size_in) ** 0.5)
            self.biases.append(torch.zeros(count, 1, size_out))

    def last_hidden(self, x):
        """Before its ReLU. (count, n, inputs), or (n, inputs) for all → (count, n, width)"""
        x = x.expand(len(self.weights[0]), *x.shape[-2:])
        hidden = torch.baddbmm(self.biases[0], x, self.weights[0])
        hidden = F.dropout(hidden.relu(), self.dropout, self.training)
        return torch.baddbmm(self.biases[1], hidden, self.weights[1])

    def forward(self, x):
        """→ logits (count, n, outputs)"""
        hidden = F.dropout(self.last_hidden(x).relu(), self.dropout, self.training)
        return torch.baddbmm(self.biases[2], hidden, self.weights[2])


def fit_stack(networks, loss_function, x, targets, steps, rows=None, noise=0.0):
    """Adam, the rate falling linearly from 0.004 to 0, batches of 100 for each network.

    x (n, inputs), targets: a tuple of tensors (n, …)
    rows (count, m): the row numbers from which each network draws, if not from all
    noise: share of the (binary) inputs that is flipped afresh in each step
    """
    if rows is None:
        rows = torch.arange(len(x)).expand(len(networks.weights[0]), -1)
    optimizer, schedule = falling_adam(networks, steps, rate=0.004)
    networks.train()
    for _ in range(steps):
        batch = rows.gather(1, torch.randint(rows.shape[1], (len(rows), 100)))
        outputs = networks(flipped(x[batch], noise)).flatten(0, 1)
        loss = loss_function(outputs, *[target[batch.flatten()] for target in targets])
        descend(loss, optimizer, schedule)
    return networks.eval().requires_grad_(False)


def test_networks_in_a_stack_are_separate_networks():
    torch.manual_seed(0)
    stack, x = NetworkStack(3, inputs=5).eval(), torch.rand(3, 4, 5)
    for i in range(3):
        weights, biases = [w[i] for w in stack.weights], [b[i] for b in stack.biases]
        hidden = (x[i] @ weights[0] + biases[0]).relu()
        hidden = (hidden @ weights[1] + biases[1]).relu()
        alone = hidden @ weights[2] + biases[2]
        torch.testing.assert_close(stack(x)[i], alone, atol=1e-5, rtol=1e-4)



EXPERIMENTS = []


if __name__ == "__main__":
    tutorial_recipe(DATA)
