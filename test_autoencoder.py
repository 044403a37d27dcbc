"""Tests of autoencoder.py, and of what ANSWERS.md measures.

    python -m pytest -k "not answer"    the script alone: a minute
    python -m pytest                    also the figures and claims of the four answers

First the contract: what the task's own test function asks, in our words. Then the script,
part by part. Then a section for each answer: its experiments, the claims that it draws from
them, and checks of what they measure with. What needs MNIST is skipped where it is not in
the folder `data`. SEEDS=7,8,9,10,11 measures the answers with other seeds.
"""

import copy
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autoencoder as ae

HERE = Path(__file__).resolve().parent
HAS_MNIST = (HERE / "data/MNIST/raw/train-images-idx3-ubyte").is_file()
needs_mnist = pytest.mark.skipif(not HAS_MNIST, reason="MNIST is not in the folder data")

torch.set_num_threads(1)  # which suits small networks, and processes beside each other
DIGITS = ae.Data(*ae.draw_digits(2000, seed=1), *ae.draw_digits(500, seed=2), "drawn digits")


@pytest.fixture(scope="session", autouse=True)
def sigterm_ends_the_tests_as_ctrl_c_does():
    """So that what they have started is ended, too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


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


def test_loss_is_the_objective():
    """Σ ‖x − y‖₂ + λ ‖parameters‖₁, in NumPy; the gradient against finite differences."""
    torch.manual_seed(0)
    model = ae.AutoEncoder(6, 2, (4,), (3,), l1=0.5).double()
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


def test_gradient_is_finite_where_the_reconstruction_is_exact():
    x = torch.rand(3, 784)
    recon_x = x.clone().requires_grad_()
    ae.AutoEncoder(784, 20).loss_function(recon_x, x).backward()
    assert recon_x.grad.isfinite().all()


def test_train_runs_ten_epochs_prints_and_saves_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20, (32,), (32,))
    loader = DataLoader(TensorDataset(*DIGITS[2:4]), batch_size=50)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert ae.train(model, optimizer, loader, loader) is model
    first, *lines = capsys.readouterr().out.splitlines()
    assert "0 to 12 times 0.001" in first and "batches in a step: 4" in first
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
    model, digits = ae.test_work(pics=tmp_path, epochs=1, lr=0.0005, device="cpu")
    first, *_, errors, _, last = capsys.readouterr().out.splitlines()
    assert last == "Success!🎉"
    assert "times 0.0005" in first and "(PCA): 0.20000" in errors
    x = digits.test_images.flatten(1)
    error = float(re.search(r"\(drawn digits\): ([\d.]+)", errors)[1])
    assert error == pytest.approx((model(x) - x).square().mean().item(), abs=1e-5)
    assert os.listdir(tmp_path) == ["reconstruction_1.png"]


@pytest.mark.parametrize("change, message", [
    ({"AutoEncoder": None}, "error during model creation: .*not callable"),
    ({"train": None}, "error during training: .*not callable"),
    ({"train": lambda *arguments: None}, "does not beat the best linear code"),
])
def test_every_failure_is_reported_as_what_it_is(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)
    for name, value in change.items():
        monkeypatch.setattr(ae, name, value)
    with pytest.raises(AssertionError, match=message):
        ae.test_work(pics=tmp_path, epochs=1, device="cpu")


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
    ("code", r"representation has shape \(1, 19\)"),
    ("image", r"reconstruction has shape \(1, 1, 784\)"),
    ("deep", "7 layers"),
    ("wide", "more.weight has a dimension above 800"),
    ("nested", r"more\.0 is not an nn.Linear child"),
    ("convolution", "more is not an nn.Linear"),
    ("bare", "parameter is not an nn.Linear"),
])
def test_a_model_that_breaks_a_limit_is_not_even_trained(monkeypatch, fault, message):
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)
    monkeypatch.setattr(ae, "AutoEncoder", lambda **sizes: Broken(**sizes, fault=fault))
    monkeypatch.setattr(ae, "train", lambda *arguments: pytest.fail("it was trained"))
    with pytest.raises(AssertionError, match=f"model creation: .*{message}"):
        ae.test_work(device="cpu")


@needs_mnist
def test_answer_the_script_reaches_its_error_on_mnist(tmp_path, capfd):
    """A whole training; "answer" in its name keeps it out of the quick part."""
    with capfd.disabled():
        model, digits = ae.test_work(HERE / "data", tmp_path, device="cpu")
    test_loader = DataLoader(TensorDataset(*digits[2:4]), batch_size=1000)
    assert ae.evaluate(model, test_loader)[1] <= 0.0050
    train_x, test_x = digits.train_images.flatten(1), digits.test_images.flatten(1)
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
    loss = ae.AutoEncoder(784, 20, loss=name).loss_function(y, x)
    assert loss.item() == pytest.approx(formula(y.numpy(), x.numpy()))


def test_an_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="euclidean, squared, absolute, cross-entropy"):
        ae.AutoEncoder(784, 20, loss="mse")


# ---- Training ----------------------------------------------------------------------------

def test_the_learning_rate_goes_through_one_cycle_and_comes_back():
    """Twice: a second training starts from the rate that the optimizer has then."""
    rates = []
    model = ae.AutoEncoder(784, 20, (32,), (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def note(optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])

    optimizer.register_step_pre_hook(note)
    loader = DataLoader(TensorDataset(*DIGITS[2:4]), batch_size=50)  # 10 batches, 3 steps
    for rate in (1e-5, 2e-5):
        optimizer.param_groups[0]["lr"] = rate
        rates.clear()
        ae.train(model, optimizer, loader, None, epochs=3, quiet=True)
        cycle = np.interp(np.arange(1, 10) / 10, [0, 0.2, 1], [0, 12 * rate, 0])
        assert rates == pytest.approx(cycle)
        assert optimizer.param_groups[0]["lr"] == rate


def test_train_is_a_plain_loop_over_joined_batches(tmp_path, monkeypatch, capsys):
    """With `peak=None` and `quiet`, which prints and saves nothing."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20, (32,), (32,), loss="cross-entropy")
    plain = copy.deepcopy(model)
    loader = DataLoader(TensorDataset(*DIGITS[:2]), batch_size=50)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    ae.train(model, optimizer, loader, None, epochs=2, peak=None, quiet=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-5)
    for x in 2 * DIGITS.train_images.flatten(1).split(200):
        loss = plain.loss_function(plain(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert not capsys.readouterr().out and not os.listdir()


def test_rates_of_several_groups_come_back_also_after_a_failure(tmp_path):
    model = ae.AutoEncoder(784, 20, (32,), (32,))
    rates = [0.001 * i for i in range(1, 9)]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(model.parameters(), rates)]
    optimizer = torch.optim.Adam(groups)
    images = torch.rand(300, 1, 28, 28)
    images[250] = math.nan
    loader = DataLoader(TensorDataset(images, torch.zeros(300)), batch_size=50)
    with pytest.raises(FloatingPointError, match="nan in epoch 1.*lower the learning rate"):
        ae.train(model, optimizer, loader, loader, pics=tmp_path)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(p.isfinite().all() for p in model.parameters())


def test_losses_are_averages_per_image(tmp_path, capsys):
    """Also over a last batch that is smaller; the model is in training mode for steps only."""
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20, (32,), (32,), loss="cross-entropy")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    loader = DataLoader(TensorDataset(*DIGITS[2:4]), batch_size=99)
    ae.train(model, optimizer, loader, loader, epochs=1, pics=tmp_path)
    x = DIGITS.test_images.flatten(1)
    y = model(x).detach()
    average = F.binary_cross_entropy(y, x, reduction="sum").item() / len(x)
    error = (x - y).square().mean().item()
    line = capsys.readouterr().out.splitlines()[-1]
    printed = [float(loss) for loss in re.findall(r"loss ([\d.]+)", line)]
    assert printed == pytest.approx([average, average], rel=1e-5)
    assert ae.evaluate(model, loader) == pytest.approx((average, error), rel=1e-5)

    was_training = []
    model.register_forward_pre_hook(lambda model, _: was_training.append(model.training))
    ae.train(model, optimizer, loader, loader, epochs=2, pics=tmp_path)
    assert was_training == 2 * (2 * [True] + 7 * [False])  # steps; test batches and picture


def test_pictures_show_the_same_test_images_above_their_reconstructions(tmp_path):
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20, (32,), (32,))
    optimizer = torch.optim.Adam(model.parameters())
    train_loader = DataLoader(TensorDataset(*DIGITS[:2]), batch_size=50)
    test_loader = DataLoader(TensorDataset(*DIGITS[2:4]), batch_size=3, shuffle=True)
    ae.train(model, optimizer, train_loader, test_loader, epochs=2, pics=tmp_path)
    pictures = []
    for epoch in (1, 2):
        picture = Image.open(tmp_path / f"reconstruction_{epoch}.png").convert("L")
        pixels = torch.tensor(np.array(picture)) / 255
        assert pixels.shape == (2 * 30 + 2, 8 * 30 + 2)
        tiles = pixels[2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30)  # (2, 8, 28, 28)
        pictures.append(tiles.flatten(2))
    shown, reconstructed = pictures[1]
    assert torch.equal(pictures[0][0], shown)
    x = DIGITS.test_images.flatten(1)
    which = torch.cdist(shown, x).argmin(dim=1)
    torch.testing.assert_close(shown, x[which], rtol=0, atol=0.01)
    torch.testing.assert_close(reconstructed, model(x[which]).detach(), rtol=0, atol=0.01)


def test_an_empty_loader_is_refused(tmp_path):
    model = ae.AutoEncoder(784, 20, (32,), (32,))
    full = DataLoader(TensorDataset(*DIGITS[2:4]))
    empty = DataLoader(TensorDataset(torch.zeros(0, 1, 28, 28), torch.zeros(0)))
    for loaders in ((empty, full), (full, empty)):
        with pytest.raises(ValueError, match="has no images"):
            ae.train(model, torch.optim.Adam(model.parameters()), *loaders, pics=tmp_path)


def test_pca_error_matches_a_singular_value_decomposition():
    train_x, test_x = DIGITS.train_images.flatten(1), DIGITS.test_images.flatten(1)
    mean = train_x.mean(dim=0)
    directions = torch.linalg.svd(train_x - mean, full_matrices=False).Vh[:20]
    residual = (test_x - mean) - (test_x - mean) @ directions.T @ directions
    expected = residual.square().mean().item()
    assert ae.pca_error(train_x, test_x, 20) == pytest.approx(expected, rel=1e-4)


# ---- Data --------------------------------------------------------------------------------

def write_mnist(folder, count=12):
    """A small MNIST in its own format, made of drawn digits."""
    raw = Path(folder) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, images, labels in (("train", *DIGITS[:2]), ("t10k", *DIGITS[2:4])):
        pixels = (images[:count, 0] * 255).round().byte().numpy()
        header = np.array([0x803, *pixels.shape], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        digits = labels[:count].byte().numpy()
        header = np.array([0x801, count], ">i4").tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + digits.tobytes())
    return raw


def test_mnist_is_read_as_whole_tensors(tmp_path):
    write_mnist(tmp_path)
    data = ae.load_data(tmp_path)
    assert data.name == "MNIST"
    for part, expected in zip(data[:4], DIGITS[:4]):
        torch.testing.assert_close(part, expected[:12], rtol=0, atol=0.51 / 255)


@pytest.mark.parametrize("damage", [lambda old: old[:-1], lambda old: b""])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_data_are_named_by_their_folder_and_left_alone(tmp_path, name, damage):
    path = write_mnist(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="MNIST.raw are damaged.*delete that folder"):
        ae.load_data(tmp_path)
    assert path.read_bytes() == before


def test_without_a_network_digits_are_drawn_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    raw = write_mnist(tmp_path)
    (raw / "t10k-labels-idx1-ubyte").unlink()  # so that there is something to download
    monkeypatch.setattr(ae.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # where nobody listens
    monkeypatch.setattr(ae, "draw_digits", lambda count, seed: (count, seed))
    assert ae.load_data(tmp_path) == (60_000, 0, 10_000, 1, "drawn digits")
    assert "Drawn digits take its place" in capsys.readouterr().out.splitlines()[-1]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        ae.load_data(tmp_path / "file")


def test_drawn_digits_are_bright_on_dark_and_told_apart_by_their_labels():
    images, labels = ae.draw_digits(1000, seed=5)
    again, _ = ae.draw_digits(1000, seed=5)
    others, _ = ae.draw_digits(1000, seed=6)
    assert torch.equal(images, again) and not torch.equal(images, others)
    assert images.shape == (1000, 1, 28, 28) and images.min() == 0 and images.max() > 0.9
    assert 0.05 < images.mean() < 0.3
    train_x, train_labels = DIGITS.train_images.flatten(1), DIGITS.train_labels
    means = torch.stack([train_x[train_labels == digit].mean(dim=0) for digit in range(10)])
    nearest = torch.cdist(images.flatten(1), means).argmin(dim=1)
    assert (nearest == labels).float().mean() > 0.7


def test_a_loader_gives_each_image_once_with_its_label_in_a_new_order():
    numbers = torch.arange(101.0)
    loader = ae.make_loader(numbers, 2 * numbers, batch_size=30, seed=3)
    same = ae.make_loader(numbers, 2 * numbers, batch_size=30, seed=3)
    other = ae.make_loader(numbers, 2 * numbers, batch_size=30, seed=4)
    assert len(loader) == 4
    epochs = []
    for batches in (loader, loader, same, other):
        images, labels = (torch.cat(part) for part in zip(*batches))
        assert torch.equal(labels, 2 * images) and torch.equal(images.sort().values, numbers)
        epochs.append(images)
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[3])


# ---- The search --------------------------------------------------------------------------

def test_parts_of_the_data_are_disjoint_and_mixed():
    numbers = torch.arange(1200.0).view(1200, 1, 1, 1)
    parts = ae.split_data(ae.Data(numbers, numbers.flatten(), *DIGITS[2:]))
    names = ["train", "classifier", "choose", "confirm"]
    assert [len(parts[name][0]) for name in names] == [800, 200, 100, 100]
    assert torch.equal(parts["test"][0], DIGITS.test_images.flatten(1))
    images = torch.cat([parts[name][0].flatten() for name in names])
    labels = torch.cat([parts[name][1] for name in names])
    assert torch.equal(images.sort().values, numbers.flatten()) and torch.equal(images, labels)
    assert not torch.equal(images, numbers.flatten())


def test_random_settings_keep_the_limits_and_vary():
    settings = [ae.random_setting(f"0 {i}") for i in range(60)]
    for setting in settings:
        ae.check_limits(ae.AutoEncoder(784, 20, **setting))
    different = {name: len({setting[name] for setting in settings}) for name in settings[0]}
    assert different["loss"] == 4 and different["refinements"] == 2
    assert min(different["encoder_sizes"], different["l1"], different["dropout"]) > 20
    assert {len(setting["decoder_sizes"]) for setting in settings} == {0, 1, 2}


def test_cost_is_parameters_times_passes():
    linear = 784 * 20 + 20 + 20 * 784 + 784
    assert ae.cost({"encoder_sizes": (), "decoder_sizes": (), "refinements": 2}) == 3 * linear


@pytest.mark.parametrize("lowest, cost, chosen", [
    (1.2, 1, "other"), (1.2, 3, "best"), (1.3, 1, "best")])
def test_the_cheapest_of_those_that_tie_with_the_best_is_chosen(lowest, cost, chosen):
    """The other ties if its lowest score is no worse than the highest of the best."""
    scores = {"bad": [2.1, 2.2, 2.3], "other": [1.8, lowest, 1.9], "best": [1.1, 1.2, 1.0]}
    assert ae.cheapest_of_the_best(scores, {"bad": 0, "other": cost, "best": 2}) == chosen


@pytest.fixture
def pretended_search(monkeypatch, tmp_path):
    """`search` without its trainings: called with the score of a trial, it returns the winner
    and the trials that were run."""
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)

    def search_by(score, **options):
        trials = []

        def run_trial(trial, parts, classifier):
            trials.append(trial)
            result = {"distance": 1.0, "balance": 1.0, "novelty": 1.0, "error": 0.01,
                      "digits": torch.zeros(20, 784)}
            return result | score(trial)

        monkeypatch.setattr(ae, "run_trial", run_trial)
        return ae.search(out=tmp_path, **options), trials
    return search_by


def penalty_is_bad(trial):
    return {"distance": 1 + trial.setting.get("l1", 0) + 1e-9 * trial.seed}


def test_search_halves_then_confirms_then_tests_with_fresh_seeds(pretended_search, capsys):
    winner, trials = pretended_search(penalty_is_bad)
    stages = {}
    for trial in trials:
        stage = stages.setdefault(trial.name[:7], {"l1": set(), "seeds": set(), "how": set()})
        stage["l1"].add(trial.setting.get("l1", 0))
        stage["seeds"].add(trial.seed)
        stage["how"].add((trial.epochs, trial.part))
    assert stages["round 1"]["how"] == {(1, "choose")}
    assert stages["round 2"]["how"] == {(3, "choose")}
    assert stages["confirm"]["how"] == {(3, "confirm")}
    assert stages["test de"]["how"] == {(3, "test")}
    seeds = [stages[stage]["seeds"] for stage in ("round 1", "confirm", "test de")]
    assert [len(group) for group in seeds] == [1, 3, 3] and len(set.union(*seeds)) == 7

    settings = [ae.random_setting(f"0 {i}") for i in range(1, 28)]
    kept = set()
    for depth in (0, 1, 2):
        kept |= set(sorted(s["l1"] for s in settings if len(s["encoder_sizes"]) == depth)[:3])
    assert stages["round 1"]["l1"] == {s["l1"] for s in settings}
    assert stages["round 2"]["l1"] == kept
    assert stages["confirm"]["l1"] == {0, *sorted(kept)[:3]}  # 0: the default and 784-400-20
    assert stages["test ty"]["l1"] == {sorted(s["l1"] for s in settings)[13]}
    assert len(trials) == 27 + 9 + 3 * 5 + 3 * 3  # the winner is 784-400-20: three are tested
    assert winner == ae.PLAIN
    *_, command = lines = capsys.readouterr().out.splitlines()
    assert command == ("python autoencoder.py --epochs 3 "
                       "--encoder-sizes 400 --decoder-sizes 400 --refinements 0")
    row, = (line.split() for line in lines if line.startswith("784-400-20"))
    assert row == ["784-400-20"] + 3 * ["1.0000", "±", "0.0000"] + ["0.0100", "±", "0.0000"]


def test_settings_that_miss_classes_or_copy_lose_to_all_others(pretended_search):
    def gamed(trial):
        if trial.setting == ae.PLAIN:
            return {"distance": 0.1, "novelty": 0.4}
        cheats = trial.setting.get("loss") in ("squared", "absolute")
        fault = "balance" if trial.setting.get("loss") == "squared" else "novelty"
        return {"distance": 0.1, fault: 0.4} if cheats else penalty_is_bad(trial)

    winner, trials = pretended_search(gamed)
    finalists = [t.setting for t in trials if t.name.startswith("confirm random")]
    assert all(setting["loss"] in ("euclidean", "cross-entropy") for setting in finalists)
    assert winner != ae.PLAIN


def test_a_search_goes_on_where_it_stopped_and_trains_nothing_twice(
        pretended_search, tmp_path, monkeypatch):
    def stop_in_the_end(trial):
        if trial.name.startswith("test"):
            raise KeyboardInterrupt
        return penalty_is_bad(trial)

    with pytest.raises(KeyboardInterrupt):
        pretended_search(stop_in_the_end)
    winner, trials = pretended_search(penalty_is_bad)
    assert len(trials) == 9 and all(trial.name.startswith("test") for trial in trials)
    assert pretended_search(penalty_is_bad) == (winner, [])
    everything = 27 + 9 + 15 + 9
    assert len(pretended_search(penalty_is_bad, epochs=6)[1]) == everything
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS._replace(name="others"))
    assert len(pretended_search(penalty_is_bad)[1]) == everything
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".pt", ".png")]


def test_a_setting_that_diverges_comes_last():
    parts = ae.split_data(DIGITS)
    result = ae.run_trial(ae.Trial("name", {"l1": 1e38}, 0, 1, "choose"), parts, None)
    assert result["distance"] == math.inf and not ae.passes(result)


def test_a_trial_is_trained_as_the_command_trains(tmp_path, monkeypatch):
    """The same setting, seed and epochs on the same images: the same reconstructions."""
    setting = {"encoder_sizes": (32,), "decoder_sizes": (32,)}
    parts = ae.split_data(DIGITS)
    (x, y), (test_x, test_y) = parts["train"], parts["choose"]
    data = ae.Data(x.view(-1, 1, 28, 28), y, test_x.view(-1, 1, 28, 28), test_y, "parts")
    monkeypatch.setattr(ae, "load_data", lambda folder: data)
    monkeypatch.setattr(ae, "pca_error", lambda train_x, test_x, size: 0.5)
    model, _ = ae.test_work(pics=tmp_path, epochs=2, seed=3, device="cpu", **setting)
    result = ae.run_trial(ae.Trial("", setting, 3, 2, "choose"), parts, ae.Classifier())
    error = (model(test_x) - test_x).square().mean().item()
    assert result["error"] == pytest.approx(error, rel=1e-4)


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


def test_two_processes_under_torchrun_find_what_one_finds(tmp_path):
    write_mnist(tmp_path, count=480)
    search = f"{HERE / 'autoencoder.py'} search --data {tmp_path} --trials 3 --epochs 1 --out"
    alone = run(*search.split(), tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    together = run(*torchrun.split(), *search.split(), tmp_path / "together")
    assert together.returncode == 0, together.stderr

    report = alone.stdout[alone.stdout.index("on test images"):]
    assert report in together.stdout
    assert together.stdout.count(" seed ") == alone.stdout.count(" seed ")  # nothing twice
    for label in ("default", "784-400-20", "typical", "real digits", "PCA"):
        assert len(re.findall(rf"^{label} +\d", report, re.MULTILINE)) == 1
    sheet = Image.open(tmp_path / "together" / "contact_sheet.png")
    assert sheet.size == (20 * 30 + 2, 3 * 30 + 2)
    assert max(path.stat().st_size for path in (tmp_path / "alone").glob("*.pt")) < 100_000


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
    """It draws digits, and saves both kinds of pictures."""
    options = (f"--epochs 1 --encoder-sizes 32 --decoder-sizes 32 --device cpu "
               f"--data {tmp_path}/data --pics {tmp_path}/pics")
    nobody = "http://127.0.0.1:9"
    done = run(HERE / "autoencoder.py", *options.split(), https_proxy=nobody, http_proxy=nobody,
               PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "Drawn digits take its place" in done.stdout
    assert done.stdout.splitlines()[-1] == "Success!"
    assert Image.open(tmp_path / "pics/generated.png").size == (10 * 30 + 2, 10 * 30 + 2)
    assert (tmp_path / "pics/reconstruction_1.png").is_file()


def test_every_option_arrives(monkeypatch):
    arrived = []
    for name in ("test_work", "search"):
        monkeypatch.setattr(ae, name, lambda **options: arrived.append(options) or sys.exit(0))
    given = {
        "data": "d", "pics": "p", "epochs": 2, "seed": 3, "device": "cpu", "lr": 0.01,
        "encoder_sizes": [40, 50], "decoder_sizes": [60], "loss": "squared", "l1": 0.1,
        "dropout": 0.2, "refinements": 2}
    command = ("--data d --pics p --epochs 2 --seed 3 --device cpu --lr 0.01 "
               "--encoder-sizes 40 50 --decoder-sizes 60 --loss squared --l1 0.1 "
               "--dropout 0.2 --refinements 2")
    for words in (command, "search --data d --out o --epochs 2 --trials 5 --seed 3"):
        with pytest.raises(SystemExit):
            ae.main(words.split())
    searched = {"data": "d", "out": "o", "epochs": 2, "trials": 5, "seed": 3}
    assert arrived == [given, searched]


@pytest.mark.parametrize("command, status, message", [
    ("--epochs 0", 2, "whole number from 1"),
    ("--encoder-sizes 9 -9", 2, "-9"),
    ("--loss mse", 2, "euclidean"),
    ("--refinements -1", 2, "refinements"),
    ("--trials 27", 2, "--trials"),
    ("search --lr 0.1", 2, "--lr"),
    ("search --out file", 2, "file"),
    ("--encoder-sizes 900", 1, "dimension above 800"),
    ("--encoder-sizes 9 9 9 9", 1, "8 layers"),
    ("--device abacus", 1, "abacus"),
    ("--lr -1", 1, "learning rate"),
    ("--dropout 2", 1, "dropout"),
    ("--l1 nan", 1, "training loss is nan"),
    ("--pics file", 1, "file"),
])
def test_what_cannot_be_is_refused_in_one_line(
        tmp_path, monkeypatch, capfd, command, status, message):
    monkeypatch.setattr(ae, "load_data", lambda folder: DIGITS)
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    ended, _, err = call(command, capfd)
    assert ended == status and message in err[-1]


@pytest.mark.parametrize("raised, status, message", [
    (OSError(28, "No space left on device"), 2, "No space left"),
    (ValueError("the data in x are damaged"), 2, "the data in x are damaged"),
    (AssertionError("does not beat"), 1, "does not beat"),
    (KeyboardInterrupt(), 130, "stopped"),
])
def test_faults_end_in_one_line(monkeypatch, capfd, raised, status, message):
    def test_work(**options):
        raise raised

    monkeypatch.setattr(ae, "test_work", test_work)
    ended, out, err = call("", capfd)
    assert ended == status and not out and len(err) == 1 and message in err[0]


def test_import_has_no_side_effects(tmp_path):
    code = (f"import os, torch; os.chdir({str(tmp_path)!r}); state = torch.get_rng_state(); "
            "import autoencoder; assert torch.equal(state, torch.get_rng_state())")
    done = run("-c", code, PYTHONPATH=str(HERE))
    assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, "", "", [])
