"""What holds for every intervention of the zoo: nothing stays behind, nobody else is touched."""

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from instruments import images, pairs, passing, sentences, vit
from torch import Tensor, nn

import attnzoo
from attnzoo.core import Here, Intervention
from attnzoo.core.options import option_texts, options_of
from attnzoo.errors import ZooError
from attnzoo.lab.intervening import OF_HEADS, intervene, intervention
from attnzoo.lab.points import attach, leaves
from attnzoo.zoo import load_zoo

ZOO = load_zoo().interventions
REGIONS = [[1, 1, 0, 2], [1, 1, 0, 2], [0, 0, 0, 0], [0, 3, 3, 0]]
BOXES = [(0, 0, 2, 2), (1, 1, 4, 4)] * 3
CASES = {
    "ablate_heads": {"heads": [0, 2]},
    "inject": {"attention": {"blocks.0": 0.5, "blocks.1": 0.5}, "mlp": {"blocks.0": 0.4, "blocks.1": 0.4}},
    "isolate": {"regions": REGIONS},
    "keep_top": {"keys": 3},
    "multi_reference": {"references": [0, 5]},
    "rebalance": {"top": [3, 4, 5], "bottom": [6], "queries": "all"},
    "redistribute_sink": {"threshold": 2.6, "ratio": 0.0, "least": 0.0},
    "reinforce_heads": {},
    "reposition": {"boxes": BOXES},
    "soft_identity": {"strength": 0.7},
    "temperature": {"value": 3.0},
    "uniform": {"strength": 0.6},
}
"""Options with which each changes what the small ViT says of six images."""
TOGETHER = {"multi_reference", "reposition"}
"""Those that look at the whole batch, by design."""
EVERY = pytest.mark.parametrize("name", list(ZOO))
OF_SINGLE_HEADS = [name for name in ZOO if set(ZOO.find(name).value.points()) <= set(OF_HEADS)]


def made(name: str, **options) -> Intervention:
    """One that changes something."""
    return ZOO.find(name).value(**CASES[name] | options)


def hooks(model: nn.Module) -> int:
    """How many hooks there are on all modules."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def said(model: nn.Module, *interventions) -> Tensor:
    """What the model says of the images."""
    with torch.no_grad(), intervene(model, *interventions):
        return model(images())


def test_none_is_forgotten_here():
    assert CASES.keys() == set(ZOO)


@EVERY
def test_it_changes_what_the_model_says(name):
    model = vit()
    out = said(model, made(name))
    assert out.isfinite().all() and not torch.allclose(out, said(model), atol=1e-3)


@EVERY
def test_nothing_stays_behind(name):
    model = vit()
    before, keys = said(model), set(model.state_dict())
    with intervene(model, made(name)):
        assert hooks(model) > 0 and set(model.state_dict()) == keys
    with pytest.raises(RuntimeError, match="stop"), intervene(model, made(name)):
        said(model)
        raise RuntimeError("stop")
    with pytest.raises(Exception, match="shape|size|channels"), intervene(model, made(name)):  # in a forward
        model(images()[:, :2])
    assert hooks(model) == 0
    assert torch.equal(said(model), before)


@EVERY
def test_where_it_is_neutral_no_bit_changes(name):
    model, cls = vit(), ZOO.find(name).value
    if not cls.neutral:
        assert name == "ablate_heads"  # heads that are there are no heads taken away
        return
    neutral = made(name, **cls.neutral)
    assert neutral.changes_nothing and not made(name).changes_nothing
    assert torch.equal(said(model, neutral), said(model))
    with intervene(model, neutral):
        assert hooks(model) == 0  # so fused kernels stay in use


@EVERY
def test_its_own_words_make_it_again(name):
    one = made(name, at="blocks.1")
    model = vit()
    assert torch.equal(said(model, one), said(model, intervention(str(one))))


@EVERY
def test_nested_blocks_and_several_at_once_are_the_same(name):
    """And in their order."""
    model, first, then = vit(), made(name), made("reinforce_heads", strength=1.5)
    at_once = said(model, first, then)
    with intervene(model, first):
        assert torch.equal(said(model, then), at_once)
        inside = said(model)
    assert torch.equal(inside, said(model, first))
    assert not torch.allclose(at_once, inside, atol=1e-4)


def test_the_order_counts():
    model = vit()
    few, flat = made("keep_top", keys=2), made("uniform", strength=0.5)
    (after, _), _ = passing(model, "weights", few, flat)
    (before, _), _ = passing(model, "weights", flat, few)
    assert (after > 0).all() and ((before > 0).sum(dim=-1) == 2).all()


@pytest.mark.parametrize("name", OF_SINGLE_HEADS)
def test_heads_that_are_not_named_keep_what_they_give(name):
    model, seen = vit(), []

    def heads(*interventions) -> Tensor:
        with torch.no_grad(), intervene(model, *interventions):
            hook = model.blocks[0].attn.inner.register_forward_hook(lambda _, args, out: seen.append(out))
            model(images())
            hook.remove()
        return seen.pop()

    # the explicit form, which an edit of weights asks for, rounds otherwise than the fused kernel
    plain = heads() if ZOO.find(name).value.points()[0] == "heads" else heads(Same(at="blocks.0"))
    changed = heads(made(name, at="blocks.0", heads=[1, 3]))
    assert torch.equal(changed[:, [0, 2]], plain[:, [0, 2]])
    assert all(not torch.allclose(changed[:, head], plain[:, head], atol=1e-4) for head in (1, 3))


class Same(Intervention):
    """Looks at weights and leaves them."""

    card = attnzoo.InstrumentCard("same", "Nothing.")

    def edit_weights(self, weights, here):
        return weights


@EVERY
def test_a_site_that_is_not_named_is_not_touched(name):
    model, seen = vit(depth=3), []

    def of_first(*interventions) -> Tensor:
        with torch.no_grad(), intervene(model, *interventions):
            hook = model.blocks[0].register_forward_hook(lambda _, args, out: seen.append(out))
            model(images())
            hook.remove()
        return seen.pop()

    assert torch.equal(of_first(made(name, at=["blocks.1", "blocks.2"])), of_first())


@EVERY
def test_a_copy_made_meanwhile_is_nobodys(name):
    """It says what the model says on its own, inside and after; and the model is still edited."""
    model = vit()
    plain = said(model)
    with torch.no_grad(), intervene(model, made(name)):
        edited = model(images())
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # noqa: S301 - our own
        assert torch.equal(copied(images()), plain) and torch.equal(pickled(images()), plain)
        assert torch.equal(model(images()), edited)
        assert torch.equal(said(copied, made(name)), edited)
    assert torch.equal(said(copied), plain) and torch.equal(said(model), plain)


def in_threads(*calls: Callable[[], Tensor]) -> list[Tensor]:
    """What each gives, all begun at once, a few times over."""
    ready, found, faults = threading.Barrier(len(calls)), [None] * len(calls), []

    def run(place: int) -> None:
        try:
            ready.wait(timeout=20)
            for _ in range(5):
                found[place] = calls[place]()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not faults, faults
    return found


@EVERY
def test_two_threads_with_two_models(name):
    models, changes = (vit(seed=0), vit(seed=1)), (made(name), made("temperature", value=2.0))
    wanted = [said(model, change) for model, change in zip(models, changes, strict=True)]
    found = in_threads(lambda: said(models[0], changes[0]), lambda: said(models[1], changes[1]))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@EVERY
def test_one_model_in_two_threads(name):
    """With other images, of which nothing may come through."""
    model, one = vit(), made(name)
    batches = images(seed=2), images(seed=3)
    with torch.no_grad(), intervene(model, one):
        wanted = [model(batch) for batch in batches]

        def call(place: int) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with torch.no_grad():
                    return model(batches[place])

            return run

        found = in_threads(call(0), call(1))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@EVERY
def test_gradients_flow_and_are_finite(name):
    model = vit()
    x = images().requires_grad_()
    with intervene(model, made(name)):
        model(x).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    parameters = [parameter for block in model.blocks for parameter in block.attn.parameters()]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in TOGETHER])
def test_samples_do_not_meet(name):
    model, others = vit(), images(seed=7)
    others[2] = images()[2]
    with torch.no_grad(), intervene(model, made(name)):
        together, apart = model(images())[2], model(others)[2]
        alone = model(images()[2:3])[0]
    assert torch.equal(together, apart)
    assert torch.allclose(alone, together, atol=1e-4)


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_those_that_look_at_the_batch_say_so(name):
    """Samples meet in `multi_reference`, and in `reposition` in their boxes alone."""
    model, others = vit(), images(seed=7)
    others[2] = images()[2]
    with torch.no_grad(), intervene(model, made(name)):
        same = torch.equal(model(images())[2], model(others)[2])
    assert same == (name == "reposition")


@EVERY
def test_under_a_mask_what_is_hidden_stays_hidden(name):
    """A patch that nobody may see moves nobody else."""
    if name == "reposition":
        pytest.skip("it brings tokens to the places of others, which the mask does not hide")
    if name == "multi_reference":
        pytest.skip("a mask of pairs speaks of a sample's own tokens; padding: test_of_sequences_too")
    model, batch, other = vit(), images(), images()
    other[:, :, 4:8, 8:12] = 3.0  # patch 6, token 7
    mask = torch.ones(17, 17, dtype=torch.bool)
    mask[:, 7] = False
    mask[7, 7] = True
    with torch.no_grad(), intervene(model, made(name)):
        a, b = (model.forward_features(x, attn_mask=mask) for x in (batch, other))
    rest = [i for i in range(17) if i != 7]
    assert torch.allclose(a[:, rest], b[:, rest], atol=1e-5)
    assert not torch.allclose(a[:, 7], b[:, 7], atol=1e-2)


@EVERY
def test_in_a_fusion_one_branch_or_all(name):
    model = vit("{fuse: add, of: [softmax, {use: softmax_one}]}")
    own = {"branch": "softmax"} if name not in ("inject", "reposition") else {}
    with torch.no_grad():
        plain = model(images())
        out = said(model, made(name, **own))
    assert out.isfinite().all() and not torch.allclose(out, plain, atol=1e-4)
    with pytest.raises(ZooError, match="AZ923"), intervene(model, made(name, branch="nobody")):
        pass


SEQUENCES = {
    "inject": {"attention": {"decoder.0.self": 0.5, "decoder.1.self": 0.5}},
    "isolate": {"regions": [1, 1, 2, 2, 2, 0], "at": "encoder.*"},
    "multi_reference": {"references": [0], "at": "encoder.*"},
    "rebalance": {"top": [0, 1], "at": "decoder.*.cross"},
    "redistribute_sink": {"threshold": 2.2, "ratio": 0.0, "least": 0.0, "at": "decoder.*.cross"},
}


@EVERY
def test_of_sequences_too(name):
    """Padding says nothing: longer padding changes no word of the answer."""
    model, (source, target) = pairs(), sentences()
    if name == "reposition":
        with intervene(model, made(name)), pytest.raises(ZooError, match="AZ921"):
            model(source, target)  # a line has no boxes
        return
    one = ZOO.find(name).value(**SEQUENCES.get(name, CASES[name]))
    longer = torch.nn.functional.pad(source, (0, 1))
    with torch.no_grad():
        plain = model(source, target)
        with intervene(model, one):
            out, padded = model(source, target), model(longer, target)
    assert out.isfinite().all() and not torch.allclose(out, plain, atol=1e-4)
    if name != "isolate":  # regions are stretched over all places
        assert torch.allclose(out, padded, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in TOGETHER])
def test_a_sequence_that_is_continued_is_edited_as_it_is_read_whole(name):
    """Token by token, with what was kept of those before."""
    model, source = pairs(), torch.tensor([[5, 6, 7, 8, 2]])
    target = torch.tensor([[1, 11, 12, 13, 4]])
    one = ZOO.find(name).value(**SEQUENCES.get(name, CASES[name]))
    with torch.no_grad(), intervene(model, one):
        whole = model(source, target)
        state = model.start(model.encode(source))
        steps = [model.step(target[:, place : place + 1], state) for place in range(5)]
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-4)


def test_a_layer_with_two_sites_is_the_block_of_both():
    model, seen = pairs(), {}

    def note(_tensor: Tensor, here: Here) -> None:
        seen[here.site] = here.tokens

    found = leaves(model)
    hook = model.decoder[0].register_forward_pre_hook(lambda _, args: seen.update(entered=args[0]))
    with torch.no_grad(), attach(model, {leaf: {"heads": note} for leaf in found}):
        model(*sentences())
    hook.remove()
    assert [leaf.site for leaf in found[2:4]] == ["decoder.0.self", "decoder.0.cross"]
    assert all(leaf.block is model.decoder[0] and leaf.mlp is model.decoder[0].mlp for leaf in found[2:4])
    assert seen["decoder.0.self"] is seen["decoder.0.cross"] is seen["entered"]


def test_what_a_sequence_reads_cannot_be_edited_while_it_is_continued():
    model, (source, target) = pairs(), sentences()
    with torch.no_grad(), intervene(model, Louder(at="decoder.*.self")):
        state = model.start(model.encode(source))
        with pytest.raises(ZooError, match="AZ924"):
            model.step(target[:, :1], state)


class Louder(Intervention):
    """Edits what is read."""

    card = attnzoo.InstrumentCard("louder", "Twice as loud.")

    def edit_input(self, x, here):
        return 2 * x


class Counting(Intervention):
    """Keeps something from layer to layer, and says how much there was."""

    card = attnzoo.InstrumentCard("counting", "How much is kept.")

    def edit_output(self, out, here):
        SEEN.append((here.layer, len(here.shared), here.tokens.shape[0]))
        here.shared[here.layer] = out
        return out


SEEN: list[tuple[int, int, int]] = []


def test_what_is_kept_from_layer_to_layer_is_forgotten_after_a_forward():
    model = vit(depth=3)
    SEEN.clear()
    with torch.no_grad(), intervene(model, Counting()):
        model(images(4))
        with pytest.raises(Exception, match="shape|size|channels"):
            model(images()[:, :2])
        model(images(5))
    assert SEEN == [(0, 0, 4), (1, 1, 4), (2, 2, 4), (0, 0, 5), (1, 1, 5), (2, 2, 5)]


NOTHING_TO_REACH = {
    "fourier": [name for name in ZOO if set(ZOO.find(name).value.points()) & {"scores", "weights", "heads"}],
    "elu_linear": [
        "temperature",
        "uniform",
        "keep_top",
        "rebalance",
        "redistribute_sink",
        "isolate",
        "multi_reference",
    ],
}


@pytest.mark.parametrize(
    ("attention", "name"),
    [(attention, name) for attention, names in NOTHING_TO_REACH.items() for name in names],
)
def test_what_it_cannot_reach_is_refused_with_the_reason(attention, name):
    model = vit(attention)
    with pytest.raises(ZooError, match="AZ924") as found, intervene(model, made(name)):
        pass
    (fault,) = found.value.diagnostics
    assert fault.why and fault.help and hooks(model) == 0


@EVERY
def test_sites_and_heads_that_there_are_not_are_refused(name):
    model = vit()
    with pytest.raises(ZooError, match="AZ923"), intervene(model, made(name, at="layer.1")):
        pass
    code = "AZ923" if name in OF_SINGLE_HEADS else "AZ921"
    with pytest.raises(ZooError, match=code), intervene(model, made(name, heads=[4])):
        pass
    with pytest.raises(ZooError, match="AZ921"):
        replace(made(name), at=3)
    assert hooks(model) == 0


@EVERY
def test_its_card_and_options_are_told(name):
    cls = ZOO.find(name).value
    assert cls.card.name == name and cls.card.equation
    assert set(option_texts(cls)) >= set(options_of(cls).model_fields)
