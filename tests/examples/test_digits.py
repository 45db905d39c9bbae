"""The digits against scikit-learn's own table, and the shares of real ranks."""

import sys
import warnings
from collections import Counter

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits

from lightning_comm import PartitionedLoader
from lightning_comm.data.resumable import ResumableLoader
from lightning_comm.examples import DigitsData

torch.set_num_threads(1)  # a process that has started torch's threads cannot be forked into ranks


def rows(loader) -> Counter:
    """Each image of a loader with its label, as whole numbers, as often as it comes."""
    return Counter(
        (label, tuple(image.flatten().mul(16).round().int().tolist()))
        for images, labels in loader
        for image, label in zip(images, labels.tolist(), strict=True)
    )


def test_every_digit_of_the_original_table_is_in_exactly_one_part():
    data = DigitsData(batch_size=1)
    digits = load_digits()
    original = Counter(
        (int(label), tuple(int(pixel) for pixel in image.flatten()))
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    train, held_out = rows(data.train_dataloader()), rows(data.val_dataloader())
    assert train + held_out == original
    assert (train.total(), held_out.total()) == (1437, 360)
    assert rows(data.test_dataloader()) == rows(data.predict_dataloader()) == held_out


def test_both_parts_hold_the_same_share_of_each_digit():
    data = DigitsData(batch_size=1)
    in_train, held_out = (
        Counter(label for _, labels in loader for label in labels.tolist())
        for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert set(in_train) == set(held_out) == set(range(10))
    assert all(abs(in_train[digit] / 1437 - held_out[digit] / 360) < 1 / 360 for digit in range(10))


def test_the_seed_changes_the_order_but_not_the_split():
    first, second = DigitsData(batch_size=479, seed=0), DigitsData(batch_size=479, seed=1)
    assert rows(first.train_dataloader()) == rows(second.train_dataloader())
    torch.manual_seed(5)
    again = DigitsData(batch_size=479, seed=0)
    labels = [torch.cat([y for _, y in data.train_dataloader()]).tolist() for data in (first, again, second)]
    assert labels[0] == labels[1] != labels[2]


@pytest.mark.parametrize("image_size", [8, 9, 32])
def test_images_have_one_channel_the_wanted_size_and_values_from_0_to_1(image_size):
    images, labels = next(iter(DigitsData(batch_size=360, image_size=image_size).val_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((360, 1, image_size, image_size), torch.float, torch.long)
    assert images.min() == 0
    assert 0.9 < images.max() <= 1
    originals, _ = next(iter(DigitsData(batch_size=360).val_dataloader()))
    assert torch.allclose(images.mean((1, 2, 3)), originals.mean((1, 2, 3)), atol=0.06)


def test_a_second_setup_does_no_work():
    data = DigitsData()
    data.setup("fit")
    images = data.val_dataloader().dataset.tensors[0]
    data.setup("validate")
    assert data.val_dataloader().dataset.tensors[0] is images


def test_the_training_loader_resumes():
    loader = DigitsData(batch_size=32).train_dataloader()
    assert isinstance(loader, ResumableLoader)
    assert len(loader) == 1437 // 32


def test_a_global_batch_is_for_training_and_leaves_the_batches_of_evaluation_as_they_are():
    data = DigitsData(batch_size=10, global_batch_size=32)
    train = data.train_dataloader()
    assert isinstance(train, PartitionedLoader)
    assert [len(labels) for _, labels in train] == [32] * (1437 // 32)
    assert rows(train) <= rows(DigitsData(batch_size=1).train_dataloader())
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert len(next(iter(loader))[1]) == 10


class Counting(LightningModule):
    """Leaves the images that each rank was given in files."""

    def __init__(self, folder):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder, self.seen = folder, {"train": [], "val": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self):
        torch.save((self.trainer.world_size, self.seen), self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize(
    ("ranks", "global_batch_size"),
    [
        (2, None),
        (3, 31),
        pytest.param(3, None, marks=pytest.mark.exhaustive),
        pytest.param(2, 31, marks=pytest.mark.exhaustive),
    ],
)
def test_ranks_share_the_training_images_and_count_each_held_out_image_once(ranks, global_batch_size, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu",
            strategy="ddp_fork",
            devices=ranks,
            max_epochs=1,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Counting(tmp_path), datamodule=DigitsData(batch_size=10, global_batch_size=global_batch_size))
    world_sizes, seen = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)), strict=True)
    assert world_sizes == (ranks,) * ranks
    alone = DigitsData(batch_size=1)
    held_out = sum((rows(rank["val"]) for rank in seen), Counter())
    assert held_out == rows(alone.val_dataloader())
    trained = sum((rows(rank["train"]) for rank in seen), Counter())
    assert trained <= rows(alone.train_dataloader())
    step = global_batch_size or 10 * ranks
    assert trained.total() == 1437 // step * step
    sizes = [[len(labels) for _, labels in rank["train"]] for rank in seen]
    assert {sum(step_sizes) for step_sizes in zip(*sizes, strict=True)} == {step}


@pytest.mark.parametrize(
    ("kwargs", "must_say"),
    [
        ({"batch_size": 0}, ["batch_size", "got 0", "on one rank"]),
        ({"image_size": 7}, ["image_size", "got 7", ">= 8", "originals"]),
        ({"num_workers": -1}, ["num_workers", "got -1", "training process"]),
        ({"seed": -1}, ["seed", "got -1"]),
        ({"global_batch_size": 0}, ["global_batch_size", "got 0", "on all ranks", "batch_size"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, must_say):
    with pytest.raises(ValueError, match="DigitsData: ") as caught:
        DigitsData(**kwargs)
    assert [word for word in must_say if word not in str(caught.value)] == []


@pytest.mark.parametrize(("missing", "package"), [("timm", "timm"), ("sklearn", "scikit-learn")])
def test_without_the_extra_the_import_names_it(missing, package, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("lightning_comm.examples", f"{missing}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"'{missing}'.*`pip install {package}`"):
        __import__("lightning_comm.examples.digits")
