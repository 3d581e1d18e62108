"""Spotfirst in other frameworks' training loops. Each module imports its framework, and only its.

======================================= ====================================================
:mod:`~spotfirst.integrations.dataloader`  a position in the data, for any loop
:mod:`~spotfirst.integrations.lightning`   ``Trainer(callbacks=[SpotfirstCallback()])``
:mod:`~spotfirst.integrations.huggingface` ``trainer.train(resume_from_checkpoint=resume(trainer))``
:mod:`~spotfirst.integrations.accelerate`  ``checkpointer(accelerator, model=model, …)``
======================================= ====================================================
"""
