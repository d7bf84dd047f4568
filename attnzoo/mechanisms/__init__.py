"""The mechanisms: one file each, one folder per family. Dropping a file in is all it takes."""
