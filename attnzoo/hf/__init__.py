"""The zoo's heads inside models of Hugging Face, as attention implementations of transformers.

    import attnzoo
    from transformers import AutoModelForCausalLM

    attnzoo.register_with_transformers()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="attnzoo:softmax")

Transformers hands over queries, keys and values and takes back what each query receives; projections, positions,
caches, tokenisers, `save_pretrained` and `Trainer` are its own. So the mechanisms that can take part are the heads
without weights of their own; `supported()` lists all, with the reason of each that cannot.
"""

from attnzoo.hf.registration import register, register_with_transformers
from attnzoo.hf.support import Support, supported

__all__ = ["Support", "register", "register_with_transformers", "supported"]
