"""Looking into models: attention maps on images and text, rollout, heat maps."""
