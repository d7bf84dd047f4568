"""What tokens attend to instead of tokens."""
