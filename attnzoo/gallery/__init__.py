"""The zoo as pages that people look at."""
