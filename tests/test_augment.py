"""Augmentation: the same pixels as torchvision for the same parameters, the same distribution, seeds and nothing else."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop as PerImage
from torchvision.transforms import functional as tv

from attnzoo.bench.augment import measure
from attnzoo.data import PAPER, STEPS, Augment, Step, evaluation, step_seeds
from attnzoo.data.chance import Chance, integers, mix
from attnzoo.data.effects import RandomErasing
from attnzoo.data.geometry import Frame, HorizontalFlip, RandomCrop, RandomResizedCrop, VerticalFlip, View
from attnzoo.data.mixing import Cutmix, Mixup
from attnzoo.errors import DataError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
FRAME = Frame((3, 32, 32), MEAN, STD)
IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(64) % 10
SEEDS = step_seeds(0, 0, torch.arange(64))


def smooth(n: int, side: int = 32) -> torch.Tensor:
    """Images without jumps, so that a slip of a pixel shows as a slip of a value and not as noise."""
    noise = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(2)) * 255
    return torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 255).round().byte()


def augment(*steps, image=(3, 32, 32)) -> Augment:
    return Augment([Step.model_validate(step) for step in steps], image=image, mean=MEAN, std=STD, classes=10)


def grey(x: torch.Tensor) -> torch.Tensor:
    """Back to grey levels."""
    return (x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


class Fixed(Chance):
    """Chance that gives the numbers it was told to."""

    def __init__(self, *draws):
        self.draws, self.seeds = [torch.as_tensor(draw) for draw in draws], torch.zeros(1)

    def uniform(self, count):
        draw = self.draws.pop(0)
        assert draw.shape[1] == count
        return draw


# Random numbers


def test_the_hash_is_splitmix64():
    """First three outputs of the reference generator with seed 1234567."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + k * golden + 2**63) % 2**64 - 2**63 for k in (1, 2, 3)]
    found = [x % 2**64 for x in mix(torch.tensor(states)).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_numbers_have_the_moments_and_no_correlations():
    chance = Chance(step_seeds(7, 3, torch.arange(20_000)), stream=2)
    u = torch.cat([chance.uniform(8), chance.uniform(8)], dim=1).double()
    assert u.min() >= 0 and u.max() < 1
    error = 1 / math.sqrt(u.numel())
    for k in range(1, 5):
        assert abs(float((u**k).mean()) - 1 / (k + 1)) < 4 * error, k
    counts = torch.histc(u.float(), 100, 0, 1)
    assert float(((counts - u.numel() / 100) ** 2 / (u.numel() / 100)).sum()) < 160  # χ² of 99 degrees: 5σ
    correlations = torch.corrcoef(u.T) - torch.eye(16)
    assert correlations.abs().max() < 5 / math.sqrt(20_000)
    flat = u[:, 0] - 0.5
    for lag in (1, 2, 3, 256):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) * 12 < 5 / math.sqrt(20_000), lag


def test_streams_epochs_runs_and_samples_differ():
    indices = torch.arange(1000)
    seeds = step_seeds(0, 0, indices)
    assert len(seeds.unique()) == 1000
    for other in (step_seeds(0, 1, indices), step_seeds(1, 0, indices), step_seeds(-1, 0, indices)):
        assert not (seeds == other).any()
        assert (
            abs(
                float(torch.corrcoef(torch.stack([Chance(s).uniform(1)[:, 0] for s in (seeds, other)]))[0, 1])
            )
            < 0.15
        )
    assert not torch.equal(Chance(seeds, 0).uniform(3), Chance(seeds, 1).uniform(3))
    assert torch.equal(step_seeds(0, 0, indices[[5, 3]]), seeds[[5, 3]])
    assert torch.equal(step_seeds(2**64 + 5, 0, indices), step_seeds(5, 0, indices))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 4.0])
def test_beta_has_its_moments(alpha):
    x = Chance(step_seeds(0, 0, torch.arange(40_000))).beta(alpha).double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(x.mean()) - 0.5) < 5 * math.sqrt(variance / 40_000)
    assert abs(float(x.var()) - variance) < 0.03 * variance
    assert torch.isfinite(x).all()


def test_normal_has_its_moments():
    x = Chance(step_seeds(0, 0, torch.arange(4000))).normal(10).double()
    assert (
        abs(float(x.mean())) < 0.02 and abs(float(x.var()) - 1) < 0.03 and abs(float((x**4).mean()) - 3) < 0.2
    )


def test_integers_never_reach_their_count():
    most = torch.tensor([1 - 2.0**-24])
    assert all(int(integers(most, n)) == n - 1 for n in (1, 3, 9, 33, 225, 4096, 65535))


# The same pixels


def test_padded_crops_are_torchvisions():
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    images = smooth(81)
    chance = Fixed((offsets + 0.5) / 9)
    ours = RandomCrop(FRAME, padding=4)(View.of(images), chance).show()
    theirs = [
        tv.crop(tv.pad(p, [4]), int(y), int(x), 32, 32) for p, (y, x) in zip(images, offsets, strict=True)
    ]
    assert ours.dtype == torch.uint8 and torch.equal(ours, torch.stack(theirs))


def test_crops_of_another_size_are_torchvisions():
    images = smooth(4, 40)
    chance = Fixed((torch.tensor([[0, 0], [8, 8], [3, 5], [7, 1]]) + 0.5) / 9)
    ours = RandomCrop(FRAME, padding=0)(View.of(images), chance).show()
    theirs = [
        tv.crop(p, y, x, 32, 32) for p, (y, x) in zip(images, [(0, 0), (8, 8), (3, 5), (7, 1)], strict=True)
    ]
    assert torch.equal(ours, torch.stack(theirs))


@pytest.mark.parametrize("step,flip", [(HorizontalFlip, tv.hflip), (VerticalFlip, tv.vflip)])
def test_flips_are_exact(step, flip):
    chance = Fixed(torch.tensor([[0.1], [0.7], [0.3]]))
    ours = step(FRAME, p=0.5)(View.of(IMAGES[:3]), chance).show()
    assert torch.equal(ours, torch.stack([flip(IMAGES[0]), IMAGES[1], flip(IMAGES[2])]))


@pytest.mark.parametrize("side,scale", [(32, (0.8, 1.0)), (32, (0.08, 0.5)), (48, (0.3, 1.0))])
def test_resized_crops_are_torchvisions(side, scale):
    images, n = smooth(50, side), 50
    step = RandomResizedCrop(FRAME, scale=scale)
    draw = torch.rand(n, 22)
    height, width = step.box((side, side), draw[:, :10], draw[:, 10:20])
    ours = step(View.of(images), Fixed(draw)).show()
    for i in range(n):
        h, w = int(height[i]), int(width[i])
        top, left = int(draw[i, 20] * (side - h + 1)), int(draw[i, 21] * (side - w + 1))
        theirs = tv.resized_crop(images[i], top, left, h, w, [32, 32], antialias=False)
        assert (ours[i] - theirs).abs().max() <= 1, i


def test_crop_flip_and_resized_crop_fuse_to_what_they_are_one_by_one():
    images, n = smooth(40), 40
    crop, flip, box = torch.rand(n, 2), torch.rand(n, 1), torch.rand(n, 22)
    steps = (
        RandomCrop(FRAME),
        HorizontalFlip(FRAME),
        RandomResizedCrop(FRAME, scale=(0.3, 0.9)),
        VerticalFlip(FRAME),
    )
    fused, alone = View.of(images), images
    for step, draw in zip(steps, (crop, flip, box, flip), strict=True):
        fused = step(fused, Fixed(draw))
        alone = step(View.of(alone), Fixed(draw)).show()
    assert fused.images is images  # nothing was fetched on the way
    assert (fused.show() - alone).abs().max() < 1e-2


def test_two_crops_do_not_fuse():
    """The second crop's frame is black, not what the first one cut off."""
    images = smooth(2)
    view = RandomCrop(FRAME, padding=4)(
        View.of(images), Fixed(torch.full((2, 2), 0.99))
    )  # 4 pixels to the lower right
    ours = RandomCrop(FRAME, padding=4)(view, Fixed(torch.zeros(2, 2))).show()
    once = tv.crop(tv.pad(images, [4]), 8, 8, 32, 32)
    assert torch.equal(ours, tv.crop(tv.pad(once, [4]), 0, 0, 32, 32))


def test_a_box_that_never_fits_falls_back_to_the_middle():
    images = smooth(2, 64)[:, :, :16]  # 16 rows of 64
    step = RandomResizedCrop(FRAME, scale=(1.0, 1.0))
    ours = step(View.of(images), Fixed(torch.rand(2, 22))).show()
    _, left, h, w = PerImage.get_params(images[0], (1.0, 1.0), (3 / 4, 4 / 3))
    theirs = tv.resized_crop(images[0], 0, left, h, w, [32, 32], antialias=False)
    assert (ours[0] - theirs).abs().max() <= 1


@pytest.mark.parametrize("side", [20, 48, 80])
def test_evaluation_resizes_as_torchvision_and_normalises(side):
    images = smooth(3, side)
    ours = evaluation((3, 32, 32), MEAN, STD)(images)
    theirs = tv.resize(images, [32, 32], antialias=True).float()
    assert (grey(ours) - theirs).abs().max() <= 1
    exact = evaluation((3, side, side), MEAN, STD)(images)
    torch.testing.assert_close(exact, tv.normalize(images.float() / 255, MEAN, STD), atol=2e-6, rtol=1e-6)


# The same distribution


def test_boxes_are_distributed_as_torchvisions():
    step = RandomResizedCrop(FRAME, scale=(0.08, 1.0))
    u = Chance(step_seeds(0, 0, torch.arange(20_000))).uniform(20)
    height, width = step.box((32, 32), u[:, :10], u[:, 10:])
    torch.manual_seed(0)
    boxes = torch.tensor(
        [PerImage.get_params(IMAGES[0], (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    ).double()
    for ours, theirs in (
        (height, boxes[:, 2]),
        (width, boxes[:, 3]),
        (height * width, boxes[:, 2] * boxes[:, 3]),
    ):
        ours = ours[height > 0].double()
        assert abs(float(ours.mean() - theirs.mean())) < 5 * float(theirs.std()) / math.sqrt(4000)
        assert abs(float(ours.std() / theirs.std()) - 1) < 0.06


def test_crops_and_flips_have_every_outcome_equally_often():
    ramp = torch.arange(1, 1025).view(1, 1, 32, 32).float().expand(20_000, 1, 32, 32)
    chance = Chance(step_seeds(0, 0, torch.arange(20_000)))
    view = RandomCrop(FRAME, padding=4)(View.of(ramp), chance)
    offsets = (view.rows.start + 4) * 9 + view.columns.start + 4
    counts = torch.bincount(offsets, minlength=81).float()
    assert (
        len(counts) == 81 and float(((counts - 20_000 / 81) ** 2 / (20_000 / 81)).sum()) < 140
    )  # χ² of 80: 5σ
    flipped = HorizontalFlip(FRAME, p=0.3)(view, chance).columns.mirrored.double().mean()
    assert abs(float(flipped) - 0.3) < 0.02


def test_the_papers_pipeline_has_the_moments_of_torchvisions():
    from torchvision import transforms as v1

    image = smooth(1)
    ours, _ = augment(*PAPER)(
        image.expand(3000, -1, -1, -1), torch.zeros(3000).long(), step_seeds(0, 0, torch.arange(3000))
    )
    theirs = v1.Compose([
        v1.RandomCrop(32, padding=4), v1.RandomHorizontalFlip(), v1.Resize((32, 32)),
        v1.RandomResizedCrop(32, (0.8, 1.0), (0.75, 1.333), antialias=False), v1.ConvertImageDtype(torch.float32),
        v1.Normalize(MEAN, STD),
    ])  # fmt: skip
    theirs = torch.stack([theirs(image[0]) for _ in range(3000)])
    error = theirs.std(0) / math.sqrt(3000)
    assert ((ours.mean(0) - theirs.mean(0)).abs() / error).max() < 7  # 3072 pixels, two samples
    assert ((ours.std(0) / theirs.std(0)) - 1).abs().mean() < 0.02


# Seeds and nothing else

EVERY = [
    *(step for step in STEPS if step not in ("mixup", "cutmix", "random_erasing")),
    {"use": "random_erasing", "with": {"p": 0.9, "mode": "pixel"}},
]


@pytest.mark.parametrize(
    "steps", [PAPER, EVERY, ["random_crop", "horizontal_flip"]], ids=["paper", "every", "crop"]
)
def test_a_image_is_augmented_alike_in_every_batch(steps):
    a = augment(*steps)
    whole, labels = a(IMAGES, LABELS, SEEDS)
    assert torch.equal(labels, LABELS)
    for cut in (1, 7, 33):
        parts = [
            a(*part)[0] for part in zip(IMAGES.split(cut), LABELS.split(cut), SEEDS.split(cut), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole), cut
    order = torch.randperm(64)
    assert torch.equal(a(IMAGES[order], LABELS[order], SEEDS[order])[0], whole[order])
    assert not torch.equal(a(IMAGES, LABELS, step_seeds(0, 1, torch.arange(64)))[0], whole)


@pytest.mark.parametrize(
    "steps", [PAPER, [step for step in STEPS if step != "rand_augment"]], ids=["paper", "every"]
)
def test_everything_happens_on_the_batchs_device(steps):
    """Tensors on the device `meta` refuse to meet tensors on the CPU."""
    x, targets = augment(*steps)(IMAGES.to("meta"), LABELS.to("meta"), SEEDS)
    assert x.device.type == targets.device.type == "meta" and x.shape == IMAGES.shape


def test_no_random_state_is_read_or_moved_and_no_image_changed():
    a, before = augment(*EVERY, "mixup"), IMAGES.clone()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    one = a(IMAGES, LABELS, SEEDS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    for x, y in zip(one, a(IMAGES, LABELS, SEEDS), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("steps", [[], ["resize"], ["normalise"]])
def test_without_random_steps_it_is_evaluation_and_changes_nothing(steps):
    before = IMAGES.clone()
    evaluate = evaluation((3, 32, 32), MEAN, STD)
    one = evaluate(IMAGES)
    assert torch.equal(one, evaluate(IMAGES)) and torch.equal(IMAGES, before)
    assert torch.equal(augment(*steps)(IMAGES, LABELS, SEEDS)[0], one)
    floats = IMAGES.float()
    assert torch.equal(evaluate(floats), one) and torch.equal(floats, before) and one.dtype == torch.float32


def test_images_are_resized_to_the_models_size_at_the_end():
    x, _ = augment("horizontal_flip", image=(3, 24, 24))(IMAGES, LABELS, SEEDS)
    assert x.shape == (64, 3, 24, 24)
    x, _ = augment({"use": "random_crop", "with": {"size": 16, "padding": 0}})(IMAGES, LABELS, SEEDS)
    assert x.shape == (64, 3, 32, 32)


# Erasing, RandAugment, mixing


def test_erasing_paints_one_box_of_the_right_size():
    n = 4000
    images, chance = torch.ones(n, 1, 32, 32), Chance(step_seeds(0, 0, torch.arange(n)))
    done = RandomErasing(FRAME, p=0.25, area=(0.1, 0.2))(images, chance)
    erased = done == 0
    share = erased.float().mean(dim=(1, 2, 3))
    hit = share > 0
    assert abs(float(hit.float().mean()) - 0.25) < 0.03
    assert (
        float(share[hit].min()) > 0.08
        and float(share[hit].max()) < 0.22
        and abs(float(share[hit].mean()) - 0.15) < 0.005
    )
    rows, columns = erased.any(dim=3).sum(dim=2), erased.any(dim=2).sum(dim=2)
    assert torch.equal((rows * columns)[:, 0], erased.sum(dim=(1, 2, 3)))  # a filled box
    assert torch.equal(images, torch.ones(n, 1, 32, 32))


def test_erasing_is_distributed_as_timms():
    from timm.data.random_erasing import RandomErasing as PerImageErasing

    random.seed(0)
    theirs = PerImageErasing(probability=1.0, device="cpu")(torch.ones(3000, 1, 32, 32)).mean(0)
    ours = RandomErasing(FRAME, p=1.0)(
        torch.ones(6000, 1, 32, 32), Chance(step_seeds(0, 0, torch.arange(6000)))
    ).mean(0)
    assert (ours - theirs).abs().max() < 0.05 and abs(float((ours - theirs).mean())) < 0.01


def test_erasing_paints_one_colour_or_noise():
    images = torch.full((500, 3, 32, 32), 9.0)
    for mode, colours in (("rand", 1), ("pixel", 15)):
        done = RandomErasing(FRAME, p=1.0, mode=mode)(images, Chance(step_seeds(0, 0, torch.arange(500))))
        counts = [len(p[0][p[0] != 9].unique()) for p in done]
        assert min(counts) >= colours and (mode == "pixel" or max(counts) == 1)
        painted = done[done != 9]
        assert abs(float(painted.mean())) < 0.15 and abs(float(painted.std()) - 1) < 0.1


def test_rand_augment_is_timms_with_a_seed_per_image():
    from timm.data.auto_augment import rand_augment_transform

    a = augment({"use": "rand_augment", "with": {"magnitude": 7, "num_ops": 3}})
    done = grey(a(IMAGES, LABELS, SEEDS)[0]).round()
    options = {"img_mean": (125, 123, 114), "translate_const": 14}
    transform = rand_augment_transform("rand-m7-n3-mstd0.5-inc1", options)
    for i, (high, low) in enumerate(integers(Chance(SEEDS).uniform(2), 2**16).tolist()):
        random.seed(high * 65536 + low), np.random.seed(high * 65536 + low)
        theirs = np.asarray(transform(Image.fromarray(IMAGES[i].permute(1, 2, 0).numpy())))
        assert torch.equal(done[i].byte(), torch.from_numpy(theirs.copy()).permute(2, 0, 1)), i
    assert (done != IMAGES).flatten(1).any(dim=1).float().mean() > 0.5


@pytest.mark.parametrize("steps", [["mixup"], ["cutmix"], ["mixup", "cutmix"]], ids="+".join)
def test_targets_of_mixed_images_sum_to_one(steps):
    x, targets = augment(*steps)(IMAGES, LABELS, SEEDS)
    assert x.shape == IMAGES.shape and targets.shape == (64, 10) and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    assert targets.min() >= 0 and (targets > 0).sum(1).max() == 2


def test_mixup_mixes_image_and_target_by_the_same_share():
    """Image i is all i grey levels, so its share can be read off."""
    images = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    labels = (torch.arange(64) >= 32).long()
    x, targets = augment("mixup")(images, labels, SEEDS)
    i = torch.arange(64)
    own = (grey(x).mean(dim=(1, 2, 3)) - (63 - i)) / (2 * i - 63)
    torch.testing.assert_close(targets[i, labels], own, atol=1e-3, rtol=0)
    assert own.std() > 0.2 and own.min() >= -1e-3 and own.max() <= 1.001


def test_cutmix_share_is_the_area_that_is_left():
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    images[32:] = 200
    labels = (torch.arange(64) >= 32).long()
    x, targets = augment("cutmix")(images, labels, SEEDS)
    bright = (grey(x)[:, 0] > 100).float()
    torch.testing.assert_close(targets[:, 1], bright.mean(dim=(1, 2)))
    foreign = bright.bool() ^ labels.bool()[:, None, None]
    assert torch.equal(foreign.any(2).sum(1) * foreign.any(1).sum(1), foreign.sum(dim=(1, 2)))  # one box
    assert foreign.float().mean() > 0.1


def test_shares_come_from_timms_distribution():
    from timm.data.mixup import cutmix_bbox_and_lam

    n, side = 20_000, 32
    images = torch.zeros(n, 1, side, side)
    np.random.seed(0)
    theirs = torch.tensor([cutmix_bbox_and_lam((side, side), lam)[1] for lam in np.random.beta(1, 1, 4000)])
    ours = Cutmix(FRAME, alpha=1.0).shares(images, Chance(step_seeds(0, 0, torch.arange(n)))).mean(dim=(1, 2))
    assert abs(float(ours.mean() - theirs.mean())) < 0.025 and abs(float(ours.std() - theirs.std())) < 0.02
    flat = Mixup(FRAME, alpha=0.8).shares(images, Chance(step_seeds(0, 0, torch.arange(n))))
    assert torch.equal(flat[:, 0, 0], flat[:, -1, -1]) and abs(float(flat[:, 0, 0].mean()) - 0.5) < 0.02


def test_with_two_mixers_half_of_the_images_take_each():
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    a = augment("mixup", "cutmix", image=(3, 8, 8))
    x, _ = a(images, torch.zeros(400).long(), step_seeds(0, 0, torch.arange(400)))
    untouched = (grey(x) - images).abs() < 1e-2
    cut = untouched.flatten(1).float().mean(1) > 0.1
    assert 0.3 < float(cut.float().mean()) < 0.65


# What is refused


@pytest.mark.parametrize(
    "steps,code,said",
    [
        (["horizontal_flop"], "AZ705", "did you mean `horizontal_flip`?"),
        (["quantum"], "AZ705", "the steps are random_crop"),
        ([{"use": "random_crop", "with": {"paddin": 4}}], "AZ706", "did you mean `padding`?"),
        ([{"use": "horizontal_flip", "with": {"p": 1.5}}], "AZ706", "option `p`"),
        ([{"use": "random_crop", "with": {"padding": "4"}}], "AZ706", "option `padding`"),
        ([{"use": "random_resized_crop", "with": {"scale": [1.0, 0.5]}}], "AZ706", "must not be above"),
        ([{"use": "normalise", "with": {"mean": 0}}], "AZ706", "has no option `mean`"),
        (["normalise", "random_crop"], "AZ707", "put `random_crop` earlier"),
        (["random_erasing", "horizontal_flip"], "AZ707", "cannot come after"),
        (["mixup", "random_erasing"], "AZ707", "cannot come after"),
        (["normalise", "normalise"], "AZ707", "cannot come after"),
    ],
)
def test_wrong_steps_are_refused(steps, code, said):
    with pytest.raises(DataError) as error:
        augment(*steps)
    assert error.value.code == code and said in str(error.value)


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(DataError) as error:
        augment({"use": "random_crop", "with": {"padding": 0, "size": 40}})(IMAGES, LABELS, SEEDS)
    assert error.value.code == "AZ706" and "32x32" in str(error.value)


def test_images_that_are_not_bytes_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        augment()(IMAGES.float(), LABELS, SEEDS)


@pytest.mark.parametrize(
    "step", ["flip", {"use": "x", "wiht": {}}, {"with": {}}, {"use": 3}, {"use": "x", "with": []}]
)
def test_steps_are_strict(step):
    if step == "flip":
        assert Step.model_validate(step) == Step.model_validate({"use": "flip", "with": {}})
        return
    with pytest.raises(ValueError):
        Step.model_validate(step)


def test_the_papers_table_is_in_its_order():
    assert [step.use for step in PAPER] == [
        "random_crop",
        "horizontal_flip",
        "random_resized_crop",
        "resize",
        "normalise",
    ]
    assert PAPER[2].with_ == {"scale": [0.8, 1.0], "ratio": [0.75, 1.333]}


def test_the_measurement_measures():
    found = measure(n=256, threads=1, rounds=1)
    assert found["ratio"] == min(found["pil"], found["tensor"]) / found["batched"] > 2
    assert torch.get_num_threads() == 1
