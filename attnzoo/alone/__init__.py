"""One mechanism alone, in somebody else's network: `attnzoo.create` and `attnzoo.as_mha`."""
