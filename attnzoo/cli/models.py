"""What MODEL names where a model is looked into: a run, a recipe, a model of timm's, a folder of timm's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LOCAL = "local-dir:"
"""What timm writes before a folder with weights and `config.json`."""


def opened(name: str, init_from: Path | None) -> tuple[Any, Any]:
    """The run that is meant, or None, and its recipe, or None for a model of timm's: a recipe comes first.

    Args:
        name: As it was typed.
        init_from: A file of weights, which a run and a folder of timm's have themselves.

    Raises:
        ZooError: AZ907, when there are two sources of weights; AZ204, when nothing is called so.
        RecipeError, RunError: what is wrong with the recipe or the run.
    """
    from attnzoo.errors import RecipeError, ZooError, did_you_mean
    from attnzoo.recipe.loading import load
    from attnzoo.train import open_run

    is_run = _is_run(name)
    if init_from is not None and (is_run or name.startswith(LOCAL)):
        kind = "a folder of timm's" if name.startswith(LOCAL) else "a run"
        raise ZooError(
            "AZ907",
            f"`{name}` is {kind}, which has weights of its own",
            help="leave --init-from out, or name the recipe",
        )
    if is_run:
        run = open_run(name)
        return run, run.loaded
    if name.startswith(LOCAL):
        return None, None
    try:
        return None, load(name)
    except RecipeError as error:
        unknown = error.diagnostics[0]
        if unknown.code != "AZ204" or unknown.place is not None:  # a place in a recipe that there is
            raise
    import timm

    if timm.is_model(name):
        return None, None
    raise ZooError(
        "AZ204",
        f"there is no recipe and no timm model called `{name[:200]}`",
        help=f"{unknown.help}; of timm's models, {did_you_mean(name[:200], timm.list_models()) or 'none is near'}",
    )


def _is_run(name: str) -> bool:
    """Whether a folder is meant; a recipe of the zoo comes first, `./name` is always a folder."""
    from attnzoo.zoo import load_zoo

    return Path(name).is_dir() and name not in load_zoo().recipes


def only_for(kind: str, but: str, *options: tuple[str, Any, str]) -> None:
    """Refuse options that belong to models of another kind: the first that was given, with what to do instead.

    Args:
        kind: Of the models that they are for.
        but: What this one is.
        options: Name, value and what to do instead.

    Raises:
        ZooError: AZ908.
    """
    from attnzoo.errors import ZooError

    for option, given, help in options:
        if given:
            raise ZooError("AZ908", f"`{option}` is for {kind}, and {but}", help=help)


@dataclass(frozen=True)
class ImageModel:
    """A model of images that is looked into, and the images that it has itself.

    Args:
        name: For the title and the file.
        state: How it was trained.
        model: In eval mode.
        size: Channels, rows and columns of its images.
        mean: By channel, of images from 0 to 1.
        std: By channel, of images from 0 to 1.
        classes: Names of its classes; None where they have none.
        test: The test images of a run.
    """

    name: str
    state: str
    model: Any
    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Sequence[str] | None = None
    test: Any = None

    def images(self, paths: Sequence[Path], count: int, seed: int) -> tuple[Any, list[str], list[int] | None]:
        """Images from 0 to 255 (b c y x), their names, and their classes where these are known.

        Args:
            paths: Files and folders; when there are none, test images, or the picture that comes with attnzoo.
            count: Most images.
            seed: Of the draw.
        """
        import torch

        from attnzoo.bench.composition import default_image
        from attnzoo.data.chance import drawn
        from attnzoo.lab.heatmap import image_files, read_image

        if self.test is not None and not paths:
            indices = drawn(len(self.test), count, seed)
            images, truths = self.test.batch(torch.tensor(indices))
            return images, [f"test image {i}" for i in indices], truths.tolist()
        files = image_files(paths or [default_image()], count, seed)
        return torch.stack([read_image(file, self.size) for file in files]), [f.name for f in files], None


def image_model(
    name: str, run: Any, loaded: Any, init_from: Path | None, seed: int, which: Literal["best", "last"]
) -> ImageModel:
    """The model that `opened` found.

    Args:
        name: As it was typed.
        run: None where none is meant.
        loaded: The recipe; None for a model of timm's.
        init_from: A file of weights.
        seed: Of the weights of what is untrained.
        which: Weights of a run.

    Raises:
        ZooError: AZ903, AZ935, RecipeError AZ311, AZ606: what is wrong with a model of timm's, or with the weights.
    """
    if run:
        data, model = run.data(), run.model(which)
        state = f"{run.loaded.name}, {which} epoch"
        name = Path(name).resolve().name
        return ImageModel(name, state, model, data.image, data.mean, data.std, data.classes, data.test)
    if loaded:
        model, state = from_recipe(loaded, init_from, seed)
        cfg: Any = model.pretrained_cfg
        size = tuple(cfg["input_size"])
        mean, std = (tuple(cfg[name][: size[0]]) for name in ("mean", "std"))
        return ImageModel(loaded.name, state, model, size, mean, std)
    return from_timm(name, init_from, seed)


def from_recipe(loaded: Any, init_from: Path | None, seed: int) -> tuple[Any, str]:
    """The model of a recipe in eval mode, and how it was trained.

    Args:
        loaded: The recipe.
        init_from: A file of weights.
        seed: Of the weights that it lacks.

    Raises:
        RecipeError: AZ606, when the weights do not fit.
    """
    import torch

    from attnzoo.recipe.composing import build

    torch.manual_seed(seed)
    model = build(loaded, {}).eval()
    return model, _state(model, init_from, seed)


def _state(model: Any, init_from: Path | None, seed: int) -> str:
    """How a model was trained, once the weights of a file are in it."""
    from attnzoo.recipe.weights import init_model

    if init_from is None:
        return f"untrained, seed {seed}"
    ledger = init_model(model, init_from)
    new = f", {len(ledger['new'])} tensors untrained" if ledger["new"] else ""
    return f"weights of {init_from.name}{new}"


def from_timm(name: str, init_from: Path | None, seed: int, **options: Any) -> ImageModel:
    """A model of timm's.

    Args:
        name: As `timm.create_model` takes it.
        init_from: A file of weights.
        seed: Of the weights that it lacks.
        options: Of `timm.create_model`.
    """
    import timm
    import torch

    folder = name.removeprefix(LOCAL) if name.startswith(LOCAL) else None
    torch.manual_seed(seed)
    model = _built(name, folder, **options).eval()
    state = f"weights of {folder}" if folder is not None else _state(model, init_from, seed)
    cfg: Any = timm.data.resolve_model_data_config(model)
    labels = model.pretrained_cfg.get("label_names")
    classes = labels if folder is not None and labels and len(labels) == model.num_classes else None
    size = tuple(cfg["input_size"])
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return ImageModel(
        Path(folder).resolve().name if folder is not None else name,
        state,
        model,
        (size[0], *(built or size[1:])),
        tuple(cfg["mean"][: size[0]]),
        tuple(cfg["std"][: size[0]]),
        classes,
    )


def _built(name: str, folder: str | None, **options: Any) -> Any:
    """A model of timm's: first looked at without allocating it, so that nobody waits for what is refused.

    Args:
        name: As `timm.create_model` takes it.
        folder: The folder that it names, whose weights are loaded; None where it names none.
        options: Of `timm.create_model`.

    Raises:
        ZooError: AZ903, when it has no maps; AZ935, when timm cannot build it.
        RecipeError: AZ311, when it is too large for this machine.
    """
    import timm

    from attnzoo.errors import ZooError
    from attnzoo.hosts.info import unallocated
    from attnzoo.lab.timm_models import tapped

    try:
        with unallocated():
            shell = timm.create_model(name, pretrained=False, **options)
        with tapped(shell):
            pass
        return timm.create_model(name, pretrained=folder is not None, **options)
    except ZooError:
        raise
    except Exception as error:  # whatever timm makes of a folder: its files may hold anything
        raise ZooError(
            "AZ935",
            f"timm cannot build `{name}`",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            help="a folder needs `config.json` and `model.safetensors`, as `timm.models.save_for_hf` writes them"
            if folder is not None
            else "`timm.create_model` says the same",
        ) from None
