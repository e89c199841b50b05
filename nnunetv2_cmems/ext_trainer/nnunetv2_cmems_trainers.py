"""Hands the trainers of :mod:`nnunetv2_cmems.trainers` to nnU-Net; defines nothing itself.

nnU-Net imports each module of the folders named in ``nnUNet_extTrainer`` as a top-level module, takes
the trainer class from it and then drops the module from ``sys.modules``. A class defined here would
therefore not be found again when a spawned worker unpickles it. Keep this folder free of definitions.
"""

try:
    from nnunetv2_cmems.errors import show_errors_as_sentences
    from nnunetv2_cmems.trainers import *  # noqa: F403

    show_errors_as_sentences()  # also for what nnU-Net misses before it makes a trainer
except ModuleNotFoundError as error:
    # The variable can reach a Python that lacks this package, such as that of another environment
    # started from ours. Its own trainers must still be found.
    if error.name != "nnunetv2_cmems":
        raise
