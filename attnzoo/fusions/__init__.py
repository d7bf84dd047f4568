"""The fusions: one file each. Dropping a file in is all it takes."""
