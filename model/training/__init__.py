"""How a model learns: from lists of labelled videos to weights that `timesformer export` takes.

    errors.py        TrainingError and its tree
    sources.py       labelled videos from CSV, folders, Something-Something JSON; honest splits
    workers.py       files in processes; one that kills its process costs only itself
    check.py         `timesformer data check`
    data.py          the order of clips, and their decoding for training
    augmentation.py  what is done to a batch before the network sees it
    optimisation.py  parameter groups, schedules, freezing, the average of the weights
    recipe.py        all that decides what is learned, and the presets
    checkpoint.py    the state of a run on disk
    log.py           what happened in a run
    run.py           its steps and states
    loop.py          from the first step to the written weights
    evaluation.py    `timesformer evaluate`: accuracy and calibration

`errors`, `sources`, `workers`, `check` and `evaluation` run without torch.
"""
