"""Which neighbours on the grid."""
