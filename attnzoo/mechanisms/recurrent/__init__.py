"""What state is carried along the sequence."""
