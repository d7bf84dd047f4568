"""What another stream says."""
