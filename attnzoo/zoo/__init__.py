"""The zoo: what the installed plugins offer. The built-ins are one of them.

Submodules are imported on demand: `attnzoo.zoo.hookspecs` must not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
