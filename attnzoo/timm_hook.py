"""Makes the models of all recipes known to timm, whichever of the two is imported first.

timm has no plugin discovery. When timm is there already its registry is filled at once; otherwise a finder on
`sys.meta_path` waits for `import timm` and fills it right after. Standard library only.
"""

import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder


def _register() -> None:
    """Fill timm's registry; `import timm` works, whatever goes wrong here."""
    try:
        _fill()
    except Exception as error:
        warnings.warn(f"attnzoo could not register its models with timm: {error}", stacklevel=2)


def _fill() -> None:
    from attnzoo.recipe.timm_models import register_models
    from attnzoo.zoo import when_loaded

    when_loaded(register_models)


class _AfterTimm(MetaPathFinder):
    """Finds timm as everybody else would, and has the models registered once it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "timm":
            return None
        sys.meta_path.remove(self)  # once; and so that the question below reaches the other finders
        spec = importlib.util.find_spec("timm")
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_timm_is_imported() -> None:
    """Now, if timm is imported; as soon as it is, otherwise."""
    timm = sys.modules.get("timm")
    if timm is None:
        sys.meta_path.insert(0, _AfterTimm())
    elif hasattr(timm, "create_model"):
        _register()
