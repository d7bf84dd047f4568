"""Pages of components for people who look around: what each is, does to a picture, costs and is checked for."""
