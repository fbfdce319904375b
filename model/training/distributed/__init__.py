"""Several processes that train what one process would: gradients, batches and checkpoints."""
