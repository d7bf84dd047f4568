"""What trained models are worth: translations and their scores, and several models that decide together."""
