"""How much compute an optimized training saves at equal loss, against dense models of every kind.

One study per workload (`studies/*.yaml`); `benchmarks/training_frontier.py` runs it,
and `benchmarks/tuning_choice.py` makes single trainings on its tuning split:

    study.py    what a study says: model, arms, budgets, learning rates, seeds
    tasks.py    what a workload gives: models, batches, losses, quality on held-out data
    topics.py, language.py, images.py   the workloads; adapters.py is one of the controls
    trial.py    one training: operations counted, quality measured
    trials.py   all trainings of a study, the ones done before kept
    saving.py   compute at equal loss, with intervals
    times.py    seconds per operation, the arms in turns
    picture.py  loss over operations and over seconds
"""
