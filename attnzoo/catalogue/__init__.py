"""The zoo and its models in words, for people at a prompt or in a notebook: `list_*`, `show`, `describe`."""
