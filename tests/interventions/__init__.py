"""One file for each intervention: what it does by hand, and where it does nothing."""
