"""attnzoo: a zoo of attention mechanisms that compose into timm backbones.

    import timm, attnzoo                      # either order
    timm.create_model("ham_vit_b")

What most people want:

    create("softmax", dim=384, heads=6)       one mechanism, pool or fusion as a module for any network
    as_mha("softmax", 512, 8)                 the same with the arguments and masks of nn.MultiheadAttention
    compose("ham_b")                          the model of a recipe: a name, a file, a text or a mapping
    list_mechanisms("*lin*", mask="causal")   names; also list_fusions, list_recipes, list_probes ...
    show("softmax")                           one of them: equations, options, masks, paper
    describe(model)                           what is in a model, in a few lines
    diff("ham_a", "ham_b")                    what two recipes differ in
    explain("ham_b")                          the equations of a recipe, layer by layer, as text and LaTeX
    accelerate(model)                         a finished model, faster on a CPU
    probe(model, "entropy", inputs=images)    measure something of a model: a table, a CSV, a figure
    intervene(model, 'temperature(value=2.0)')  change what happens inside it for as long as a block runs
    register_with_transformers()              mechanisms as attention implementations of Hugging Face models
    graft(donor, "ham_b")                     a recipe in a trained timm ViT, with its weights and a ledger of them
    ungraft(model)                            the donor again; save_graft and distil belong to it
    repro("runs/mine")                        train a run again from its record, and name the first difference
    auxiliary_losses(model)                   what its mechanisms add to the loss of your own training loop
    plot.attention_map(heat, image, ax=axes)  pictures: maps, curves, tables of heads, on axes of yours

Those who write mechanisms want the rest: `docs/writing-a-plugin.md`.

`import attnzoo` is light: torch and timm are imported when something needs them. As soon as timm is imported, before or
after, the models of all recipes are known to it.
"""

import lazy_loader

from attnzoo.timm_hook import register_when_timm_is_imported
from attnzoo.version import VERSION as __version__  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_when_timm_is_imported()
