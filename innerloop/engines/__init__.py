"""Ways to compute the gradients of a meta-batch, beside the loop and the vmap of ``MetaLearner`` itself."""
