"""The members that teach each other, behind one module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunetv2_cmems.method.feature_perturbation import ChannelDropout


class MemberOutput(NamedTuple):
    """What one member predicts in one training step.

    ``supervised``, ``strong`` and ``perturbed`` are lists of logits (B, K, *spatial), the finest
    resolution first; one entry where deep supervision is off. ``weak`` is (U, K, *spatial) without
    gradient. ``None`` marks a stream that was not asked for.
    """

    supervised: list[Tensor] | None
    strong: list[Tensor] | None
    perturbed: list[Tensor] | None
    weak: Tensor | None


def splits(member: nn.Module) -> bool:
    """Whether a network has an ``encoder`` whose list of features its ``decoder`` takes."""
    encoder, decoder = getattr(member, "encoder", None), getattr(member, "decoder", None)
    return isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module) and getattr(encoder, "return_skips", True)


class MutualNetworks(nn.Module):
    """n networks of one architecture, each drawn afresh, in one module.

    All that a training step needs from the networks is computed in one call, so that wrappers such as
    ``torch.compile`` see a single call. With one tensor it returns the mean of the members' logits,
    which is how nnU-Net ensembles folds.

    Args:
        make_member: builds one freshly initialised network.
        num_members: how many to build.
        make_other: builds a network of another architecture; None: there is none.
        mixed: every second member is of that other architecture.
        averaged: the pseudo-labels are not the members' own, but those of running means of their weights
            (Mean Teacher), see :attr:`teachers`.

    Shape:
        - ``forward(x)``: (B, C, *spatial) to (B, K, *spatial), or to a list of these with deep supervision.
        - ``forward(supervised, weak, strong)``: see :meth:`forward`.
    """

    def __init__(
        self,
        make_member: Callable[[], nn.Module],
        num_members: int,
        *,
        make_other: Callable[[], nn.Module] | None = None,
        mixed: bool = False,
        averaged: bool = False,
    ) -> None:
        super().__init__()
        self._makers = [make_member] if make_other is None else [make_member, make_other]
        self.members = nn.ModuleList(self._makers[i % 2 if mixed else 0]() for i in range(num_members))
        self.teachers = nn.ModuleList(copy.deepcopy(member).requires_grad_(False) for member in self.members if averaged)
        """Running means of the members' weights, which make the pseudo-labels; empty: the members make them themselves."""
        self.refinement: Tensor | None
        self.register_buffer("refinement", None)
        """How predictions of whole scans are refined, see :class:`~nnunetv2_cmems.method.refinement.Refinement`; None: not at all."""
        self.atlases: Tensor | None
        self.register_buffer("atlases", None)
        """Annotated volumes that are registered onto what is predicted, from :func:`~nnunetv2_cmems.method.atlas.to_tensor`; None: none."""
        self.only: int | None = None
        """Index of the one member that :meth:`forward` of a single tensor asks; None: the mean of all."""

    @property
    def deep_supervision(self) -> bool:
        """Whether the members' decoders return every resolution. Setting it sets all members."""
        return bool(getattr(self.members[0].decoder, "deep_supervision"))  # noqa: B009

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        for member in (*self.members, *self.teachers):
            setattr(member.decoder, "deep_supervision", enabled)  # noqa: B010

    @torch.compiler.disable(recursive=False)  # the members' code is compiled, once for all of them, and not this loop over them
    def forward(
        self,
        supervised: Tensor | Sequence[Tensor | None],
        weak: Sequence[Tensor] | None = None,
        strong: Sequence[Tensor] | None = None,
        dropout: ChannelDropout | None = None,
    ) -> Any:
        """Mean logits of one batch, or everything that a training step needs.

        Args:
            supervised: a tensor (B, C, *spatial): the members' mean logits are returned. Else one
                batch (or None) per member, and the training outputs are returned.
            weak: one weak view (U, C, *spatial) per member.
            strong: one strong view (U, C, *spatial) per member, or None.
            dropout: the feature perturbation, or None.

        Returns:
            Mean logits, or one :class:`MemberOutput` per member.
        """
        if isinstance(supervised, Tensor):
            return self._mean(supervised)
        none = [None] * len(self.members)
        streams = zip(self.members, self.teachers or none, supervised, weak or none, strong or none)
        return [_member_step(member, teacher, s, w, v, dropout) for member, teacher, s, w, v in streams]

    @property
    def labellers(self) -> nn.ModuleList:
        """The networks that make the pseudo-labels, one per member."""
        return self.teachers if len(self.teachers) else self.members

    @torch.no_grad()
    def update_teachers(self, decay: float) -> None:
        """Move the running means on: ``decay`` of what they are, the rest of what the members are now."""
        for teacher, member in zip(self.teachers, self.members):  # not by state_dict, which names shared tensors twice
            for weight, value in zip(teacher.parameters(), member.parameters()):
                weight.lerp_(value, 1 - decay)
            for buffer, current in zip(teacher.buffers(), member.buffers()):
                buffer.copy_(current)

    def _mean(self, x: Tensor) -> Tensor | list[Tensor]:
        outputs = [member(x) for member in (self.members if self.only is None else [self.members[self.only]])]
        if isinstance(outputs[0], (list, tuple)):
            return [_average(scale) for scale in zip(*outputs)]
        return _average(outputs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but the number of members and their architectures follow the weights.

        nnU-Net builds the network at inference without knowing how many members were trained, and of which kind. Running
        means that this module does not keep are left out. :attr:`refinement` and :attr:`atlases` become what the weights say of them.
        """
        count = count_members(state_dict)
        if count:
            while len(self.members) < count:
                self.members.append(self._makers[0]())
            del self.members[count:]
            for i, member in enumerate(self.members):
                self.members[i] = self._of_shape(shapes(state_dict, f"members.{i}."), member)
        self.refinement, self.atlases = state_dict.get("refinement"), state_dict.get("atlases")
        if not len(self.teachers):
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith("teachers.")}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _of_shape(self, wanted: Mapping[str, torch.Size], member: nn.Module) -> nn.Module:
        """A network that weights of these shapes fit; ``member`` itself where it or none does."""
        if shapes(member.state_dict()) != wanted:
            for make in self._makers:
                other = make()
                if shapes(other.state_dict()) == wanted:
                    return other
        return member


def shapes(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, torch.Size]:
    """The shape of each tensor whose name begins with ``prefix``, by the rest of its name."""
    return {key[len(prefix) :]: value.shape for key, value in state_dict.items() if key.startswith(prefix)}


def count_members(state_dict: Mapping[str, Any]) -> int:
    """Number of members in the state dict of a :class:`MutualNetworks`; 0 if it is another network's."""
    return len({key.split(".")[1] for key in state_dict if key.startswith("members.")})


def _average(outputs: Sequence[Tensor]) -> Tensor:
    if len(outputs) == 1:
        return outputs[0]
    total = outputs[0].float()  # half precision would lose what the members differ in
    for output in outputs[1:]:
        total = total + output
    return total / len(outputs)


def _member_step(
    member: Any, teacher: Any, supervised: Tensor | None, weak: Tensor | None, strong: Tensor | None, dropout: ChannelDropout | None
) -> MemberOutput:
    """One member's training step; nothing is computed twice.

    All streams go through the encoder as one batch, the weak view only once: its features serve the
    pseudo-label (decoded without gradient) and, perturbed, the feature granularity. Members without
    batch statistics (nnU-Net's instance norm) keep the streams independent of each other.

    The pass without gradient comes last: autocast caches the half-precision copies of the weights, and
    copies made without gradient would cut the later passes off from it.

    Where the member has a ``teacher``, a running mean of it, the pseudo-label is the teacher's.
    """
    with_gradient = [x for x in (supervised, strong) if x is not None]
    num_supervised = 0 if supervised is None else len(supervised)
    num_strong = 0 if strong is None else len(strong)
    num_perturbed, weak_logits = 0, None
    if weak is not None and dropout is not None:
        num_perturbed = len(weak)
        levels = member.encoder(torch.cat([*with_gradient, weak]))
        features = [level.split([len(level) - num_perturbed, num_perturbed]) for level in levels]  # one copy in the backward pass
        dropped = dropout([level for _, level in features])
        scales = _scales(member.decoder([torch.cat([first, drop]) for (first, _), drop in zip(features, dropped)]))
        if teacher is None:
            with torch.no_grad():
                weak_logits = _scales(member.decoder([level.detach() for _, level in features]))[0]
    else:
        scales = _scales(member(torch.cat(with_gradient))) if with_gradient else []
    if weak is not None and weak_logits is None:
        with torch.no_grad():
            weak_logits = _scales((teacher or member)(weak))[0]
    sizes = num_supervised, num_strong, num_perturbed
    of_supervised, of_strong, of_perturbed = [list(part) for part in zip(*(scale.split(sizes) for scale in scales))] or [[], [], []]
    return MemberOutput(
        supervised=None if supervised is None else of_supervised,
        strong=None if strong is None else of_strong,
        perturbed=of_perturbed if num_perturbed else None,
        weak=weak_logits,
    )


def _scales(output: Tensor | list[Tensor]) -> list[Tensor]:
    return list(output) if isinstance(output, (list, tuple)) else [output]
