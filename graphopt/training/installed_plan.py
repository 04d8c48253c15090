"""The plan of an optimized model, kept true while training changes its block-sparse layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from graphopt.dense_base import meta_copy
from graphopt.errors import TrainingError
from graphopt.kernels import BlockSparseLinear
from graphopt.passes.plan import ChangeRecord, CostRecord, Plan, Totals
from graphopt.passes.program import Program
from graphopt.passes.propagation import refresh
from graphopt.passes.registry import pass_named
from graphopt.runtime import Installation, install, install_parts, installation_of, uninstall


class InstalledPlan:
    """What an optimized model's plan says about block-sparse layers, to be changed with them.

    `install` gives the model new classes, so copies of the model keep the plan that is theirs.

    Args:
        model: An optimized model.
        installation: Its installation.

    Raises:
        TrainingError: if a block-sparse layer was there before the plan.
    """

    def __init__(self, model: nn.Module, installation: Installation) -> None:
        bare = meta_copy(model)
        uninstall(bare)
        self._places: dict[str, tuple[str, int]] = {}
        self._plans = {"": installation.plan, **installation.plan.parts}
        for part, plan in reversed(self._plans.items()):
            for index, record in reversed(list(enumerate(plan.changes))):
                before = _sparse(bare)
                pass_named(record.pass_name).restore(bare.get_submodule(part), record.change)
                for name in before - _sparse(bare):
                    self._places[name] = (part, index)
        left = sorted(_sparse(bare))
        if left:
            raise TrainingError(
                f"expected block-sparse layers that the model's plan made, got {left}, which were "
                "block-sparse before it was optimized; densify those first, then optimize"
            )
        self._records = {part: list(plan.changes) for part, plan in self._plans.items()}

    def resize(self, name: str, layer: BlockSparseLinear) -> None:
        """Write down that a layer has as many blocks as it has now.

        Raises:
            TrainingError: if the change that made it does not say how many blocks there are.
        """
        part, index = self._places[name]
        record = self._records[part][index]
        stored = record.details.get("blocks")
        if not isinstance(stored, int):
            raise TrainingError(
                f"expected a number of blocks in what {record.pass_name} noted about {name!r}, got "
                f"{stored!r}; lower the density of a model that graphopt.densify made dense"
            )
        layout = layer.layout
        removed = (stored - layout.blocks) * layer.block_out * layer.block_in
        share = layout.blocks / (layout.row_tiles * layout.column_groups)
        after = CostRecord(
            flops=round(record.before.flops * share),
            size_bytes=record.after.size_bytes - removed * layer.values.element_size(),
            parameters=record.after.parameters - removed,
        )
        first = self._plans[part].changes[index].summary
        self._records[part][index] = record.model_copy(
            update={
                "details": {**record.details, "blocks": layout.blocks},
                "summary": f"{first}, then {layout.blocks} in training",
                "after": after,
            }
        )

    def drop(self, names: Iterable[str]) -> None:
        """Take out the changes that made these layers, which are dense now."""
        dropped = {self._places[name] for name in names}
        for part, records in self._records.items():
            kept = [r for index, r in enumerate(records) if (part, index) not in dropped]
            self._records[part] = kept

    def install(self, model: nn.Module) -> None:
        """Give the model this plan, with code and facts for its layers as they are."""
        whole = installation_of(model)
        assert whole is not None
        parts = {name: installation_of(model.get_submodule(name)) for name in whole.plan.parts}
        plans = {part: self._edited(part) for part in self._plans}
        totals = _moved(
            plans.pop("").totals,
            (record for part in self._plans for record in self._plans[part].changes),
            (record for records in self._records.values() for record in records),
        )
        plan = self._edited("").model_copy(update={"parts": plans, "totals": totals})
        uninstall(model)
        for name, part in parts.items():
            assert part is not None
            _install(part, plans[name])
        if whole.program is None:
            install_parts(model, plan)
        else:
            _install(whole, plan)

    def _edited(self, part: str) -> Plan:
        plan, records = self._plans[part], self._records[part]
        totals = plan.totals if not part else _moved(plan.totals, plan.changes, records)
        return plan.model_copy(update={"changes": tuple(records), "totals": totals})


def _install(installation: Installation, plan: Plan) -> None:
    program = installation.program
    assert program is not None
    # Copies of the model share the graph, and theirs must stay as it is.
    own: Program = program.of_copy(program.model)
    own.graph = copy.deepcopy(program.graph)
    refresh(own)
    install(own, plan, eager_refusal=installation.eager_refusal)


def _sparse(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)}


def _moved(
    totals: Totals | None, before: Iterable[ChangeRecord], after: Iterable[ChangeRecord]
) -> Totals | None:
    """Return the totals of a plan with other changes; the measured time is no longer known."""
    if totals is None:
        return None

    def saved(records: list[ChangeRecord], what: str) -> int:
        return sum(getattr(r.before, what) - getattr(r.after, what) for r in records)

    old, new = list(before), list(after)
    if old == new:
        return totals
    costs = {
        what: getattr(totals.after, what) + saved(old, what) - saved(new, what)
        for what in ("flops", "size_bytes", "parameters")
    }
    return totals.model_copy(update={"after": CostRecord(**costs)})
