"""A training in several processes, one for each GPU (``-num_gpus``): what each of them does, and what they tell each other.

nnU-Net starts the processes, gives each a GPU and averages the gradients (``DistributedDataParallel``). Here a step's images are
shared out, and what only one process may do is left to the first. That the averaged gradient is the whole step's is the work of
:func:`nnunetv2_cmems.method.losses.over_processes`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.losses import weighted_scales
from nnunetv2_cmems.method.objective import Batches

Value = TypeVar("Value")


def count_processes() -> int:
    """The processes of this training; 1 where it is not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def unwrapped(network: Any) -> Any:
    """A network without the wrappers that nnU-Net puts around it: torch.compile's, and around that the one for several GPUs."""
    network = without_talk(network)
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def without_talk(network: Any) -> Any:
    """A network whose forward pass does not talk to the other processes, as these may be busy with something else."""
    return network.module if isinstance(network, DistributedDataParallel) else network


# ------------------------------------------------------------------ a step's images


def share(whole: Batches, rank: int, processes: int) -> Batches:
    """The images of a step that one of several processes works on.

    What cannot be shared out evenly goes to the processes in turn, from one stream to the next, so that none gets all of it.

    Raises:
        CMEMSError: a stream has fewer images than there are processes.
    """
    few = [name for name, count in zip(Batches._fields, whole) if 0 < count < processes]
    if few:
        counts = ", ".join(f"{getattr(whole, name)} {name}" for name in few)
        keys = ", ".join(f"'{name}_batch'" for name in few)
        raise CMEMSError(
            f"a step has too few images for {processes} GPUs ({counts}): set {keys} to at least {processes} in cmems.json, or lower "
            "-num_gpus."
        )
    images, dealt = [], 0
    for count in whole:
        images.append(count // processes + ((rank - dealt) % processes < count % processes))
        dealt += count
    return Batches(*images)


def check_planned(planned: int, processes: int, configuration: str, plans: str) -> None:
    """Refuse more processes than the plans' batch has images, which nnU-Net's own loaders cannot work with.

    Raises:
        CMEMSError: names the file ``plans`` and what to do.
    """
    if planned < processes:
        raise CMEMSError(
            f"{plans} plans {planned} images a step for configuration '{configuration}', too few for {processes} GPUs: raise its "
            "batch_size there, or lower -num_gpus."
        )


def shared_out(whole: Batches, part: Batches) -> str:
    """For the log: how many images of a step are this process's, and whether CutMix lacks partners; "" for a single process."""
    processes = count_processes()
    if processes == 1:
        return ""
    alone = 0 < whole.unlabelled < 2 * processes
    cutmix = f" (a GPU with only one of these does no CutMix: {2 * processes} or more would do, see 'unlabelled_batch')" if alone else ""
    return f"{cutmix}, of which this GPU has {part.exemplar}, {part.synthetic} and {part.unlabelled}"


# ------------------------------------------------------------------ networks


def leave_out_unreached(members: Sequence[nn.Module], image: Tensor) -> None:
    """Freeze the parameters that no term of the loss reaches, such as the head of the coarsest resolution.

    They never get a gradient, whatever the number of processes, but ``DistributedDataParallel`` would wait for one.

    Args:
        members: networks with deep supervision as it is in the training.
        image: (1, C, *patch) any image on the members' device.
    """
    for member in members:
        training = member.training
        member.eval()  # running statistics stay as they are
        output: Any = member(image)
        scales = list(output) if isinstance(output, (list, tuple)) else [output]
        used = [scale.sum() for scale, _ in weighted_scales(scales)]
        parameters = [parameter for parameter in member.parameters() if parameter.requires_grad]
        for parameter, gradient in zip(parameters, torch.autograd.grad(used, parameters, allow_unused=True)):
            parameter.requires_grad_(gradient is not None)
        member.train(training)


# ------------------------------------------------------------------ one after the other, and all together


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if count_processes() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """What stands within is done by the first process, and only then by the others: they find the files that it has made."""
    is_first = count_processes() == 1 or dist.get_rank() == 0
    if not is_first:
        wait_for_all()
    yield
    if is_first:
        wait_for_all()


def gathered(values: Sequence[Value]) -> list[Value]:
    """The values of all processes, those of the first one first. Every process has to ask, and gets them all."""
    processes = count_processes()
    if processes == 1:
        return list(values)
    everyone: list[Any] = [None] * processes
    dist.all_gather_object(everyone, list(values))
    return [value for part in everyone for value in part]


class NoSideFiles:
    """In place of :class:`~nnunetv2_cmems.trainers.faults.SideFiles` where another process writes the pictures and curves."""

    def write(self, path: str, write: Callable[[str], Any]) -> None:
        """Do nothing."""
