"""The subcommands of `timesformer`, a file each. They import their layer when they run."""
