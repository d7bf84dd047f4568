"""Shape annotations hold: every built-in part runs with jaxtyping's import hook over attnzoo.

In a process of its own, because the hook must be there before attnzoo is imported and gets in the way of tracing.
"""

import processes

RUN = """
import jaxtyping
HOOKED = ["core.layout", "core.mask", "core.fusion", "core.head", "core.mechanism", "core.pool", "core.multi_head",
          "core.fused", "functional", "mechanisms", "fusions"]
with jaxtyping.install_import_hook([f"attnzoo.{name}" for name in HOOKED], "beartype.beartype"):
    import torch
    torch.set_num_threads(1)
    from attnzoo import load_zoo
    from attnzoo.testing.runner import CHECKS, checks_for, run_check

    zoo = load_zoo()
    assert not [p for p in zoo.problems if p.plugin == "attnzoo"], zoo.problems
    wanted = ["check_output", "check_masks_as_views", "check_context_refused", "check_context_as_site_says"]
    parts = [e.value for r in (zoo.mechanisms, zoo.fusions) for e in r.values() if e.plugin == "attnzoo"]
    bad = [
        str(result)
        for part in parts
        for name in wanted
        if CHECKS[name] in checks_for(part)
        for result in [run_check(part, CHECKS[name], 1, shrink=False)]
        if "TypeCheckError" in result.reason or "Beartype" in result.reason
    ]
    assert parts and not bad, "\\n\\n".join(bad)
    try:
        from attnzoo.core import Layout, Site
        from attnzoo.mechanisms.dot_product.softmax import Softmax

        head = Softmax(Site("check", 4, 2, Layout((3,))))
        head(torch.zeros(1, 2, 3, 2), torch.zeros(1, 2, 3, 2), torch.zeros(1, 2, 9, 2), layout=Layout((3,)))
    except jaxtyping.TypeCheckError:
        pass
    else:
        raise AssertionError("the hook is not at work")
"""


def test_shapes_are_as_annotated():
    done = processes.run("-c", RUN)
    assert done.returncode == 0, done.stderr[-4000:]
