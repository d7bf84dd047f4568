"""Pages of components: what is drawn of each, and from what."""
