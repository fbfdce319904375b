"""How a model learns: from lists of labelled videos to weights that `timesformer export` takes.

    errors.py        TrainingError and its tree
    sources.py       labelled videos from CSV, Parquet, folders, Something-Something; honest splits
    remote.py        lists and videos by URL
    workers.py       files in processes; one that kills its process costs only itself
    check.py         `timesformer data check`
    data.py          the order of clips, and their decoding for training
    cache.py         decoded clips of a small set on disk
    augmentation.py  what is done to a batch before the network sees it
    symmetries.py    mirrored, turned over, transposed, reversed clips and their labels
    optimisation.py  parameter groups, schedules, freezing, the average of the weights
    best.py          the best evaluated weights, and when to stop
    recipe.py        all that decides what is learned, and the presets
    checkpoint.py    the state of a run on disk
    log.py           what happened in a run
    run.py           its steps and states
    loop.py          from the first step to the written weights
    evaluation.py    `timesformer evaluate`: accuracy and calibration
    calibration.py   the temperature that mends the calibration

`errors`, `sources`, `remote`, `workers`, `check`, `evaluation` and `calibration` run without torch.
"""
