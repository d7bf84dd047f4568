"""A plugin for pytest that lets timm's own tests see the models of attnzoo's recipes, and no others."""

import timm

import attnzoo  # noqa: F401 - registers them
from attnzoo.recipe.timm_models import registered

NAMES = sorted(name for name, recipe in registered.items() if recipe)


def _ours(filter="", module="", pretrained=False, exclude_filters="", **_) -> list[str]:
    """As `timm.list_models`. By their names timm tells transformers, whose features are tokens, from other networks."""
    modules = [module] if isinstance(module, str) else module
    if pretrained or "vit_*" in exclude_filters:
        return []
    if "vit_*" in filter:
        return NAMES
    known = {name: timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in NAMES}
    return [] if filter else [name for name in NAMES if not module or known[name] in modules]


timm.list_models = _ours
timm.list_pretrained = lambda *_, **__: []


def pytest_collection_modifyitems(config, items):
    """Leave out the tests of models that timm names itself."""
    ours = [
        item
        for item in items
        if getattr(item, "callspec", None) and item.callspec.params.get("model_name") in NAMES
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
