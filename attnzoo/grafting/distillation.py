"""Block-wise distillation: a graft's new attention learns to give what the donor's blocks give, then all is fine-tuned.

Ren et al., "FAR: Function-preserving Attention Replacement for IMC-friendly Inference", 2025, arXiv:2505.21535.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import auxiliary_losses
from attnzoo.data import Augment, ImageData, Step, evaluation, load_images, step_seeds
from attnzoo.errors import ZooError
from attnzoo.grafting.donor import GraftError, seeded
from attnzoo.grafting.grafts import ungraft
from attnzoo.hosts.given import stand_ins, taken
from attnzoo.recipe.plan import Placed
from attnzoo.train import Settings, sampler
from attnzoo.train.loop import Report, make_scheduler
from attnzoo.train.metrics import Evaluation, evaluate
from attnzoo.train.optimizer import make_optimizer

Tuned = Literal["model", "blocks"]
"""What the second stage changes: everything, or the blocks whose attention was replaced."""
FAR: Mapping[str, Any] = {
    "batch_size": 64,
    "epochs": 10,
    "optimizer": {"use": "adamw", "lr": 0.003, "weight_decay": 0.01},
    "schedule": {"use": "cosine", "warmup": 1},
    "clip_grad": 1.0,
}
"""How a graft is distilled unless said otherwise. The paper has 30 epochs of ImageNet, with 5 of warm-up, and then a
tenth of the learning rate."""
LOWER = 0.1
"""Learning rate of the second stage, of that of the first."""
COMPARED = 1024
"""Test images on which blocks are compared, at most."""


@dataclass(frozen=True)
class Stage:
    """A graft at one moment.

    Args:
        name: `graft`, `distilled` or `fine-tuned`.
        accuracy: Share of the test images that it recognises.
        cosines: Of each block's outputs and the donor's, in order: the mean over tokens of test images.
    """

    name: str
    accuracy: float
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class Distillation:
    """What became of a distillation.

    Args:
        data: Name of the data set.
        images: How many there are to test on.
        replaced: Numbers of the blocks whose attention was replaced.
        donor: Accuracy of the donor.
        stages: The graft before, after the first stage, and after the second if there was one.
        seconds: What both stages took.
    """

    data: str
    images: int
    replaced: tuple[int, ...]
    donor: float
    stages: tuple[Stage, ...]
    seconds: float

    @property
    def recovered(self) -> float:
        """The last accuracy as a share of the donor's."""
        return self.stages[-1].accuracy / self.donor if self.donor else 0.0


def distil(
    graft: nn.Module,
    settings: Settings,
    *,
    teacher: nn.Module | None = None,
    first: int | None = None,
    finetune: int = 10,
    tune: Tuned = "model",
    mse: float = 0.0,
    ce: float = 0.0,
    at_once: int | None = None,
    report: Report | None = None,
) -> Distillation:
    """Let a graft learn what its donor does.

    First stage: everything is frozen but the attention that was replaced, and Σ_l (1 − cos(s_l, t_l)) is minimised, the
    outputs s and t of the blocks l of graft and donor, the mean over tokens. The graft works on its own activations.
    With `at_once` the replaced blocks learn so many at a time, from the first on, while those before them stay as they
    have become; l counts the blocks before the next one that has not learnt.
    Second stage: cross-entropy, with a tenth of the learning rate; alone, as in continue-tuning, with all of it.

    Args:
        graft: What `attnzoo.graft` gave; it is changed.
        settings: Data, augmentation, optimiser, schedule, batch size and seed of both stages.
        teacher: What it learns from; its donor when None.
        first: Epochs of the first stage, with `at_once` of each part; 0 for none; those of the settings when None.
        finetune: Epochs of the second stage; 0 for none.
        tune: What the second stage changes.
        mse: Weight of Σ_l ‖s_l − t_l‖² / ‖t_l‖² in the first stage: a cosine says nothing of lengths.
        ce: Weight of the cross-entropy in the first stage (the paper's "combine").
        at_once: How many replaced blocks learn at a time (the paper's "sequential"); all when None ("parallel").
        report: Told what happens, as `attnzoo.train.train` does.

    Raises:
        GraftError: AZ942 for a model that is no graft, AZ944 for data that the model has no classes for or nothing that
            was replaced or learns, AZ945 where a loss is not finite.
        ZooError: AZ928, for `ce` and `at_once` together.
        DataError: AZ7xx, when the data cannot be had.
        RunError: AZ806, for an optimiser that timm has not.
    """
    if ce and at_once:
        raise ZooError(
            "AZ928",
            "`ce` and `at_once` do not go together",
            why="what the model says depends on blocks that have not learnt yet",
            help="leave one of the two out",
        )
    if at_once is not None and at_once < 1:
        raise GraftError("AZ944", f"with `at_once={at_once}` no block learns", help="say 1 or more")
    teacher = ungraft(graft).eval() if teacher is None else teacher
    teacher = deepcopy(teacher).eval() if teacher.training else teacher  # the caller's keeps its mode
    replaced = replaced_blocks(graft)
    if not replaced:
        raise GraftError(
            "AZ944",
            "no block of this graft has another attention than its donor",
            help="graft another recipe",
        )
    lesson = _Lesson(graft, teacher, replaced, settings, report or (lambda event: None))
    was_training = graft.training
    first = settings.epochs if first is None else first
    stages = [lesson.stage("graft")]
    try:
        if first:
            size = at_once or len(replaced)
            for start in range(0, len(replaced), size):
                names = [f"blocks.{number}" for number in replaced[start : start + size]]
                if at_once:
                    lesson.report({"event": "note", "text": f"{', '.join(names)} learn"})
                until = (*replaced, len(lesson.graft.blocks))[min(start + size, len(replaced))]
                with seeded(settings.seed), _only(graft, [f"{name}.attn." for name in names]):
                    lesson.learn(settings, first, cosine=1.0, mse=mse, ce=ce, until=until)
            stages.append(lesson.stage("distilled"))
        if finetune:
            rate = settings.optimizer.lr * (LOWER if first else 1)
            lower = settings.optimizer.model_copy(update={"lr": rate})
            blocks = [""] if tune == "model" else [f"blocks.{number}." for number in replaced]
            with seeded(settings.seed + 1), _only(graft, blocks):
                lesson.learn(
                    settings.model_copy(update={"optimizer": lower}), finetune, cosine=0.0, mse=0.0, ce=1.0
                )
            stages.append(lesson.stage("fine-tuned"))
    finally:
        graft.train(was_training)
    accuracy = lesson.tested(teacher).accuracy
    took = time.perf_counter() - lesson.begun
    return Distillation(settings.data, len(lesson.data.test), tuple(replaced), accuracy, tuple(stages), took)


def replaced_blocks(graft: Any) -> list[int]:
    """Numbers of the blocks with another attention than `softmax`.

    Args:
        graft: A composed ViT.
    """
    placed = {number: getattr(block.attn, "_placed", None) for number, block in enumerate(graft.blocks)}
    return [number for number, one in placed.items() if isinstance(one, Placed) and one.formula != "softmax"]


@contextmanager
def _only(model: nn.Module, beginnings: Sequence[str]) -> Iterator[None]:
    """Parameters whose names begin so are learnt, the others are not; afterwards all are as they were."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name] and name.startswith(tuple(beginnings)))
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


@contextmanager
def block_outputs(model: Any) -> Iterator[list[Tensor]]:
    """The outputs (b n c) of a ViT's blocks, in order, of the forwards inside the `with` block.

    Args:
        model: Of timm, or composed.
    """
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.register_forward_hook(lambda module, inputs, out: seen.append(out)))
        yield seen


def cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    """1 − the cosine of tokens (b n c), the mean over all."""
    return 1 - F.cosine_similarity(one.float(), other.float(), dim=-1).mean()


def relative_error(one: Tensor, other: Tensor) -> Tensor:
    """‖one − other‖² / ‖other‖² of tokens (b n c)."""
    return (one - other).square().sum() / other.square().sum().clamp(min=torch.finfo(other.dtype).tiny)


class _Lesson:
    """Graft, donor and the images that both see."""

    def __init__(
        self, graft: Any, teacher: nn.Module, replaced: Sequence[int], settings: Settings, report: Report
    ):
        self.graft, self.teacher, self.replaced, self.settings = graft, teacher, replaced, settings
        self.report, self.device = report, next(graft.parameters()).device
        image: tuple[int, int, int] = (graft.in_chans, *graft.patch_embed.img_size)
        channels, rows, columns = image
        size = settings.size or (rows if rows == columns else None)
        self.data: ImageData = load_images(
            settings.data, root=settings.data_root, size=size, seed=settings.seed
        )
        if len(self.data.classes) != graft.num_classes or self.data.image[0] != channels:
            raise GraftError(
                "AZ944",
                f"`{settings.data}` has {len(self.data.classes)} classes in {self.data.image[0]} channels, the graft "
                f"{graft.num_classes} in {channels}",
                why="its head was trained for other classes",
                help="name data with the donor's classes, or fine-tune the donor on these first: "
                "timm.create_model(NAME, num_classes=...)",
            )
        cfg = graft.pretrained_cfg
        statistics = {"mean": list(cfg["mean"]), "std": list(cfg["std"])}
        steps = [Step.model_validate(step.model_dump(by_alias=True)) for step in settings.augment]
        self.augment = Augment(steps, image=image, classes=len(self.data.classes), **statistics)
        self.evaluation = evaluation(image, **statistics)
        self.taken = taken(graft)
        self.accuracy: float | None = None
        self.begun = time.perf_counter()

    def tested(self, model: nn.Module) -> Evaluation:
        """A model on the test side."""
        return evaluate(
            model,
            self.data.test,
            self.evaluation,
            self.data.classes,
            inputs=taken(model),
            device=self.device,
        )

    def stage(self, name: str) -> Stage:
        """The graft as it is now."""
        found = self.tested(self.graft)
        self.accuracy = found.accuracy
        told = f"{name}: accuracy {100 * found.accuracy:.2f} %"
        stage = Stage(name, found.accuracy, self._cosines())
        self.report({"event": "note", "text": f"{told}, least cosine of a block {min(stage.cosines):.4f}"})
        return stage

    @torch.no_grad()
    def _cosines(self) -> tuple[float, ...]:
        """The mean cosine of the outputs of each block, in eval mode."""
        was_training, count = self.graft.training, min(COMPARED, len(self.data.test))
        sums = torch.zeros(len(self.graft.blocks), dtype=torch.float64)
        self.graft.eval()
        try:
            for indices in torch.arange(count).split(256):
                x = self.evaluation(self.data.test.batch(indices)[0]).to(self.device)
                with block_outputs(self.graft) as mine, block_outputs(self.teacher) as theirs:
                    self.graft(x, **stand_ins(x, self.taken))
                    self.teacher(x, **stand_ins(x, taken(self.teacher)))
                distances = [float(cosine_distance(s, t)) for s, t in zip(mine, theirs, strict=True)]
                sums += (1 - torch.tensor(distances, dtype=torch.float64)) * len(indices)
        finally:
            self.graft.train(was_training)
        return tuple((sums / count).tolist())

    def learn(
        self, settings: Settings, epochs: int, *, cosine: float, mse: float, ce: float, until: int = 0
    ) -> None:
        """One stage, or a part of it: the outputs of the blocks before `until` are compared."""
        examples = len(self.data.train)
        steps = sampler.steps_per_epoch(examples, settings.batch_size)
        optimizer = make_optimizer(self.graft, settings.optimizer)
        scheduler = make_scheduler(optimizer, settings.model_copy(update={"epochs": epochs}), steps)
        begun = time.perf_counter()
        for epoch in range(epochs):
            total = 0.0
            for step in range(steps):
                chosen = sampler.batch(
                    examples, settings.batch_size, seed=settings.seed, epoch=epoch, step=step
                )
                seeds = step_seeds(settings.seed, epoch, chosen)
                x, targets = (t.to(self.device) for t in self.augment(*self.data.train.batch(chosen), seeds))
                self.graft.train()
                loss = self._loss(settings, x, targets, cosine, mse, ce, until)
                if not bool(loss.isfinite()):
                    raise GraftError(
                        "AZ945",
                        f"the loss of step {epoch * steps + step + 1} is not finite",
                        help="try a lower learning rate: --set train.optimizer.lr=0.0001",
                    )
                loss.backward()
                if settings.clip_grad:
                    nn.utils.clip_grad_norm_(self.graft.parameters(), settings.clip_grad)
                scheduler.step_update(epoch * steps + step)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.item()
                self._tell(epoch, step, epochs, steps, total / (step + 1), time.perf_counter() - begun)

    def _loss(
        self,
        settings: Settings,
        x: Tensor,
        targets: Tensor,
        cosine: float,
        mse: float,
        ce: float,
        until: int,
    ) -> Tensor:
        with block_outputs(self.graft) as mine, auxiliary_losses(self.graft) as extra:
            logits = self.graft(x, **stand_ins(x, self.taken))
        loss = logits.new_zeros(()).float()
        if cosine or mse:
            with torch.no_grad(), block_outputs(self.teacher) as theirs:
                self.teacher(x, **stand_ins(x, taken(self.teacher)))
            for s, t in zip(mine[:until], theirs[:until], strict=True):
                loss = loss + cosine * cosine_distance(s, t)
                if mse:
                    loss = loss + mse * relative_error(s, t)
        if ce:
            smoothing = settings.label_smoothing
            loss = loss + ce * F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        return loss + settings.auxiliary * extra.mean()

    def _tell(self, epoch: int, step: int, epochs: int, steps: int, loss: float, seconds: float) -> None:
        """What a step came to, as `attnzoo.train.train` tells it; `seconds` are those of its stage."""
        done = epoch * steps + step + 1
        event = {
            "epoch": epoch + 1,
            "step": done,
            "steps": epochs * steps,
            "epoch_step": step + 1,
            "epoch_steps": steps,
            "train_loss": loss,
            "images_per_second": done * self.settings.batch_size / seconds,
            "examples": "images",
            "test_accuracy": self.accuracy,
            "seconds": time.perf_counter() - self.begun,
            "left": (epochs * steps - done) * seconds / done,
        }
        self.report({"event": "step", **event})
        if step + 1 == steps:
            self.report({"event": "epoch", **event})
