"""One file for each probe: hand cases, planted structure, and what it must not find."""
