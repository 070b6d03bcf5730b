"""A class of tests for each broken plugin, and for each whole one and area; named, so never collected on its own."""

from __future__ import annotations

from functools import partial

from .areas import MUTATIONS, SUITES
from .mutation import importable_name
from .outcomes import WHOLE, suite_for
from .worlds import world_of

for _index, _mutation in enumerate(MUTATIONS):
    globals()[f"TestMutant{_index}"] = suite_for(
        SUITES[_mutation.area],
        _mutation.plugin,
        _mutation.importable,
        partial(world_of, _mutation.importable),
    )
for _name, _plugin in WHOLE.items():
    for _area, _suites in SUITES.items():
        globals()[f"TestWhole_{_name}_{_area}"] = suite_for(
            _suites,
            _plugin,
            importable_name(_plugin),
            partial(world_of, importable_name(_plugin)),
        )
