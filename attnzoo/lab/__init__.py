"""Looking into trained models: attention maps, rollout, heat maps, committees."""
