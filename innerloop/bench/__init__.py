"""How fast a meta-training step is, and how much memory it takes, beside other ways to take it."""
