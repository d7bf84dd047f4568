"""Claims about what a call leaves behind: nothing, neither in the component nor outside; and about training mode."""

import copy
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from attnzoo.core import Fusion, Mask
from attnzoo.testing.checks.construction import drawn_from, settings_of_process, unmoved
from attnzoo.testing.claim import Inapplicable, claim, requires, same
from attnzoo.testing.influence import random_mask
from attnzoo.testing.strategies import Checkable, Scene


def _mask(scene: Scene) -> Mask:
    """A mask of all claimed kinds."""
    return Mask() if issubclass(scene.component, Fusion) else random_mask(scene, scene.card.masks)


@requires("mechanism", "pool", "fusion", share=0.4)
def check_eval_deterministic(cls: Checkable, scene: Scene) -> None:
    """In eval mode the same tokens give the same output."""
    component, inputs = scene.build(), scene.inputs()
    first = scene.run(component, inputs).clone()
    same(scene.run(component, inputs), first, "in eval mode the same tokens give the same output", 0)


@requires("mechanism", "pool", "fusion", share=0.4)
def check_arguments_left_alone(cls: Checkable, scene: Scene) -> None:
    """Tokens, context, branches, masks and maps are left as they were, in eval and in training mode."""
    component, inputs, mask, given = scene.build(), scene.inputs(), _mask(scene), scene.given
    watched: dict[str, Tensor] = {f"input {i + 1}": x for i, x in enumerate(inputs)}
    watched |= {f"the map `{name}`": m for name, m in given.items()}
    watched |= {
        f"`{k}` of the mask": m for k, m in (("keys", mask.keys), ("pairs", mask.pairs)) if m is not None
    }
    before = {name: tensor.clone() for name, tensor in watched.items()}
    for training in (False, True):
        component.train(training)
        with torch.no_grad():
            scene.run(component, inputs, mask, given or None)
        for name, tensor in watched.items():
            claim(torch.equal(tensor, before[name]), "arguments are left as they were", f"{name} was changed")


@requires("mechanism", "pool", "fusion", share=0.2)
def check_calls_forgotten(cls: Checkable, scene: Scene) -> None:
    """A call leaves nothing behind: after tokens A, B gives what it gives a fresh copy, and so does A again."""
    component, a, b = scene.build(), scene.inputs(), scene.inputs(3)
    fresh = copy.deepcopy(component)
    claimed = "a call leaves nothing behind"
    for training in (False, True):
        component.train(training), fresh.train(training)
        kept = {name: tensor.clone() for name, tensor in component.state_dict().items()}
        first = scene.run(component, a).clone()
        same(
            scene.run(component, b), scene.run(copy.deepcopy(fresh), b), f"{claimed}: B after A is B alone", 0
        )
        same(scene.run(component, a), first, f"{claimed}: A after B is A", 0)
        for name, tensor in component.state_dict().items():
            claim(torch.equal(tensor, kept[name]), claimed, f"`{name}` of the state dict moved")
    same(
        scene.run(component.eval(), a),
        scene.run(fresh.eval(), a),
        f"{claimed}: eval after training is eval",
        0,
    )


@requires("mechanism", "pool", "fusion", share=0.2)
def check_layouts_forgotten(cls: Checkable, scene: Scene) -> None:
    """A call in one size leaves nothing behind for one in another size, dtype or number of samples."""
    if getattr(scene.card, "fixed_length", True) is True or scene.card.context_grid is not None:
        others = [scene]
    else:
        first, *rest = scene.layout.grid
        # the same number of tokens, in another arrangement; and another number
        others = [scene.with_layout((*rest, first)), scene.with_layout((max(1, first - 1), *rest))]
    others.append(replace(scene, batch=scene.batch + 1))
    component = scene.build()
    kept = {name: tensor.clone() for name, tensor in component.state_dict().items()}
    expected = scene.run(copy.deepcopy(component), scene.inputs(), _mask(scene))
    for other in others:
        other.run(component, other.inputs(), _mask(other))
    scene.run(component.float(), [x.float() for x in scene.inputs()], _mask(scene))
    component.double().load_state_dict(kept)
    claimed = "a call leaves nothing behind for one of another size or dtype"
    same(scene.run(component, scene.inputs(), _mask(scene)), expected, claimed, 0)


@requires("mechanism", "pool", "fusion", share=0.4)
def check_train_equals_eval(cls: Checkable, scene: Scene) -> None:
    """Without dropout, training mode gives what eval mode gives, under masks too."""
    component, inputs = scene.build(), scene.inputs()
    for mask in (Mask(), _mask(scene)):
        trained = scene.run(component.train(), inputs, mask)
        expected = scene.run(component.eval(), inputs, mask)
        same(trained, expected, "without dropout, training mode equals eval mode")


@requires("mechanism", "pool", "fusion", share=0.4)
def check_no_global_randomness(cls: Checkable, scene: Scene) -> None:
    """In eval mode a forward neither reads, moves nor seeds the global random numbers, nor changes settings."""
    component, inputs = scene.build(), scene.inputs()
    outs = []
    for seed in (scene.seed + 11, scene.seed + 12):
        with drawn_from(seed):
            before, state = settings_of_process(), torch.get_rng_state()
            outs.append(scene.run(component, inputs))
            unmoved(before, "a forward")
            moved = not torch.equal(state, torch.get_rng_state())
        claim(not moved, "a forward in eval mode leaves the global random state alone", "it moved it")
    same(outs[1], outs[0], "in eval mode the global random state has no say", 0)


@requires("mechanism", "pool", "fusion", share=0.4)
def check_training_seeds(cls: Checkable, scene: Scene) -> None:
    """In training mode, with dropout, a forward draws from the global random numbers and does not seed them."""
    if not issubclass(cls, Fusion):
        scene = scene.at(replace(scene.site, attn_drop=0.5, proj_drop=0.5))
    component, inputs, states = scene.build().train(), scene.inputs(), []
    for seed in (scene.seed + 21, scene.seed + 22):
        with drawn_from(seed):
            scene.run(component, inputs)
            states.append(torch.get_rng_state())
    seeded = torch.equal(*states)
    claim(not seeded, "a forward leaves the seed of the global random numbers alone", "it sets its own")


@requires("mechanism", "pool", "fusion")
def check_batch_independent(cls: Checkable, scene: Scene) -> None:
    """A sample alone gives what it gives in a batch, under its masks too, in eval and in training mode."""
    scene = replace(scene, batch=max(2, scene.batch))
    component, inputs, i = scene.build(), scene.inputs(), scene.seed % scene.batch
    one, given = slice(i, i + 1), {name: m[i : i + 1] for name, m in scene.given.items()}
    mask = _mask(scene) if scene.seed % 2 else Mask()
    own = replace(
        mask,
        keys=None if mask.keys is None else mask.keys[one],
        pairs=None if mask.pairs is None else mask.pairs[one],
    )
    for training in (False, True):
        component.train(training)
        together = scene.run(component, inputs, mask)
        alone = scene.run(component, [x[one] for x in inputs], own, given)
        mode = "training" if training else "eval"
        same(alone, together[one], f"a sample alone gives what it gives in a batch, in {mode} mode")


@requires("mechanism", "pool", "fusion", share=0.1)
def check_instances_apart(cls: Checkable, scene: Scene) -> None:
    """Instances share nothing: what one was given before, in this process, has no say in what another gives."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or not Path(file).is_file():
        raise Inapplicable("the component comes from no file, which could be read afresh")
    name = f"attnzoo_fresh_{cls.__name__}"
    if cls.__module__ in ("__main__", name):  # a script that checks its own component would run without end
        raise Inapplicable("the component's file is what runs now, and cannot be read afresh")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        inputs, mask = scene.inputs(), _mask(scene)
        for other in (replace(scene, options={}), scene.roomy()):
            try:
                other.run(other.build(), other.inputs(), _mask(other))
            except Exception:  # noqa: S112 - whether these work is for other checks to say
                continue
        used = scene.run(scene.build(), inputs, mask)
        fresh_scene = replace(scene, component=getattr(module, cls.__qualname__))
        fresh = fresh_scene.run(fresh_scene.build(), inputs, mask)
    finally:
        del sys.modules[name]
    same(used, fresh, "instances share nothing that depends on what they were given", 0)
