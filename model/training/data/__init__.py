"""Videos of a list come in, augmented batches of clips go out, the same in each run."""
