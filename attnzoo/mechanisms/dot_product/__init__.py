"""How queries and keys are compared and normalised."""
