"""Data: class images and functions, and the tasks sampled from them. Knows nothing of models."""
