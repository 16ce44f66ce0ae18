"""Says where prompts and completions lie in a packed row, for attention and for recurrent layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Group:
    """Where a prompt and its completions lie in a packed row. G branches, C tokens in the longest.

    `branches` gathers from the row's positions, and `is_token` scatters back; both are (G, C).
    """

    start: int
    prefix: int  # length
    lengths: Sequence[int]  # of the G branches
    branches: torch.Tensor  # positions in the row; padded with the group's first
    is_token: torch.Tensor  # False where `branches` is padding
    mask: torch.Tensor  # (C, prefix + C): what a branch sees

    @property
    def length(self) -> int:
        """Prefix and branches."""
        return self.prefix + sum(self.lengths)


@dataclass(frozen=True, eq=False)
class Paths:
    """A packed row as N sequences of variable lengths: each prefix, each branch behind its prefix.

    The queries of a sequence are its own tokens, so all together are the row as it is. Its keys are
    the path to them; all paths have T tokens.
    """

    keys: torch.Tensor  # (T,): positions in the row, path by path
    query_ends: torch.Tensor  # (N + 1,) int32: 0, and where each sequence's queries end
    key_ends: torch.Tensor  # (N + 1,) int32: likewise in `keys`
    most_queries: int  # of a sequence
    most_keys: int


@dataclass(frozen=True, eq=False)
class Runs:
    """A packed row of L tokens as N prefixes (at most P tokens) and B branches (at most C).

    Both gather from the row's positions. Prefixes are padded on the left, where the layer's mask keeps padding out of
    the state, and branches on the right, where nothing follows it.
    """

    prefixes: torch.Tensor  # (N, P): positions in the row
    is_prefix: torch.Tensor  # (N, P): False on padding
    branches: torch.Tensor  # (B, C): positions in the row
    is_branch: torch.Tensor  # (B, C): False on padding
    owner: torch.Tensor  # (B,): which prefix a branch goes on from
    order: torch.Tensor  # (L,): positions in the row of all that is no padding, prefixes first


@dataclass(frozen=True, eq=False)
class Layout:
    """The groups of a packed row, in order and without gaps."""

    groups: Sequence[Group]

    @cached_property
    def paths(self) -> Paths:
        """Made once a row, and only where attention asks for it."""
        lengths, paths = [], []
        for group in self.groups:
            prefix, *branches = torch.arange(group.start, group.start + group.length).split(
                [group.prefix, *group.lengths]
            )
            if group.prefix:
                lengths.append(group.prefix)
                paths.append(prefix)
            lengths += group.lengths
            paths += [torch.cat([prefix, branch]) for branch in branches]
        device, sizes = self.groups[0].branches.device, list(map(len, paths))
        query_ends, key_ends = (
            F.pad(torch.tensor(counts).cumsum(0), (1, 0)).to(device, torch.int32) for counts in (lengths, sizes)
        )
        return Paths(torch.cat(paths).to(device), query_ends, key_ends, max(lengths), max(sizes))

    @cached_property
    def runs(self) -> Runs:
        """Made once a row, and only where a layer is recurrent."""
        return locate_runs(self.groups)


def locate_group(start: int, prefix: int, branch_lengths: Sequence[int], device: torch.device) -> Group:
    """The group of a prefix at `start` and the branches behind it."""
    lengths = torch.tensor(branch_lengths, dtype=torch.long, device=device)  # (G,)
    longest = max(branch_lengths, default=0)
    column = torch.arange(longest, device=device)  # (C,)
    is_token = column < lengths[:, None]  # (G, C)
    begin = start + prefix + lengths.cumsum(0) - lengths  # (G,)
    branches = torch.where(is_token, begin[:, None] + column, start)
    key = torch.arange(prefix + longest, device=device)
    mask = key <= prefix + column[:, None]  # causal, the prefix in front
    return Group(start, prefix, branch_lengths, branches, is_token, mask)


def locate_runs(groups: Sequence[Group]) -> Runs:
    """The runs over a row's groups; where there is no prefix, or no branch, one row of padding takes its place."""
    device = groups[0].branches.device
    starts = torch.tensor([group.start for group in groups], device=device)
    lengths = torch.tensor([group.prefix for group in groups], device=device)
    longest = max([1, *(group.prefix for group in groups)])
    column = torch.arange(longest, device=device) + lengths[:, None] - longest  # (N, P), negative on padding
    is_prefix = column >= 0
    prefixes = starts[:, None] + column.clamp(min=0)  # (N, P)

    # A single token would take fla's kernel for decoding, which has no backward pass.
    longest = max([2, *(length for group in groups for length in group.lengths)])
    branches, is_branch = (
        torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])
        for parts in ([group.branches for group in groups], [group.is_token for group in groups])
    )  # (B, C)
    owner = torch.tensor([row for row, group in enumerate(groups) for _ in group.lengths], device=device)
    if not len(branches):
        branches, is_branch = (F.pad(part, (0, 0, 0, 1)) for part in (branches, is_branch))
        owner = torch.zeros(1, dtype=torch.long, device=device)
    order = torch.cat([prefixes[is_prefix], branches[is_branch]])
    return Runs(prefixes, is_prefix, branches, is_branch, owner, order)
