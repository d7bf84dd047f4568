"""The models into which mechanisms are put."""

import timm  # noqa: F401 - first of all, so that whoever waits for timm finds this package without half-made modules
