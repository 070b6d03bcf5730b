"""The KV manager against a model, over tens of thousands of random operations."""

from fakes import kv_group
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from chipset.core.kv_cache.manager import KVCacheManager

NUM_EXAMPLES, NUM_STEPS = 320, 110
BLOCK = 4
TEXTS = [[kind] * 3 + list(range(100 * kind, 100 * kind + 90)) for kind in range(3)]


class Manager(RuleBasedStateMachine):
    """Requests that open, grow, compute, trim, remember and close in any order.

    The model keeps, for every block of every group, which text its content belongs to; whatever the manager says is
    cached must be what that block was last filled with.
    """

    num_operations = 0
    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[int, tuple] = {}
        self.next_id = 0

    @initialize(
        windows=st.sampled_from([(None,), (7,), (None, 6), (5, None, 13)]),
        num_blocks=st.integers(6, 40),
    )
    def start(self, windows, num_blocks):
        groups = [kv_group(window, (i,)) for i, window in enumerate(windows)]
        self.windows = windows
        self.kv = KVCacheManager(
            groups, [num_blocks] * len(groups), block_size=BLOCK, max_step_tokens=16
        )
        self.content = [[None] * num_blocks for _ in groups]

    def visible(self, group: int, computed: int) -> range:
        window = self.windows[group]
        return range(0 if window is None else max(0, computed - window + 1), computed)

    @rule(
        target=tables,
        text=st.sampled_from(range(3)),
        length=st.integers(1, 60),
        salt=st.sampled_from(["", "s"]),
    )
    def open_table(self, text, length, salt):
        Manager.num_operations += 1
        tokens = TEXTS[text][:length]
        table = self.kv.open(tokens, salt)
        assert table.num_cached_tokens % BLOCK == 0
        assert table.num_cached_tokens < length
        for group in range(len(self.windows)):
            for index in self.visible(group, table.num_cached_tokens):
                block = table.blocks[group][index // BLOCK]
                expected = (salt, tuple(tokens[: (index // BLOCK + 1) * BLOCK]))
                assert self.content[group][block] == expected, "found a block of another text"
        self.next_id += 1
        self.open[self.next_id] = (table, tokens, salt, table.num_cached_tokens)
        return self.next_id

    @rule(request=tables, count=st.integers(1, 16))
    def compute(self, request, count):
        Manager.num_operations += 1
        table, tokens, salt, computed = self.open[request]
        self.kv.trim(table, computed)
        end = min(computed + count, len(tokens))
        free = [pool.num_free for pool in self.kv.pools]
        if not self.kv.reserve(table, end):
            assert [pool.num_free for pool in self.kv.pools] == free, "half a reservation"
            return
        for group, blocks in enumerate(table.blocks):
            for index in self.visible(group, min(computed + 1, end)):
                assert blocks[index // BLOCK] != 0, (
                    "a block that the next token sees was given back"
                )
            for index in range(computed, end):
                filled = tuple(tokens[: index + 1])
                whole = len(filled) % BLOCK == 0
                self.content[group][blocks[index // BLOCK]] = (salt, filled) if whole else None
        self.kv.remember(table, tokens, end)
        self.open[request] = (table, tokens, salt, end)

    @rule(request=tables, more=st.integers(1, 5))
    def append(self, request, more):
        Manager.num_operations += 1
        table, tokens, salt, computed = self.open[request]
        self.open[request] = (table, tokens + [tokens[0] * 1000 + more] * more, salt, computed)

    @rule(request=consumes(tables))
    def close(self, request):
        Manager.num_operations += 1
        self.kv.close(self.open.pop(request)[0])

    @rule(request=consumes(tables))
    def discard(self, request):
        Manager.num_operations += 1
        table = self.open.pop(request)[0]
        self.kv.discard(table)
        self.kv.close(table)

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "kv"):
            self.kv.check(table for table, *_ in self.open.values())

    def teardown(self):
        if hasattr(self, "kv"):
            for table, *_ in self.open.values():
                self.kv.close(table)
            assert self.kv.num_held == 0
            self.kv.check([])


def test_the_manager_survives_twenty_thousand_random_operations():
    Manager.num_operations = 0
    run_state_machine_as_test(
        Manager,
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=NUM_STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{Manager.num_operations} operations")
    assert Manager.num_operations >= 20_000
